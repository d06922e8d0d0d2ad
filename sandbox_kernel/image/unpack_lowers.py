"""Look things up in the layers below, as the overlay of them would show it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sandbox_kernel.linux.tree_names import FOLDER_FLAGS, is_opaque, is_whiteout

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Found:
    """A name in one of the layers; `folder_fd` is open as long as the look-up's context."""

    folder_fd: int
    name: bytes
    info: os.stat_result


class Lowers:
    """The layers below, each by an open folder, the lowest first."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._highest_first = tuple(reversed(fds))

    @contextlib.contextmanager
    def find(self, path: bytes) -> Iterator[Found | None]:
        """Give what the layers show at `path`, None if nothing. No link is ever followed."""
        *folders, last = path.split(b"/")
        found = None
        with contextlib.ExitStack() as stack:
            for fd in self._highest_first:
                covers, found = _look(fd, folders, last, stack)
                if found is not None or covers:
                    break
            yield found


def _look(
    fd: int, folders: list[bytes], last: bytes, stack: contextlib.ExitStack
) -> tuple[bool, Found | None]:
    """Look into one layer; tell whether it covers what lies below, and give what it has."""
    covers = False
    for name in folders:
        info = _lstat(name, fd)
        if info is None:
            return covers, None
        if not stat.S_ISDIR(info.st_mode):
            return True, None
        fd = os.open(name, FOLDER_FLAGS, dir_fd=fd)
        stack.callback(os.close, fd)
        covers = covers or is_opaque(fd)
    info = _lstat(last, fd)
    if info is None:
        return covers, None
    return True, None if is_whiteout(info) else Found(fd, last, info)


def _lstat(name: bytes, fd: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def copy_up(found: Found, name: bytes, folder_fd: int) -> None:
    """Copy a file or a link of a lower layer, attributes and all, to a new name; raises OSError."""
    info = found.info
    if stat.S_ISLNK(info.st_mode):
        os.symlink(os.readlink(found.name, dir_fd=found.folder_fd), name, dir_fd=folder_fd)
        _own(name, folder_fd, info)
        os.utime(
            name, ns=(info.st_mtime_ns, info.st_mtime_ns), dir_fd=folder_fd, follow_symlinks=False
        )
        return
    source = os.open(
        found.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
        dir_fd=found.folder_fd,
    )  # fmt: skip
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        copy = os.open(name, flags, 0o600, dir_fd=folder_fd)
        try:
            while os.sendfile(copy, source, None, _COPY_BYTES):
                pass
            copy_attributes(source, copy)
        finally:
            os.close(copy)
    finally:
        os.close(source)


def copy_attributes(source: int, copy: int) -> None:
    """Give one open file what another has: owner, mode, attributes, times; raises OSError."""
    info = os.fstat(source)
    if os.geteuid() == 0:
        os.fchown(copy, info.st_uid, info.st_gid)
    for key in os.listxattr(source):
        if os.fsencode(key) != b"user.overlay.opaque":
            os.setxattr(copy, key, os.getxattr(source, key))
    os.fchmod(copy, stat.S_IMODE(info.st_mode))
    os.utime(copy, ns=(info.st_mtime_ns, info.st_mtime_ns))


def _own(name: bytes, folder_fd: int, info: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.chown(name, info.st_uid, info.st_gid, dir_fd=folder_fd, follow_symlinks=False)
