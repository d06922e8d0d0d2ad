"""The build context: a folder of the user's, as far as .dockerignore lets it take part.

Every name is opened below the folder before it, and no link is followed by the kernel: links are
resolved here, with the context as their root, so that none leads out of it (CVE-2026-44517).
Owners and times of the files are left out: they differ from one machine to the next.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from sandbox_kernel.build.ignore import MAX_FILE_BYTES, Hits, Ignore, ignore_files
from sandbox_kernel.build.tree import Node
from sandbox_kernel.errors import BuildError
from sandbox_kernel.linux.tree_names import CAPABILITY, FOLDER_FLAGS

MAX_LINKS = 40
"""As many as Linux follows (path_resolution(7))."""
MAX_DEPTH = 256

_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ContextTree:
    """A folder as a tree; close it, or use it as a context manager."""

    title = "the build context"

    def __init__(self, folder: str | Path, ignore: Ignore | None = None) -> None:
        self.ignore = ignore or Ignore()
        self._folder = os.fspath(folder)
        self._hits: dict[str, Hits] = {}
        self._last: tuple[str, int] | None = None
        try:
            self._root_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise BuildError(
                f"the build context {self._folder} cannot be read: {error.strerror}",
                hint="name a folder that you may read",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder."""
        self._forget()
        os.close(self._root_fd)

    def find(self, path: str, *, follow: bool = True) -> Node | None:
        """Give what is at a path and takes part, None where nothing is; raises BuildError."""
        left = _parts(path)
        here: list[str] = []
        followed = 0
        node = self._stat("")
        while left:
            name = left.pop(0)
            if name == "..":
                here = here[:-1]
                node = self._stat("/".join(here))
                continue
            if node is None or not node.is_folder:
                return None
            node = self._stat("/".join((*here, name)))
            if node is None:
                return None
            if node.is_link and (follow or left):
                followed += 1
                left = _parts(node.link) + left
                if followed > MAX_LINKS or len(left) > MAX_DEPTH:
                    raise BuildError(
                        f"{path} of {self.title} leads through too many links",
                        hint="name the file that is meant itself",
                    )
                here = [] if node.link.startswith("/") else here
                node = self._stat("/".join(here))
                continue
            here.append(name)
        return node if node is None or self._takes_part(node) else None

    def children(self, folder: Node) -> Iterator[Node]:
        """Give what is in a folder and takes part, sorted by name; raises BuildError."""
        if folder.path.count("/") >= MAX_DEPTH:
            raise BuildError(
                f"{folder.path} of {self.title} is too deep", hint=f"the most is {MAX_DEPTH}"
            )
        try:
            names = sorted(os.listdir(self._folder_fd(folder.path)))
        except OSError as error:
            raise self._unreadable(folder.path, error) from error
        for name in names:
            node = self._stat(f"{folder.path}/{name}" if folder.path else name)
            if node is not None and not stat.S_ISSOCK(node.mode) and self._takes_part(node):
                yield node

    def open(self, node: Node) -> int:
        """Open a regular file; raises BuildError, also if it is another file by now."""
        folder, _, name = node.path.rpartition("/")
        try:
            fd = os.open(name, _FILE_FLAGS, dir_fd=self._folder_fd(folder))
        except OSError as error:
            raise self._unreadable(node.path, error) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BuildError(
                f"{node.path} of {self.title} changed while it was read", hint="build again"
            )
        return fd

    def capability(self, node: Node) -> bytes:
        """Give the file capability, empty where there is none."""
        fd = self.open(node)
        try:
            return os.getxattr(fd, CAPABILITY)
        except OSError:  # not set, or a file system without such attributes
            return b""
        finally:
            os.close(fd)

    def _takes_part(self, node: Node) -> bool:
        if not node.path or not self.ignore:
            return True
        if not self.ignore.decide(self._hits_of(node.path)):
            return True
        # A folder that is left out is there all the same if something in it is taken back.
        return (
            node.is_folder
            and self.ignore.takes_back_below(node.path)
            and any(True for _ in self.children(node))
        )

    def _hits_of(self, path: str) -> Hits:
        hits = self._hits.get(path)
        if hits is None:
            above = path.rpartition("/")[0]
            hits = self.ignore.hits(path, self._hits_of(above) if above else None)
            self._hits[path] = hits
        return hits

    def _stat(self, path: str) -> Node | None:
        folder, _, name = path.rpartition("/")
        try:
            fd = self._folder_fd(folder)
            info = os.stat(name, dir_fd=fd, follow_symlinks=False) if name else os.fstat(fd)
            link = os.readlink(name, dir_fd=fd) if stat.S_ISLNK(info.st_mode) else ""
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unreadable(path, error) from error
        size_bytes = info.st_size if stat.S_ISREG(info.st_mode) else 0
        return Node(path, info.st_mode, size_bytes=size_bytes, link=link)

    def _folder_fd(self, path: str) -> int:
        """Give a folder's descriptor, which is good until the next call."""
        if not path:
            return self._root_fd
        if self._last is not None and self._last[0] == path:
            return self._last[1]
        fd = self._root_fd
        try:
            for name in path.split("/"):
                above, fd = fd, os.open(name, FOLDER_FLAGS, dir_fd=fd)
                if above != self._root_fd:
                    os.close(above)
        except OSError:
            if fd != self._root_fd:
                os.close(fd)
            raise
        self._forget()
        self._last = (path, fd)
        return fd

    def _forget(self) -> None:
        if self._last is not None:
            os.close(self._last[1])
        self._last = None

    def _unreadable(self, path: str, error: OSError) -> BuildError:
        return BuildError(
            f"{path or '.'} of {self.title} cannot be read: {error.strerror}",
            hint="let it be read, or name it in .dockerignore",
        )


def read_ignore(folder: str | Path, dockerfile: str = "Dockerfile") -> Ignore:
    """Give the ignore file of a context: that of the Dockerfile if it has one; raises BuildError.

    `dockerfile` is its path, relative to the context or absolute.
    """
    own, common = ignore_files(dockerfile)
    for name in (own, common):
        path = Path(folder) / name
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            return Ignore.parse(file.read(MAX_FILE_BYTES + 1), name)
    return Ignore()


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]
