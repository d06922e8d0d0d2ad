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
from typing import NamedTuple

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux.idmap import ID_COUNT

FIRST_ID = 1 << 30
"""Far above the ids of users and of other container engines."""
RANGES = 1 << 20
"""The last range ends at 2**31, from where some programs take ids for negative."""
MAPS = ("/proc/self/uid_map", "/proc/self/gid_map")
FILE = "sandbox-kernel-ids"
FOLDERS = ("/run", "/dev/shm", "/tmp")  # noqa: S108 - the file is root's, see _open
TRIES = 1024


class Claim(NamedTuple):
    """A range that is ours as long as some process has the descriptor open."""

    first_id: int
    size: int
    fd: int


def claim(count: int = ID_COUNT) -> Claim:
    """Claim a range of `count` ids, or of fewer where root has fewer; raises HostError."""
    start_id, ranges = _ground()
    fd = _open()
    slots = min(-(-count // ID_COUNT), ranges)
    # At random, so that kernels in containers that do not share the file hardly meet either.
    start = secrets.randbelow(ranges)
    for number in (slot % (ranges - slots + 1) for slot in range(start, start + TRIES)):
        if _lock(fd, number, slots):
            return Claim(start_id + number * ID_COUNT, min(count, slots * ID_COUNT), fd)
    os.close(fd)
    raise HostError(
        f"no range of user ids is free: {TRIES} are in use from {start} on",
        hint="end some of the running kernels",
    )


def _ground() -> tuple[int, int]:
    """Give the first id that sessions may have, and how many ranges there are from it on.

    Root of a container with a user namespace has the ids that it maps, and no others; there the
    upper half of the longest run is taken, since users of the container have low ids.
    """
    runs = [_runs(path) for path in MAPS]
    if all(_holds(found, FIRST_ID, RANGES * ID_COUNT) for found in runs):
        return FIRST_ID, RANGES
    first, count = max(runs[0], key=lambda run: run[1], default=(0, 0))
    start = first + count // 2
    ranges = (count - count // 2) // ID_COUNT
    if ranges < 1 or not _holds(runs[1], start, ranges * ID_COUNT):
        raise HostError(
            f"this container's user namespace has too few ids for sessions: {MAPS[0]} says "
            f"{' and '.join(f'{size} from {at} on' for at, size in runs[0])}",
            hint="give it at least 4096 in one run, or start Jupyter as an ordinary user in it",
        )
    return start, ranges


def _runs(path: str) -> list[tuple[int, int]]:
    with open(path, encoding="ascii") as file:
        lines = [[int(field) for field in line.split()] for line in file]
    return [(inside, count) for inside, _, count in lines]


def _holds(runs: list[tuple[int, int]], first: int, count: int) -> bool:
    return any(at <= first and first + count <= at + size for at, size in runs)


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
