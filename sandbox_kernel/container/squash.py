"""Merge a chain of overlay uppers into one folder that shows the same on the same base.

Files are hard-linked, not copied: lower layers never change, an overlay copies up before it
writes. Whiteouts stay, since the image below may have the name. What a cell wrote is hostile: no
link is ever followed, and everything goes by descriptors of folders.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

OPAQUE = "user.overlay.opaque"
_OVERLAY = "user.overlay."
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def squash(layers: list[str], target: str) -> None:
    """Merge the folders `layers`, newest first, into the empty folder `target`."""
    with _opened(target) as target_fd:
        for layer in reversed(layers):
            with _opened(layer) as layer_fd:
                _apply(layer_fd, target_fd)


@contextlib.contextmanager
def _opened(path: str, dir_fd: int | None = None) -> Iterator[int]:
    fd = os.open(path, _FOLDER, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _apply(layer: int, target: int) -> None:
    """Put one layer on top of what is in `target`."""
    _copy_attributes(layer, target)
    for name in os.listdir(layer):
        info = os.stat(name, dir_fd=layer, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            _apply_folder(name, layer, target)
        else:
            _remove(name, target)
            os.link(name, name, src_dir_fd=layer, dst_dir_fd=target, follow_symlinks=False)


def _apply_folder(name: str, layer: int, target: int) -> None:
    with _opened(name, layer) as source:
        there = _kind(name, target)
        hides = _is_opaque(source) or there not in (None, stat.S_IFDIR)
        if hides and there is not None:
            _remove(name, target)
            there = None
        if there is None:
            os.mkdir(name, 0o700, dir_fd=target)
        with _opened(name, target) as copy:
            _apply(source, copy)
            if hides:
                os.setxattr(copy, OPAQUE, b"y")


def _kind(name: str, folder: int) -> int | None:
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return None


def _is_opaque(folder: int) -> bool:
    try:
        return os.getxattr(folder, OPAQUE) == b"y"
    except OSError:  # not set, or a file system without such attributes
        return False


def _remove(name: str, folder: int) -> None:
    """Remove a name and what is below it; fine if it is not there."""
    kind = _kind(name, folder)
    if kind == stat.S_IFDIR:
        with _opened(name, folder) as inside:
            for child in os.listdir(inside):
                _remove(child, inside)
        os.rmdir(name, dir_fd=folder)
    elif kind is not None:
        os.unlink(name, dir_fd=folder)


def _copy_attributes(source: int, copy: int) -> None:
    info = os.fstat(source)
    os.fchown(copy, info.st_uid, info.st_gid)
    os.fchmod(copy, stat.S_IMODE(info.st_mode))
    with contextlib.suppress(OSError):  # tmpfs has user attributes since Linux 6.6
        before, now = (
            {name for name in os.listxattr(fd) if not name.startswith(_OVERLAY)}
            for fd in (copy, source)
        )
        for name in before - now:
            os.removexattr(copy, name)
        for name in now:
            os.setxattr(copy, name, os.getxattr(source, name))
    os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))
