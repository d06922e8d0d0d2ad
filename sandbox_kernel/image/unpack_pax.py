"""What stands before an entry to say more of it: PAX records, GNU's long names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from sandbox_kernel.image.unpack_sparse import PaxSparse

XATTR = b"SCHILY.xattr."
"""Prefix of the records that carry extended attributes (OCI image-spec, layer.md)."""
_SPARSE = b"GNU.sparse."
_TIME = re.compile(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?", re.ASCII)
_COUNT = re.compile(rb"[0-9]{1,19}", re.ASCII)
_TIME_MAX_S = 1 << 33  # beyond what ext4 and XFS keep, and well within a time_t in nanoseconds


class Described(Protocol):
    """The part of an entry that records speak of."""

    name: bytes
    link: bytes
    uid: int
    gid: int
    stored: int
    size: int
    mtime_ns: int
    xattrs: dict[bytes, bytes]


def parse_records(data: bytes) -> list[tuple[bytes, bytes]]:
    """Give the records `LENGTH KEY=VALUE` of a PAX header; raises ValueError.

    A list, since PAX sparse format 0.0 gives meaning to the order of equal keys.
    """
    records = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        length = data[at:space] if space > at else b""
        if not length.isdigit():
            raise ValueError("a PAX record without a length")
        end = at + int(length)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(data) or data[end - 1] != 10 or not equals or not key:
            raise ValueError("a PAX record that is not LENGTH KEY=VALUE")
        records.append((key, value))
        at = end
    return records


def count_of(value: bytes) -> int:
    """Give a decimal number that is not negative; raises ValueError."""
    if _COUNT.fullmatch(value) is None:
        raise ValueError(f"{value[:40]!r} is no number")
    return int(value)


def time_ns_of(value: bytes) -> int:
    """Give a time in seconds, with a fraction perhaps, as nanoseconds; raises ValueError."""
    match = _TIME.fullmatch(value)
    if match is None:
        raise ValueError(f"{value[:40]!r} is no time")
    seconds = min(int(match[2]), _TIME_MAX_S)
    total_ns = seconds * 1_000_000_000 + int((match[3] or b"")[:9].ljust(9, b"0"))
    return -total_ns if match[1] else total_ns


class Extra:
    """What was said of the entry that comes next."""

    __slots__ = ("_link", "_name", "_records", "given", "sparse")

    def __init__(self) -> None:
        self.given = False
        self.sparse: PaxSparse | None = None
        self._name = b""
        self._link = b""
        self._records: dict[bytes, bytes] = {}

    def long_name(self, data: bytes) -> None:
        """Take GNU's `L`: the name of the next entry."""
        self.given = True
        self._name = data.partition(b"\0")[0]

    def long_link(self, data: bytes) -> None:
        """Take GNU's `K`: the link target of the next entry."""
        self.given = True
        self._link = data.partition(b"\0")[0]

    def records(self, records: list[tuple[bytes, bytes]]) -> None:
        """Take the records of a PAX header; raises ValueError."""
        self.given = True
        for key, value in records:
            if key.startswith(_SPARSE):
                if self.sparse is None:
                    self.sparse = PaxSparse()
                self.sparse.take(key[len(_SPARSE) :], value, count_of)
            elif value or key.startswith(XATTR):
                self._records[key] = value
            else:  # POSIX: an empty value takes back what was said before
                self._records.pop(key, None)

    def apply(self, entry: Described) -> None:
        """Put all of it into the entry; raises ValueError."""
        if not self.given:
            # A time beyond what a file system keeps would overflow utimensat(2)'s argument.
            limit_ns = _TIME_MAX_S * 1_000_000_000
            entry.mtime_ns = max(-limit_ns, min(entry.mtime_ns, limit_ns))
            return
        entry.name = self._name or entry.name
        entry.link = self._link or entry.link
        for key, value in self._records.items():
            if key.startswith(XATTR):
                entry.xattrs[key[len(XATTR) :]] = value
            elif (act := _ACTS.get(key)) is not None:
                act(entry, value)
        if self.sparse is not None and self.sparse.name:
            entry.name = self.sparse.name
        limit_ns = _TIME_MAX_S * 1_000_000_000
        entry.mtime_ns = max(-limit_ns, min(entry.mtime_ns, limit_ns))


def _path(entry: Described, value: bytes) -> None:
    entry.name = value


def _linkpath(entry: Described, value: bytes) -> None:
    entry.link = value


def _size(entry: Described, value: bytes) -> None:
    entry.size = entry.stored = count_of(value)


def _uid(entry: Described, value: bytes) -> None:
    entry.uid = count_of(value)


def _gid(entry: Described, value: bytes) -> None:
    entry.gid = count_of(value)


def _mtime(entry: Described, value: bytes) -> None:
    entry.mtime_ns = time_ns_of(value)


_ACTS: dict[bytes, Callable[[Described, bytes], None]] = {
    b"path": _path,
    b"linkpath": _linkpath,
    b"size": _size,
    b"uid": _uid,
    b"gid": _gid,
    b"mtime": _mtime,
}
