"""A new layer as a folder: files put on top of the layers below, as a container would write them.

A folder of the layers below that gets a new file appears in the new layer with the attributes it
has there, since overlayfs shows those of the topmost. Links of the layers below are resolved with
the image as root. Nothing here follows a link of the new layer.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.build.tree import Node, Tree
from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.unpack import Owners
from sandbox_kernel.image.unpack_attributes import Attributes
from sandbox_kernel.image.unpack_headers import Entry as TarEntry
from sandbox_kernel.image.unpack_lowers import copy_attributes
from sandbox_kernel.image.view import MAX_LINKS, Entry, View
from sandbox_kernel.linux.tree_names import CAPABILITY, FOLDER_FLAGS

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK_BYTES = 1 << 30
_MAX_PARTS = 1000


@dataclass(frozen=True)
class Looks:
    """Permissions, owner and time of a new file."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0


class LayerFolder:
    """Fills an empty folder; call `finish`, or leave the context, when all is in it."""

    def __init__(self, folder: Path, lowers: Sequence[Path]) -> None:
        self._view = View([*lowers, folder])
        self._below = View(list(lowers))
        owners = Owners.REAL if os.geteuid() == 0 else Owners.RECORDED
        self._is_real = owners is Owners.REAL
        self._attributes = Attributes(owners)
        self._root_fd = os.open(folder, FOLDER_FLAGS)
        # How each folder of the layer shall look in the end: as new, or as the one below it.
        self._folders: dict[str, Looks | Entry | None] = {
            "": self._below.find("/") if lowers else None
        }
        self._linked: dict[tuple[int, int], str] = {}
        self._open: tuple[str, int] | None = None
        self._shown: tuple[str, Entry | None] | None = None

    def resolve(self, path: str) -> str:
        """Give where a path leads, without links; raises BuildError. What is missing stays."""
        left = _parts(path)
        here: list[str] = []
        followed = 0
        while left:
            name = left.pop(0)
            if name == "..":
                here = here[:-1]
                continue
            entry = self._view.find("/".join((*here, name)), follow=False)
            if entry is None or not entry.is_link:
                here.append(name)
                continue
            followed += 1
            target = os.readlink(entry.source)
            left = _parts(target) + left
            if followed > MAX_LINKS or len(left) > _MAX_PARTS:
                raise BuildError(
                    f"the destination {path} leads through too many links",
                    hint="name the folder that is meant itself",
                )
            here = [] if target.startswith("/") else here
        return "/".join(here)

    def is_folder(self, path: str) -> bool:
        """Tell whether a path without links is a folder by now."""
        entry = self._there(path)
        return entry is not None and entry.is_folder

    def make_folder(self, path: str, looks: Looks) -> None:
        """Make a folder and all above it that are missing; raises BuildError."""
        parts = _parts(path)
        for length in range(1, len(parts) + 1):
            part = "/".join(parts[:length])
            entry = self._there(part)
            if entry is None:
                self._mkdir(part, looks)
            elif not entry.is_folder:
                raise _conflict(part, "a folder", entry)

    def add_folder(self, path: str, looks: Looks) -> None:
        """Copy a folder, not what is in it; one that is there stays as it is."""
        entry = self._there(path)
        if entry is None:
            self._mkdir(path, looks)
        elif not entry.is_folder:
            raise _conflict(path, "a folder", entry)

    def add(self, path: str, tree: Tree, node: Node, looks: Looks) -> None:
        """Copy a file or a link; it replaces a file or a link. Raises BuildError."""
        if not (node.is_file or node.is_link):
            kind = "a FIFO" if stat.S_ISFIFO(node.mode) else "a device or a socket"
            raise BuildError(
                f"{node.path} of {tree.title} is {kind}", hint="name it in .dockerignore"
            )
        entry = self._there(path)
        if entry is not None and entry.is_folder:
            raise _conflict(path, "a file", entry)
        folder, _, name = path.rpartition("/")
        folder_fd = self._folder_fd(folder)
        if entry is not None:
            _remove(name, folder_fd)
        attributes = self._described(tree, node, looks)
        if node.is_link:
            os.symlink(node.link, name, dir_fd=folder_fd)
            self._attributes.set_at(os.fsencode(name), folder_fd, attributes)
        elif not self._link(path, node):
            self._copy(name, folder_fd, tree.open(node), attributes)
            if node.identity is not None:
                self._linked[node.identity] = path

    def forget_links(self) -> None:
        """Begin another source: names of one file are links among each other within one only."""
        self._linked.clear()

    def finish(self) -> None:
        """Give all folders their attributes and close what is open."""
        # Last, and those below first: a mode may keep even the owner out, and writing sets times.
        for path in sorted(self._folders, reverse=True):
            fd = self._folder_fd(path)
            looks = self._folders[path]
            if isinstance(looks, Entry):
                source_fd = os.open(looks.source, FOLDER_FLAGS)
                try:
                    copy_attributes(source_fd, fd)
                finally:
                    os.close(source_fd)
            else:
                self._attributes.set_on(fd, _tar_entry(b"5", looks or Looks(0o755)))
        self.close()

    def close(self) -> None:
        """Close what is open."""
        self._forget()
        os.close(self._root_fd)

    def _there(self, path: str) -> Entry | None:
        """Give what a path without links shows by now; what one folder shows is kept at hand."""
        folder, _, name = path.rpartition("/")
        if self._shown is None or self._shown[0] != folder:
            self._shown = (folder, self._view.find(folder, follow=False))
        entry = self._shown[1]
        if entry is None or not entry.is_folder:
            return None
        return self._view.child(entry, name) if name else entry

    def _mkdir(self, path: str, looks: Looks) -> None:
        folder, _, name = path.rpartition("/")
        os.mkdir(name, 0o700, dir_fd=self._folder_fd(folder))
        self._folders[path] = looks
        self._shown = None

    def _folder_fd(self, path: str) -> int:
        """Give the layer's own folder, made if need be; it is good until the next call."""
        if not path:
            return self._root_fd
        if self._open is not None and self._open[0] == path:
            return self._open[1]
        fd, done = os.dup(self._root_fd), ""
        try:
            for name in path.split("/"):
                done = f"{done}/{name}" if done else name
                above, fd = fd, self._opened(done, name, fd)
                os.close(above)
        except BaseException:  # whatever it is, the descriptor has no owner yet
            os.close(fd)
            raise
        self._forget()
        self._open = (path, fd)
        return fd

    def _opened(self, path: str, name: str, above_fd: int) -> int:
        try:
            return os.open(name, FOLDER_FLAGS, dir_fd=above_fd)
        except FileNotFoundError:
            os.mkdir(name, 0o700, dir_fd=above_fd)
            self._folders[path] = self._below.find(path, follow=False)
            self._shown = None
            return os.open(name, FOLDER_FLAGS, dir_fd=above_fd)
        except NotADirectoryError as error:  # ENOTDIR for a link too, as both flags are given
            raise BuildError(
                f"the destination /{path} is no folder", hint="name another destination"
            ) from error

    def _forget(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
        self._open = None

    def _described(self, tree: Tree, node: Node, looks: Looks) -> TarEntry:
        entry = _tar_entry(b"2" if node.is_link else b"0", looks)
        if node.is_file and self._is_real:
            capability = tree.capability(node)
            entry.xattrs = {CAPABILITY: capability} if capability else {}
        return entry

    def _link(self, path: str, node: Node) -> bool:
        known = self._linked.get(node.identity) if node.identity else None
        if known is None:
            return False
        old_folder, _, old = known.rpartition("/")
        folder, _, name = path.rpartition("/")
        source_fd = os.dup(self._folder_fd(old_folder))
        try:
            os.link(
                old, name, src_dir_fd=source_fd, dst_dir_fd=self._folder_fd(folder),
                follow_symlinks=False,
            )  # fmt: skip
        except FileNotFoundError:  # another source has taken its place
            return False
        finally:
            os.close(source_fd)
        return True

    def _copy(self, name: str, folder_fd: int, source_fd: int, attributes: TarEntry) -> None:
        try:
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=folder_fd)
            try:
                while os.sendfile(fd, source_fd, None, _CHUNK_BYTES):
                    pass
                self._attributes.set_on(fd, attributes)
            finally:
                os.close(fd)
        finally:
            os.close(source_fd)


def _tar_entry(kind: bytes, looks: Looks) -> TarEntry:
    entry = TarEntry(b"", kind, b"")
    entry.mode, entry.uid, entry.gid = looks.mode, looks.uid, looks.gid
    entry.mtime_ns = looks.mtime_ns
    return entry


def _remove(name: str, folder_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=folder_fd)
    except FileNotFoundError:  # it is of a layer below, and hidden by the new one
        pass


def _conflict(path: str, what: str, there: Entry) -> BuildError:
    kind = "a folder" if there.is_folder else "a link" if there.is_link else "a file"
    return BuildError(
        f"{what} cannot be copied to /{path}: {kind} is there", hint="name another destination"
    )


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]
