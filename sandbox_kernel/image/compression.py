"""Compress layers, and decompress them without trust: gzip, zstd, bzip2, xz, or nothing.

What a layer is compressed with is told by its first bytes, as Docker and containerd do it: there
are registries with wrong media types, and the DiffID is checked whatever it was.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sandbox_kernel.errors import ImageError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_IN_BYTES = 1 << 16
_ZSTD_WINDOW_LOG = 27  # 128 MiB, the largest that zstd takes without being asked to
_XZ_MEMORY_BYTES = 128 << 20


class Source(Protocol):
    """What is read from; b"" is the end."""

    def read(self, size: int, /) -> bytes:
        """Give up to `size` bytes."""
        ...


@dataclass(frozen=True)
class Inflation:
    """How much may come out of a compressed layer."""

    total_bytes: int = 64 << 30
    ratio: int = 250
    """To one byte of input, counted only beyond `free_bytes`."""
    free_bytes: int = 1 << 30


class Hashed:
    """A stream that hashes and counts what is read through it."""

    def __init__(self, stream: Source) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    @property
    def digest(self) -> str:
        """The digest of what was read so far."""
        return "sha256:" + self._hash.hexdigest()

    def read(self, size: int, /) -> bytes:
        """Give up to `size` bytes."""
        data = self._stream.read(size)
        self._hash.update(data)
        self.size_bytes += len(data)
        return data


class _Unit(Protocol):
    """A decompressor of one gzip member, zstd frame or the like."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """zlib's object in the shape that those of bz2, lzma and zstd have."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max(max_length, 0))


def _zstd_unit() -> _Unit:
    return zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
    )


def _xz_unit() -> _Unit:
    return lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES)


_MAGIC: dict[bytes, tuple[str, Callable[[], _Unit]]] = {
    b"\x1f\x8b": ("gzip", _Gzip),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd_unit),
    b"BZh": ("bzip2", bz2.BZ2Decompressor),
    b"\xfd7zXZ\x00": ("xz", _xz_unit),
}
_ERRORS = (zlib.error, zstd.ZstdError, lzma.LZMAError, OSError, ValueError, EOFError)
_ZSTD_SKIPPABLE = bytes(range(0x50, 0x60))


def compression_of(start: bytes) -> str:
    """Tell by the first six bytes: `gzip`, `zstd`, `bzip2`, `xz`, or empty for none of these."""
    for magic, (name, _) in _MAGIC.items():
        if start.startswith(magic):
            return name
    if len(start) >= 4 and start[0] in _ZSTD_SKIPPABLE and start[1:4] == b"\x2a\x4d\x18":
        return "zstd"
    return ""


class Decompressed:
    """The content of a compressed stream, bounded; see `open_decompressed`."""

    def __init__(self, stream: Source, inflation: Inflation) -> None:
        self._stream = stream
        self._inflation = inflation
        self._pending = b""
        while len(self._pending) < 6 and (data := stream.read(_IN_BYTES)):
            self._pending += data
        self.compression = compression_of(self._pending)
        """`gzip`, `zstd`, `bzip2`, `xz`, or empty."""
        self._make = dict(_MAGIC.values()).get(self.compression)
        self._unit = self._make() if self._make else None
        self._in_bytes = len(self._pending)
        self._out_bytes = 0

    def read(self, size: int, /) -> bytes:
        """Give up to `size` bytes, b"" at the end; raises ImageError for what is broken."""
        if size < 1:
            raise ValueError("read what is bounded")
        if self._unit is None:
            data = self._pending[:size] or self._stream.read(size)
            self._pending = self._pending[size:]
        else:
            data = self._inflate(self._unit, size)
        self._out_bytes += len(data)
        self._check()
        return data

    def _inflate(self, unit: _Unit, size: int) -> bytes:
        while True:
            if unit.eof:
                following = self._next_unit(unit)
                if following is None:
                    return b""
                self._unit = unit = following
            data = b""
            if unit.needs_input:
                data, self._pending = self._pending or self._more(), b""
                if not data:
                    raise self._broken("it is cut off")
            try:
                out = unit.decompress(data, size)
            except _ERRORS as error:
                raise self._broken(str(error)) from None
            if out:
                return out

    def _broken(self, why: str) -> ImageError:
        return ImageError(f"the layer's {self.compression} data is broken: {why}")

    def _next_unit(self, unit: _Unit) -> _Unit | None:
        """Begin the next member or frame; None where nothing but padding follows."""
        rest = unit.unused_data
        while len(rest) < 6 and (data := self._more()):
            rest += data
        while rest.strip(b"\0") == b"":
            rest = self._more()
            if not rest:
                return None
        if compression_of(rest) != self.compression:
            raise self._broken("something else follows")
        self._pending = rest
        assert self._make is not None  # noqa: S101 - there was a unit before
        return self._make()

    def _more(self) -> bytes:
        data = self._stream.read(_IN_BYTES)
        self._in_bytes += len(data)
        return data

    def _check(self) -> None:
        limits = self._inflation
        if self._out_bytes > limits.total_bytes:
            raise ImageError(f"the layer has more than {limits.total_bytes} bytes")
        if self._unit is None or self._out_bytes <= limits.free_bytes:
            return
        if self._out_bytes > limits.ratio * self._in_bytes:
            raise ImageError(
                f"the layer is a {self.compression} bomb: {self._in_bytes} bytes became more "
                f"than {self._out_bytes}"
            )


_DEFAULT_INFLATION = Inflation()


def open_decompressed(stream: Source, inflation: Inflation = _DEFAULT_INFLATION) -> Decompressed:
    """Give a reader of what the stream holds when it is decompressed; raises ImageError."""
    return Decompressed(stream, inflation)
