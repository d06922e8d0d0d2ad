"""Copy of a layer what belongs to others than root, with the owners that it records.

What comes out lies above the layer in an overlay: files hide the layer's own; folders merge with
them and give them their attributes, so that whiteouts and opaque folders of the layer count on.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from sandbox_kernel.errors import ImageError
from sandbox_kernel.linux.tree_names import (
    FOLDER_FLAGS,
    MODE,
    OPAQUE,
    OWNER,
    recorded_mode,
    recorded_owner,
)

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK_BYTES = 1 << 30
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

HasId = Callable[[int, int], bool]
"""Tells whether a user and a group can be given to files here."""


@dataclass
class Counted:
    """What was copied: files and folders with their owners, and the bytes that the files hold."""

    entries: int = 0
    size_bytes: int = 0


def copy_owned(source_fd: int, target_fd: int, has_id: HasId) -> Counted:
    """Copy from one open folder to an empty other one; changes the working folder to the first.

    What belongs to an id that is not here is left out, and keeps its record in the layer. Raises
    OSError, ImageError for a record that is none.
    """
    os.fchdir(source_fd)
    copier = _Copier(target_fd, has_id)
    copier.walk()
    copier.settle()
    return copier.counted


class _Copier:
    def __init__(self, target_fd: int, has_id: HasId) -> None:
        self._target_fd = target_fd
        self._has_id = has_id
        self._known: dict[tuple[int, int], bool] = {}
        self._folders: set[bytes] = set()
        """Those that were made; attributes come last, since writing into them sets times."""
        self._linked: dict[tuple[int, int], bytes] = {}
        self.counted = Counted()

    def walk(self) -> None:
        """Copy files and make folders."""
        waiting = [b"."]
        if self._owner(b".") is not None:
            self._make_folder(b".")
        while waiting:
            folder = waiting.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = entry.path if folder != b"." else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                        if self._owner(path) is not None:
                            self._make_folder(path)
                            self.counted.entries += 1
                    elif entry.is_file(follow_symlinks=False) and self._owner(path) is not None:
                        self._copy(path, entry.stat(follow_symlinks=False))
                        self.counted.entries += 1

    def settle(self) -> None:
        """Give the folders their attributes."""
        for path in self._folders:
            source = os.open(path, FOLDER_FLAGS)
            try:
                target = os.open(path, FOLDER_FLAGS, dir_fd=self._target_fd)
                try:
                    self._describe(source, target, self._owner(path))
                finally:
                    os.close(target)
            finally:
                os.close(source)

    def _owner(self, path: bytes) -> tuple[int, int] | None:
        """Give the recorded owner of a file or folder, None for root, none, or an id not here."""
        value = _attribute(path, OWNER)
        if not value:
            return None
        try:
            owner = recorded_owner(value)
        except ValueError as error:
            raise ImageError(f"the recorded owner of {path!a} {error}") from None
        if owner not in self._known:
            self._known[owner] = owner != (0, 0) and self._has_id(*owner)
        return owner if self._known[owner] else None

    def _make_folder(self, path: bytes) -> None:
        """Make a folder and those above it."""
        missing = []
        while path not in self._folders:
            missing.append(path)
            self._folders.add(path)
            if path == b".":
                break
            path = path.rpartition(b"/")[0] or b"."
        for one in reversed(missing):
            if one != b".":
                os.mkdir(one, 0o700, dir_fd=self._target_fd)

    def _copy(self, path: bytes, info: os.stat_result) -> None:
        self._make_folder(path.rpartition(b"/")[0] or b".")
        key = (info.st_dev, info.st_ino)
        if (first := self._linked.get(key)) is not None:
            os.link(first, path, src_dir_fd=self._target_fd, dst_dir_fd=self._target_fd)
            return
        if info.st_nlink > 1:
            self._linked[key] = path
        source = os.open(path, _FILE_FLAGS)
        try:
            target = os.open(path, _NEW_FILE, 0o600, dir_fd=self._target_fd)
            try:
                self.counted.size_bytes += info.st_size
                _copy_data(source, target, info.st_size)
                self._describe(source, target, self._owner(path))
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _describe(self, source: int, target: int, owner: tuple[int, int] | None) -> None:
        """Give a copy its owner, its attributes, its mode and its times."""
        info = os.fstat(source)
        mode = stat.S_IMODE(info.st_mode)
        left_out = {OPAQUE}  # or it would hide what the layer itself has in the folder
        if owner is not None:
            os.fchown(target, *owner)
            mode = recorded_mode(_attribute(source, MODE), mode)
            left_out |= {OWNER, MODE}
        for key in map(os.fsencode, os.listxattr(source)):
            if key.startswith(b"user.") and key not in left_out:
                os.setxattr(target, key, os.getxattr(source, key))
        # After chown(2), which takes set-id bits away.
        os.fchmod(target, mode)
        os.utime(target, ns=(info.st_mtime_ns, info.st_mtime_ns))


def _attribute(file: bytes | int, name: bytes) -> bytes:
    try:
        return os.getxattr(file, name)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return b""


def _copy_data(source: int, target: int, size_bytes: int) -> None:
    """Copy a file; holes stay holes, and where the file system can it shares the data."""
    os.ftruncate(target, size_bytes)
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        at = os.lseek(source, start, os.SEEK_HOLE)
        _copy_range(source, target, start, at)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        count = min(end - start, _CHUNK_BYTES)
        try:
            copied = os.copy_file_range(source, target, count, start, start)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            os.lseek(target, start, os.SEEK_SET)
            copied = os.sendfile(target, source, start, count)
        if copied == 0:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        start += copied
