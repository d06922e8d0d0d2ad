"""Open files over a change of container: what is open follows the interpreter into the new root.

A descriptor that was opened in an earlier cell leads into that cell's file system, and it shares
its offset with the parked head. So every regular file and folder is opened again by its path
in the new root, with the same flags and offset, at the same number; even live SQLite and DuckDB
files then roll back exactly. Pipes, sockets and the like have no path and stay. What cannot be
followed exactly is said.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_FDS = "/proc/self/fd"
_DELETED = " (deleted)"
# These act once, at the first open. (Python's os has O_PATH only since 3.10.)
_ONCE = os.O_CREAT | os.O_EXCL | os.O_TRUNC
_O_PATH = 0o10000000
_LOCK_KINDS = (("FLOCK  ADVISORY  WRITE", fcntl.LOCK_EX), ("FLOCK  ADVISORY  READ", fcntl.LOCK_SH))


class _Open(NamedTuple):
    """An open file, as /proc shows it; `offset` in bytes, `lock` an operation of flock(2) or 0."""

    fd: int
    path: str
    flags: int
    offset: int
    lock: int
    status: os.stat_result

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY and not self.flags & _O_PATH


def places(keep: frozenset[int] = frozenset()) -> dict[int, str]:
    """Give the path of every open regular file and folder, for a later `reopen`.

    Only a process whose root is taken away under it needs this: the kernel then no longer
    knows where a file system was attached, and gives paths that begin there.
    """
    return {fd: path for fd, _ in _candidates(keep) if (path := _path(fd)) is not None}


def reopen(keep: frozenset[int] = frozenset(), known: Mapping[int, str] | None = None) -> list[str]:
    """Open all files above standard error again, by path in this root; call it after entering.

    Leaves the descriptors in `keep`. `known` has paths from `places` that go before what the
    kernel says now. Gives sentences for the user about what was not carried over exactly.
    """
    files = [_describe(fd, status, known or {}) for fd, status in _candidates(keep)]
    present = [file for file in files if file is not None]
    notes: list[str] = []
    for group in _descriptions(present):
        problem = _reopen(group)
        if problem:
            notes.append(problem)
    # Who maps a file nearly always keeps a descriptor of it that can read and write (Python's
    # mmap does), so the memory map, 1 ms and more to read, is looked at only then.
    if any(file.flags & os.O_ACCMODE == os.O_RDWR for file in present):
        notes += _shared_mappings()
    return notes


def _candidates(keep: frozenset[int]) -> list[tuple[int, os.stat_result]]:
    """Give the descriptors above 2 that are regular files or folders."""
    found = []
    for name in os.listdir(_FDS):
        fd = int(name)
        if fd <= 2 or fd in keep:
            continue
        try:
            status = os.fstat(fd)
        except OSError:  # the listing's own
            continue
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            found.append((fd, status))
    return found


def _path(fd: int) -> str | None:
    try:
        return os.readlink(f"{_FDS}/{fd}")
    except OSError:  # closed by a thread meanwhile
        return None


def _describe(fd: int, status: os.stat_result, known: Mapping[int, str]) -> _Open | None:
    path = _path(fd)
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            text = file.read().decode("utf-8", "replace")  # ascii would be imported, from here
    except OSError:
        return None
    if path is None:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    lock = next((operation for kind, operation in _LOCK_KINDS if kind in text), 0)
    if not path.endswith(_DELETED):
        path = known.get(fd, path)
    return _Open(fd, path, int(fields["flags"], 8), int(fields["pos"]), lock, status)


def _descriptions(files: Iterable[_Open]) -> list[list[_Open]]:
    """Put the descriptors together that dup(2) made of one another: they share an offset."""
    alike: dict[tuple[int, ...], list[list[_Open]]] = {}
    for file in files:
        flags = file.flags & ~os.O_CLOEXEC  # the one flag that is each descriptor's own
        key = (file.status.st_dev, file.status.st_ino, flags, file.offset)
        groups = alike.setdefault(key, [])
        for group in groups:
            if _is_shared(group[0], file):
                group.append(file)
                break
        else:
            groups.append([file])
    return [group for groups in alike.values() for group in groups]


def _is_shared(first: _Open, second: _Open) -> bool:
    """Tell whether a status flag that is set on one shows on the other.

    kcmp(2) would say so as well, but is filtered. O_NONBLOCK means nothing to a regular file.
    """
    if first.flags & _O_PATH:
        return False
    before = fcntl.fcntl(first.fd, fcntl.F_GETFL)
    fcntl.fcntl(first.fd, fcntl.F_SETFL, before ^ os.O_NONBLOCK)
    try:
        return bool((fcntl.fcntl(second.fd, fcntl.F_GETFL) ^ before) & os.O_NONBLOCK)
    finally:
        fcntl.fcntl(first.fd, fcntl.F_SETFL, before)


def _reopen(group: list[_Open]) -> str:
    """Open one file again for all its descriptors; give a sentence if that cannot be done."""
    file = group[0]
    if file.status.st_nlink == 0 or file.path.endswith(_DELETED):
        if not file.writable:
            return ""  # nobody can change it any more
        return (
            f"{_name(file)} is open and has no name any more, so what is written to it "
            "stays when a cell is rolled back."
        )
    try:
        new_fd = os.open(file.path, file.flags & ~_ONCE | os.O_CLOEXEC)
    except OSError as error:
        return _stays(file, f"{error.strerror}")
    try:
        if _differs(os.fstat(new_fd), file.status):
            return _stays(file, "another file has its name now")
        _restore(new_fd, file)
        for old in group:
            os.dup2(new_fd, old.fd, inheritable=not old.flags & os.O_CLOEXEC)
    finally:
        os.close(new_fd)
    return ""


def _differs(new: os.stat_result, old: os.stat_result) -> bool:
    # Not the inode: overlay may number a file anew when the layer below it changes.
    if stat.S_IFMT(new.st_mode) != stat.S_IFMT(old.st_mode):
        return True
    return stat.S_ISREG(old.st_mode) and new.st_size != old.st_size


def _restore(new_fd: int, file: _Open) -> None:
    if file.offset and not file.flags & _O_PATH:
        with contextlib.suppress(OSError):  # a folder whose file system has no such position
            os.lseek(new_fd, file.offset, os.SEEK_SET)
    if file.lock:
        # Nobody else can hold it: whoever shared the root before is parked or gone.
        with contextlib.suppress(OSError):
            fcntl.flock(new_fd, file.lock | fcntl.LOCK_NB)


def _stays(file: _Open, reason: str) -> str:
    return (
        f"{_name(file)} could not be opened again in the new container ({reason}); "
        "what is read or written through it belongs to the cell that opened it."
    )


def _name(file: _Open) -> str:
    path = file.path
    return path.removesuffix(_DELETED)


def _shared_mappings() -> list[str]:
    """Name the shared memory through which a write reaches the parked state as well."""
    names = set()
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.split(None, 5)
            if fields[1][1] == "w" and fields[1][3] == "s" and len(fields) == 6:
                names.add(fields[5].rstrip("\n"))
    return [
        f"{name} is mapped as shared memory: writes to it stay when a cell is rolled back."
        for name in sorted(map(_shown, names))
        if name
    ]


def _shown(path: str) -> str:
    """Give a mapping's name for the user; empty for what is no memory of theirs."""
    if path.startswith("/dev/shm/sem."):  # noqa: S108 - locks of multiprocessing
        return ""
    if path.startswith("/dev/zero"):
        return "anonymous memory"
    if path.startswith("/dev/") and not path.startswith("/dev/shm/"):  # noqa: S108 - devices
        return ""
    return path.removesuffix(_DELETED)
