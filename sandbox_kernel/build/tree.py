"""What COPY reads from: the build context, or what the layers of a stage or an image show."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from sandbox_kernel.errors import BuildError, ImageError
from sandbox_kernel.image.view import Entry, View
from sandbox_kernel.linux.tree_names import (
    CAPABILITY,
    MODE,
    OWNER,
    recorded_mode,
    recorded_owner,
)

_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Node:
    """One file, folder or link of a tree."""

    path: str
    """Relative to the tree, without links in it; empty for the tree itself."""
    mode: int
    """As in st_mode: type and permissions."""
    uid: int = 0
    gid: int = 0
    size_bytes: int = 0
    mtime_ns: int = 0
    link: str = ""
    """Where a symbolic link leads."""
    identity: tuple[int, int] | None = None
    """The same for names of the same file, where it has several that count."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def is_folder(self) -> bool:
        """Tell whether it is a folder."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Tell whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        """Tell whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)


class Tree(Protocol):
    """Files that can be selected from; no name and no link leads out of it."""

    title: str
    """What errors call it."""

    def find(self, path: str, *, follow: bool = True) -> Node | None:
        """Give what is at a path, None where nothing is; `follow` resolves a link at its end."""
        ...

    def children(self, folder: Node) -> Iterator[Node]:
        """Give what is in a folder, sorted by name; links are not followed."""
        ...

    def open(self, node: Node) -> int:
        """Open a regular file for reading and give the descriptor; raises BuildError."""
        ...

    def capability(self, node: Node) -> bytes:
        """Give the file capability of a regular file, empty where it has none."""
        ...


class LayerTree:
    """The tree that some unpacked layers show together; they do not change."""

    def __init__(self, view: View, title: str) -> None:
        self.title = title
        self._view = view
        self._entries: dict[str, Entry] = {}

    def find(self, path: str, *, follow: bool = True) -> Node | None:
        """Give what is at a path, links resolved as in a chroot; raises ImageError for a loop."""
        entry = self._view.find(path, follow=follow)
        return None if entry is None else self._node(entry)

    def children(self, folder: Node) -> Iterator[Node]:
        """Give what a folder shows, sorted by name."""
        above = self._entry(folder)
        for name in self._view.names(above):
            child = self._view.child(above, name)
            if child is not None:
                yield self._node(child)

    def open(self, node: Node) -> int:
        """Open a regular file; raises BuildError."""
        try:
            return os.open(self._entry(node).source, _FILE_FLAGS)
        except OSError as error:
            raise BuildError(
                f"/{node.path} of {self.title} cannot be read: {error.strerror}",
                hint="let it be read in what --from names",
            ) from error

    def capability(self, node: Node) -> bytes:
        """Give the file capability, empty where there is none."""
        return _attribute(self._entry(node).source, CAPABILITY)

    def _entry(self, node: Node) -> Entry:
        entry = self._view.find(node.path, follow=False)
        if entry is None:
            raise ImageError(f"{self.title}: /{node.path} is gone")
        return entry

    def _node(self, entry: Entry) -> Node:
        info = entry.info
        mode = info.st_mode
        link = os.readlink(entry.source) if entry.is_link else ""
        uid, gid = (info.st_uid, info.st_gid) if os.geteuid() == 0 else (0, 0)
        if entry.is_file or entry.is_folder:
            # An ordinary user's layers record what he could not set.
            owner, recorded = (_attribute(entry.source, name) for name in (OWNER, MODE))
            uid, gid = recorded_owner(owner) if owner else (uid, gid)
            mode = stat.S_IFMT(mode) | (
                recorded_mode(recorded, mode & 0o7777) if recorded else mode & 0o7777
            )
        several = entry.is_file and info.st_nlink > 1
        return Node(
            entry.path.strip("/"),
            mode,
            uid,
            gid,
            info.st_size if entry.is_file else 0,
            info.st_mtime_ns,
            link,
            (info.st_dev, info.st_ino) if several else None,
        )


def _attribute(source: str, name: bytes) -> bytes:
    try:
        return os.getxattr(source, name, follow_symlinks=False)
    except OSError:  # not set, or a file system without such attributes
        return b""
