"""What the layers of an image show together, read without a mount.

Merges folders as an overlay does (overlayfs.rst): an upper name hides a lower one, folders merge
unless the upper one is opaque, a whiteout hides. Links are resolved inside of the image as a
chroot would, so that nothing an image says leads to a file of the host. The layers are unpacked
and never change, which is why paths are safe here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import ImageError

OPAQUE = "user.overlay.opaque"
MAX_LINKS = 40
"""As many as Linux follows (path_resolution(7))."""
MAX_DEPTH = 1000


@dataclass(frozen=True)
class Entry:
    """One name that an image shows: where its file lies on the host, and what lies merged there."""

    path: str
    """The absolute path inside, without links in it."""
    source: str
    """The path on the host, of the topmost layer that has it."""
    info: os.stat_result
    merged: tuple[str, ...] = ()
    """For a folder: its folders on the host, topmost first."""

    @property
    def is_folder(self) -> bool:
        """Tell whether it is a folder."""
        return stat.S_ISDIR(self.info.st_mode)

    @property
    def is_file(self) -> bool:
        """Tell whether it is a regular file."""
        return stat.S_ISREG(self.info.st_mode)

    @property
    def is_link(self) -> bool:
        """Tell whether it is a symbolic link."""
        return stat.S_ISLNK(self.info.st_mode)


def showing(layers: Sequence[str | Path]) -> tuple[str | Path, ...]:
    """Give those of some layers, lowest first, that show at all.

    A layer may hide all below it by an opaque root, which overlayfs looks at in folders only.
    """
    first = max((n for n, layer in enumerate(layers) if is_opaque(str(layer))), default=0)
    return tuple(layers[first:])


class View:
    """The merged tree of some layers, lowest first."""

    def __init__(self, layers: Sequence[str | Path]) -> None:
        folders = tuple(str(layer) for layer in reversed(showing(layers)))
        top = os.lstat(folders[0]) if folders else os.stat_result((stat.S_IFDIR | 0o755, *[0] * 9))
        self._root = Entry("/", folders[0] if folders else "", top, folders)

    def find(self, path: str, *, follow: bool = True) -> Entry | None:
        """Give what is at a path, None where nothing is; `follow` resolves a link at its end.

        Raises ImageError for a loop of links.
        """
        left = _parts(path)
        here = [self._root]
        followed = 0
        while left:
            name = left.pop(0)
            if name == "..":
                here = here[:-1] or here
                continue
            entry = _child(here[-1], name)
            if entry is None:
                return None
            if entry.is_link and (follow or left):
                followed += 1
                if followed > MAX_LINKS:
                    raise ImageError(f"{path!r} leads through too many links")
                target = os.readlink(entry.source)
                here = here[:1] if target.startswith("/") else here
                left = _parts(target) + left
                if len(left) > MAX_DEPTH:
                    raise ImageError(f"{path!r} is too deep")
                continue
            if left and not entry.is_folder:
                return None
            here.append(entry)
        return here[-1]

    def resolve(self, path: str) -> str:
        """Give where a path leads, with all links resolved; what is not there stays as written."""
        known = list(_parts(path))
        missing: list[str] = []
        while known:
            entry = self.find("/".join(known))
            if entry is not None:
                return os.path.normpath("/".join((entry.path, *missing)))
            missing.insert(0, known.pop())
        return os.path.normpath("/" + "/".join(missing))

    def names(self, folder: Entry) -> list[str]:
        """Give the names in a folder, sorted."""
        hidden: set[str] = set()
        found: set[str] = set()
        for source in folder.merged:
            whiteouts = set()
            with os.scandir(source) as entries:
                for entry in entries:
                    if entry.name in hidden:
                        continue
                    if _is_whiteout(entry.stat(follow_symlinks=False)):
                        whiteouts.add(entry.name)
                    else:
                        found.add(entry.name)
            # What a layer hides, it hides of the layers below, never of those above.
            hidden |= whiteouts - found
        return sorted(found)

    def child(self, folder: Entry, name: str) -> Entry | None:
        """Give what a folder shows under a name, links not followed."""
        return _child(folder, name)

    def read(self, path: str, limit_bytes: int) -> bytes:
        """Give the content of a small file; empty where there is none.

        Raises ImageError where it is no regular file, or larger (CVE-2024-9676).
        """
        entry = self.find(path)
        if entry is None:
            return b""
        if not entry.is_file:
            raise ImageError(f"{path} of the image is not a regular file")
        if entry.info.st_size > limit_bytes:
            raise ImageError(f"{path} of the image has more than {limit_bytes} bytes")
        return Path(entry.source).read_bytes()


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _child(folder: Entry, name: str) -> Entry | None:
    found = list(_layers_of(folder.merged, name))
    if not found:
        return None
    source, info = found[0]
    merged = tuple(path for path, _ in found) if stat.S_ISDIR(info.st_mode) else ()
    return Entry(os.path.join(folder.path, name), source, info, merged)


def _layers_of(folders: Iterable[str], name: str) -> Iterable[tuple[str, os.stat_result]]:
    """Give the first entry of that name, and where it is a folder, those that merge with it."""
    is_first = True
    for folder in folders:
        path = f"{folder}/{name}"
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            continue
        is_folder = stat.S_ISDIR(info.st_mode)
        if _is_whiteout(info) or not (is_folder or is_first):
            return
        yield path, info
        if not is_folder or is_opaque(path):
            return
        is_first = False


def _is_whiteout(info: os.stat_result) -> bool:
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def is_opaque(path: str) -> bool:
    """Tell whether an unpacked folder hides those of the layers below."""
    try:
        return os.getxattr(path, OPAQUE, follow_symlinks=False) == b"y"
    except OSError:  # not set
        return False
