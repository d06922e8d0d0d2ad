"""Read a tar stream: headers of ustar, GNU and PAX, and the data behind them.

Lean, since a base image has ten thousand entries, and strict, since they come from strangers:
all lengths are bounded before anything is read. Sources: POSIX.1-2017 pax, the GNU tar manual,
"Basic Tar Format".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.unpack_pax import Extra, parse_records
from sandbox_kernel.image.unpack_rules import Bounds, refused
from sandbox_kernel.image.unpack_sparse import Region, checked_map, old_gnu_map, text_map
from sandbox_kernel.linux.tree_names import MAX_ID

BLOCK_BYTES = 512
_BUFFER_BYTES = 1 << 20
# name mode uid gid size mtime checksum type linkname magic+version (owners, device) prefix
_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s8s80x155s12x")
_ZEROS = bytes(BLOCK_BYTES)
_FILES = {b"\0", b"0", b"7", b"S"}
_DATALESS = {b"1", b"2", b"3", b"4", b"5", b"6"}
_SPACES_FOR_CHECKSUM = 8 * 32


class Entry:
    """One entry of a tar, as its headers say it; nothing is checked but numbers."""

    __slots__ = (
        "gid", "kind", "link", "mode", "mtime_ns", "name", "regions", "size", "stored", "uid",
        "xattrs",
    )  # fmt: skip

    def __init__(self, name: bytes, kind: bytes, link: bytes) -> None:
        self.name = name
        self.kind = kind
        """`0` file, `1` hard link, `2` symbolic link, `3` `4` device, `5` folder, `6` FIFO."""
        self.link = link
        self.mode = self.uid = self.gid = self.mtime_ns = 0
        self.size = 0
        self.stored = 0
        """Bytes of data in the tar; `size` counts the holes of a sparse file too."""
        self.xattrs: dict[bytes, bytes] = {}
        self.regions: list[Region] | None = None


def number(field: bytes) -> int:
    """Give the number of a header field: octal text, or GNU's base-256.

    Raises ValueError for anything else.
    """
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=True)
        # The top bit is only the mark of this format, unless the number is negative.
        return value if field[0] == 0xFF else value + (1 << (8 * len(field) - 1))
    text = field.partition(b"\0")[0].strip(b" ")
    if not text:
        return 0
    if not text.isdigit():
        raise ValueError(f"{text!r} is no octal number")
    return int(text, 8)


class TarReader:
    """Iterate over the entries of a tar; between two of them `copy_data` gives the data."""

    def __init__(self, readinto: Callable[[memoryview], int], bounds: Bounds) -> None:
        self._readinto = readinto
        self._bounds = bounds
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self._received_bytes = 0
        self._data_bytes = 0
        self._padding_bytes = 0

    def __iter__(self) -> Iterator[Entry]:
        """Give one entry after the other; raises ImageError where this is no tar."""
        extra = Extra()
        while (block := self._next_block()) is not None:
            entry = self._entry(block, extra)
            if entry is not None:
                yield entry
                extra = Extra()
        if extra.given:
            raise ImageError("the layer ends behind a PAX or GNU header, before its entry")

    def copy_data(self, entry: Entry, fd: int) -> None:
        """Write what the file holds to `fd`, a new one; raises ImageError, OSError."""
        if entry.regions is None:
            self._copy(fd, entry.stored)
            return
        os.ftruncate(fd, entry.size)
        for offset, length in entry.regions:
            os.lseek(fd, offset, os.SEEK_SET)
            self._copy(fd, length)

    def drain(self) -> None:
        """Read to the end of the stream, which its hash is of, and which is bounded as well."""
        self._start = self._end
        while self._fill():
            self._start = self._end

    def _next_block(self) -> bytes | None:
        """Give the next header block; None at the end mark, or where the stream ends."""
        self._skip(self._data_bytes + self._padding_bytes)
        self._data_bytes = self._padding_bytes = 0
        if self._start == self._end and not self._fill():
            return None
        block = self._take(BLOCK_BYTES)
        return None if block == _ZEROS else block

    def _entry(self, block: bytes, extra: Extra) -> Entry | None:
        """Make the entry of this header; None if it only says more about the next one."""
        name, mode, uid, gid, size, mtime, checksum, kind, link, magic, prefix = _FIELDS.unpack(
            block
        )
        name = name.partition(b"\0")[0]
        try:
            self._check(block, number(checksum))
            if kind in _EXTENSIONS:
                self._read_extension(kind, number(size), extra)
                return None
            entry = Entry(name, kind, link.partition(b"\0")[0])
            if magic == b"ustar\00000" and prefix[0]:
                # star keeps two times behind a shorter prefix.
                prefix = prefix[:131] if block[508:] == b"tar\0" else prefix
                entry.name = prefix.partition(b"\0")[0] + b"/" + name
            entry.mode = number(mode) & 0o7777
            entry.uid, entry.gid = number(uid), number(gid)
            entry.stored = entry.size = number(size)
            entry.mtime_ns = number(mtime) * 1_000_000_000
            extra.apply(entry)
            self._settle(entry, extra, block)
        except ValueError as error:
            raise refused(name, f"its header is broken: {error}") from None
        return entry

    def _settle(self, entry: Entry, extra: Extra, block: bytes) -> None:
        """Know the type and the data; raises ValueError, ImageError."""
        kind = entry.kind
        if kind in _DATALESS:
            entry.size = entry.stored = 0
        elif kind not in _FILES:
            raise refused(entry.name, f"its type {kind!r} is unknown")
        if not (0 <= entry.uid <= MAX_ID and 0 <= entry.gid <= MAX_ID):
            raise ValueError("its owner is out of range")
        if entry.stored < 0:
            raise ValueError("its size is negative")
        self._data_bytes = entry.stored
        self._padding_bytes = -entry.stored % BLOCK_BYTES
        if kind == b"S":
            regions, entry.size = old_gnu_map(block, self._raw_block)
            entry.regions = checked_map(regions, entry.stored, entry.size)
        elif extra.sparse is not None:
            told, entry.size = extra.sparse.told()
            if told is None:
                taken, told = text_map(self._data_block, self._bounds.header_bytes)
                entry.stored -= taken
            entry.regions = checked_map(told, entry.stored, entry.size)
        if kind in _FILES:  # v7 has no type for folders
            entry.kind = b"5" if entry.name.endswith(b"/") and kind != b"S" else b"0"
        if entry.size > self._bounds.total_bytes:
            raise refused(entry.name, f"it has {entry.size} bytes", hint=self._limit())

    def _read_extension(self, kind: bytes, size: int, extra: Extra) -> None:
        if not 0 <= size <= self._bounds.header_bytes:
            raise ValueError(f"a header of {size} bytes, {self._bounds.header_bytes} at most")
        data = self._take(size)
        self._padding_bytes = -size % BLOCK_BYTES
        if kind == b"L":
            extra.long_name(data)
        elif kind == b"K":
            extra.long_link(data)
        elif kind in {b"x", b"X"}:
            extra.records(parse_records(data))
        else:
            # Docker and containerd ignore global headers too; git writes one with a comment.
            parse_records(data)

    @staticmethod
    def _check(block: bytes, said: int) -> None:
        rest = block[:148] + block[156:]
        if sum(rest) + _SPACES_FOR_CHECKSUM == said:
            return
        signed = sum(byte - 256 if byte > 127 else byte for byte in rest)
        if signed + _SPACES_FOR_CHECKSUM != said:  # some old writers counted signed bytes
            raise ValueError("its checksum is wrong, or this is no tar")

    def _raw_block(self) -> bytes:
        return self._take(BLOCK_BYTES)

    def _data_block(self) -> bytes:
        if self._data_bytes < BLOCK_BYTES:
            raise ValueError("the map of a sparse file is cut off")
        self._data_bytes -= BLOCK_BYTES
        return self._take(BLOCK_BYTES)

    def _copy(self, fd: int, count: int) -> None:
        self._data_bytes -= count
        while count:
            if self._start == self._end and not self._fill():
                raise ImageError("the layer is cut off inside a file")
            end = min(self._end, self._start + count)
            written = os.write(fd, self._buffer[self._start : end])
            self._start += written
            count -= written

    def _skip(self, count: int) -> None:
        while count:
            if self._start == self._end and not self._fill():
                raise ImageError("the layer is cut off inside an entry")
            step = min(count, self._end - self._start)
            self._start += step
            count -= step

    def _take(self, count: int) -> bytes:
        """Give exactly this many bytes, which are bounded by the caller."""
        start = self._start
        if self._end - start >= count:
            self._start = start + count
            return bytes(self._buffer[start : start + count])
        pieces = []
        while count:
            if self._start == self._end and not self._fill():
                raise ImageError("the layer is cut off inside a header")
            end = min(self._end, self._start + count)
            pieces.append(bytes(self._buffer[self._start : end]))
            count -= end - self._start
            self._start = end
        return b"".join(pieces)

    def _fill(self) -> int:
        """Read more into the empty buffer; 0 at the end of the stream."""
        self._start = 0
        self._end = self._readinto(self._buffer)
        self._received_bytes += self._end
        if self._received_bytes > self._bounds.total_bytes:
            raise ImageError("the layer is too large", hint=self._limit())
        return self._end

    def _limit(self) -> str:
        return f"a layer may have {self._bounds.total_bytes} bytes"


_EXTENSIONS = {b"L", b"K", b"x", b"X", b"g"}
