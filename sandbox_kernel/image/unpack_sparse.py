"""Sparse files in a tar: GNU's old format and the three of PAX.

The OCI image specification discourages them, but GNU tar writes them with `--sparse`. Source:
the GNU tar manual, "Storing Sparse Files".
"""

from __future__ import annotations

import struct
from collections.abc import Callable

Region = tuple[int, int]
"""Offset and length of data, both in bytes."""
_FIELD = struct.Struct("12s12s")


def checked_map(regions: list[Region], stored: int, size: int) -> list[Region]:
    """Give the map back if it is in order and within the file; raises ValueError."""
    end = 0
    for offset, length in regions:
        if offset < end or length < 0:
            raise ValueError("the map of a sparse file is not in order")
        end = offset + length
    if end > size or sum(length for _, length in regions) != stored:
        raise ValueError("the map of a sparse file does not fit its size")
    return regions


def old_gnu_map(block: bytes, next_block: Callable[[], bytes]) -> tuple[list[Region], int]:
    """Read the map in a header of type `S` and the blocks behind it; give it with the real size.

    Raises ValueError.
    """
    regions: list[Region] = []
    _regions_into(regions, block[386:482])
    more = block[482]
    while more:
        if len(regions) > _MAX_REGIONS:
            raise ValueError("the map of a sparse file is too long")
        extension = next_block()
        _regions_into(regions, extension[:504])
        more = extension[504]
    return regions, _number(block[483:495])


_MAX_REGIONS = 100_000


def _regions_into(regions: list[Region], fields: bytes) -> None:
    for offset, length in _FIELD.iter_unpack(fields):
        if offset[0] == 0:  # the rest is unused
            return
        regions.append((_number(offset), _number(length)))


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip(b" ")
    if not text.isdigit():
        raise ValueError("the map of a sparse file has a field that is no number")
    return int(text, 8)


class PaxSparse:
    """What the records `GNU.sparse.*` of one entry say."""

    __slots__ = ("_in_data", "_offset", "_regions", "_size", "name")

    def __init__(self) -> None:
        self.name = b""
        self._size: int | None = None
        self._regions: list[Region] = []
        self._offset: int | None = None
        self._in_data = False

    def take(self, key: bytes, value: bytes, count_of: Callable[[bytes], int]) -> None:
        """Take one record, its key without the prefix; raises ValueError."""
        if key in {b"size", b"realsize"}:
            self._size = count_of(value)
        elif key == b"name":
            self.name = value
        elif key == b"major":
            self._in_data = count_of(value) == 1
        elif key == b"offset":
            self._offset = count_of(value)
        elif key == b"numbytes":
            if self._offset is None:
                raise ValueError("the map of a sparse file has a length without an offset")
            self._regions.append((self._offset, count_of(value)))
            self._offset = None
        elif key == b"map":
            fields = [count_of(field) for field in value.split(b",")]
            if len(fields) % 2:
                raise ValueError("the map of a sparse file has an odd number of fields")
            self._regions = list(zip(fields[::2], fields[1::2], strict=True))

    def told(self) -> tuple[list[Region] | None, int]:
        """Give the map, None if it stands before the data, and the real size."""
        if self._size is None:
            raise ValueError("a sparse file without its real size")
        return (None if self._in_data else self._regions), self._size


def text_map(data_block: Callable[[], bytes], limit_bytes: int) -> tuple[int, list[Region]]:
    """Read the map of format 1.0, lines of decimal numbers that fill whole blocks.

    Gives how many bytes of data it took, and the map. Raises ValueError.
    """
    text = b""
    wanted = 1
    while text.count(b"\n") < wanted:
        if len(text) >= limit_bytes:
            raise ValueError("the map of a sparse file is too long")
        text += data_block()
        if wanted == 1 and b"\n" in text:
            wanted = 1 + 2 * _decimal(text.partition(b"\n")[0])
    fields = [_decimal(line) for line in text.split(b"\n")[1:wanted]]
    return len(text), list(zip(fields[::2], fields[1::2], strict=True))


def _decimal(line: bytes) -> int:
    if not line.isdigit() or len(line) > 19:
        raise ValueError("the map of a sparse file has a line that is no number")
    return int(line)
