"""Device nodes in the tar of a root file system: where they are, so that they can be left out.

debootstrap and its relatives put some below /dev. In an image they are refused, as every
container makes its own, but whoever imports a root file system means the rest of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.unpack_headers import BLOCK_BYTES, number
from sandbox_kernel.image.unpack_pax import count_of, parse_records

Range = tuple[int, int]
"""First byte, and the byte behind the last."""

_EXTENSIONS = (b"x", b"L", b"K")
_DATALESS = (b"1", b"2", b"3", b"4", b"5", b"6")
_EXTENSION_BYTES = 1 << 20


def device_ranges(tar: BinaryIO) -> tuple[Range, ...]:
    """Give the bytes of all device nodes below /dev in an uncompressed tar, in order.

    Raises ImageError where it cannot be read; what comes behind a broken header is not looked at.
    """
    try:
        return tuple(_devices(tar))
    except ValueError as error:
        raise ImageError(f"the tar of the root file system cannot be read: {error}") from error


def kept(tar: BinaryIO, left_out: tuple[Range, ...], chunk_bytes: int) -> Iterator[bytes]:
    """Give the bytes of a tar without these."""
    position = 0
    for first, behind in (*left_out, (-1, -1)):
        tar.seek(position)
        while first < 0 or position < first:
            count = chunk_bytes if first < 0 else min(chunk_bytes, first - position)
            data = tar.read(count)
            if not data:
                break
            position += len(data)
            yield data
        position = behind


def _devices(tar: BinaryIO) -> Iterator[Range]:
    position, begun, name, size = 0, None, b"", None
    while True:
        tar.seek(position)
        block = tar.read(BLOCK_BYTES)
        if len(block) < BLOCK_BYTES or not block.strip(b"\0"):
            return
        kind = block[156:157]
        stated = max(number(block[124:136]), 0)
        if kind in _EXTENSIONS:
            if stated > _EXTENSION_BYTES:
                raise ImageError(f"an extended header of the tar has {stated} bytes")
            begun = position if begun is None else begun
            data = tar.read(stated)
            if kind == b"L":
                name = data.rstrip(b"\0")
            elif kind == b"x":
                records = dict(parse_records(data))
                name = records.get(b"path", name)
                size = count_of(records[b"size"]) if b"size" in records else size
            position += BLOCK_BYTES + _padded(stated)
            continue
        first = position if begun is None else begun
        position += BLOCK_BYTES
        if kind not in _DATALESS:
            position += _padded(stated if size is None else size)
        if kind in (b"3", b"4") and _is_below_dev(name or _name(block)):
            yield first, position
        begun, name, size = None, b"", None


def _name(block: bytes) -> bytes:
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if block[257:262] == b"ustar" and prefix else name


def _is_below_dev(name: bytes) -> bool:
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    return len(parts) > 1 and parts[0] == b"dev"


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
