"""The file operations that cgroup directories need; the seam where tests put a fake tree.

Errors are plain OSError: `cgroup_group` and `cgroup` say what they mean.
"""

from __future__ import annotations

import contextlib
import os

READ_BYTES = 16384
"""More than any file read here holds, lists of processes excepted (those are read to the end)."""


class CgroupFiles:
    """Read and write cgroup files relative to directory fds; the real file system."""

    def open_dir(self, path: str, *, dir_fd: int | None = None) -> int:
        """Open a directory; the caller closes the fd."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)

    def make_dir(self, path: str, *, dir_fd: int | None = None) -> int:
        """Make a group and open its directory; the caller closes the fd."""
        os.mkdir(path, 0o755, dir_fd=dir_fd)
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
        except OSError:
            os.rmdir(path, dir_fd=dir_fd)
            raise

    def remove_dir(self, path: str) -> None:
        """Remove a group that has neither tasks nor groups inside (else EBUSY)."""
        os.rmdir(path)

    def subdirs(self, dir_fd: int) -> list[str]:
        """Name the groups directly inside."""
        # cgroupfs counts the subdirectories in the link count, as most file systems do, and
        # fstat costs a twentieth of listing the forty files of a group.
        if os.fstat(dir_fd).st_nlink == 2:
            return []
        with os.scandir(dir_fd) as entries:
            return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))

    def open(self, dir_fd: int, name: str) -> int:
        """Open a file for reading; the caller closes the fd."""
        return os.open(name, os.O_RDONLY, dir_fd=dir_fd)

    def read(self, dir_fd: int, name: str) -> str:
        """Read a whole file."""
        fd = os.open(name, os.O_RDONLY, dir_fd=dir_fd)
        try:
            data = os.read(fd, READ_BYTES)
            if len(data) < 2048:  # a seq_file fills a page before it returns less than asked for
                return data.decode("ascii")
            chunks = [data]
            while data:
                data = os.read(fd, READ_BYTES)
                chunks.append(data)
            return b"".join(chunks).decode("ascii")
        finally:
            os.close(fd)

    def write(self, dir_fd: int, name: str, text: str) -> None:
        """Store a value by a single system call, as every cgroup file wants it."""
        fd = os.open(name, os.O_WRONLY, dir_fd=dir_fd)
        try:
            os.write(fd, text.encode("ascii"))
        finally:
            os.close(fd)

    def open_for_writing(self, dir_fd: int, name: str) -> None:
        """Raise the error that writing would meet for want of rights; write nothing."""
        os.close(os.open(name, os.O_WRONLY, dir_fd=dir_fd))

    def is_marked_delegated(self, path: str) -> bool:
        """Tell whether systemd has marked the group as delegated; only root reads `trusted`."""
        for name in ("user.delegate", "trusted.delegate"):
            with contextlib.suppress(OSError):  # not set, not supported, or not for this user
                if os.getxattr(path, name) == b"1":
                    return True
        return False

    def owner(self, path: str) -> int:
        """Give the user id that owns a group's directory."""
        return os.stat(path).st_uid

    def has(self, dir_fd: int, name: str) -> bool:
        """Tell whether this kernel offers the file."""
        try:
            os.stat(name, dir_fd=dir_fd)
        except FileNotFoundError:
            return False
        return True

    def read_optional(self, dir_fd: int, name: str) -> str | None:
        """Read a file that not every kernel has; None where it is missing."""
        try:
            return self.read(dir_fd, name)
        except FileNotFoundError:
            return None

    def write_optional(self, dir_fd: int, name: str, text: str) -> bool:
        """Write a file that not every kernel has, or lets be written; tell whether it was."""
        try:
            self.write(dir_fd, name, text)
        except OSError:
            # The name is in the contract: the caller does without, or acts on False.
            return False
        return True


def keyed(text: str, key: str) -> int:
    """Give the number behind `key` in a file of `key number` lines; 0 where it is missing."""
    for line in text.split("\n"):
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0
