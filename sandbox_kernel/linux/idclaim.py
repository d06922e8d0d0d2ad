"""Ranges of user ids for the sessions of root: each session has one, and no two have the same.

Range N is claimed by an OFD lock on byte N of a file that all kernels of this host open
(fcntl_locking(2)). Linux lets go of it when the last process that has the descriptor is gone, so
nothing is left behind by a kernel that is killed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux.idmap import ID_COUNT

FIRST_ID = 1 << 30
"""Far above the ids of users and of other container engines."""
RANGES = 1 << 20
"""The last range ends at 2**31, from where some programs take ids for negative."""
FILE = "sandbox-kernel-ids"
FOLDERS = ("/run", "/dev/shm", "/tmp")  # noqa: S108 - the file is root's, see _open
TRIES = 1024


def claim(count: int = ID_COUNT) -> tuple[int, int]:
    """Claim a range of `count` ids; give its first id and the descriptor that holds it.

    Raises HostError.
    """
    fd = _open()
    slots = -(-count // ID_COUNT)
    # At random, so that kernels in containers that do not share the file hardly meet either.
    start = secrets.randbelow(RANGES)
    for number in (slot % (RANGES - slots + 1) for slot in range(start, start + TRIES)):
        if _lock(fd, number, slots):
            return FIRST_ID + number * ID_COUNT, fd
    os.close(fd)
    raise HostError(
        f"no range of user ids is free: {TRIES} are in use from {start} on",
        hint="end some of the running kernels",
    )


def _open() -> int:
    """Open the file of locks, made by root and writable by root alone."""
    why = []
    for folder in FOLDERS:
        path = f"{folder}/{FILE}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            why.append(f"{path}: {error.strerror}")
            continue
        info = os.fstat(fd)
        if info.st_uid == os.geteuid() and not info.st_mode & 0o077:
            return fd
        os.close(fd)
        why.append(f"{path}: it is not root's alone")
    raise HostError(
        f"user ids of sessions cannot be claimed: {'; '.join(why)}",
        hint="make /run writable for root",
    )


def _lock(fd: int, number: int, count: int) -> bool:
    # struct flock: type, whence, start, length, pid (0 for an OFD lock).
    wanted = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, number, count, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
    except BlockingIOError:
        return False
    return True
