"""What is compressed comes out again, and no more of it than a layer may have."""

from __future__ import annotations

import bz2
import collections
import gzip
import io
import lzma
import random
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.compression import (
    Hashed,
    Inflation,
    compression_of,
    open_decompressed,
    zstd,
)
from sandbox_kernel.image.gzip_writer import GzipWriter

CONTENT = random.Random(1).randbytes(100_000) + b"text " * 50_000
MAKERS = {
    "gzip": gzip.compress,
    "zstd": zstd.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "": bytes,
}
SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"hello"


def content(data: bytes, inflation: Inflation | None = None, size: int = 4000) -> bytes:
    reader = open_decompressed(io.BytesIO(data), inflation or Inflation())
    pieces = []
    while piece := reader.read(size):
        assert len(piece) <= size
        pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.parametrize("name", MAKERS)
def test_the_first_bytes_tell_the_compression(name: str) -> None:
    data = MAKERS[name](CONTENT)
    assert compression_of(data) == name
    assert open_decompressed(io.BytesIO(data)).compression == name
    assert content(data) == CONTENT


@pytest.mark.parametrize("name", ["gzip", "zstd", "bzip2", "xz"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-3], "data is broken: it is cut off"),
        (lambda data: data[: len(data) // 2], "data is broken"),
        (lambda data: data + b"something", "data is broken: something else follows"),
        (lambda data: data[:6] + b"\xff" * 20 + data[26:], "data is broken"),
    ],
    ids=["cut at the end", "cut in the middle", "more behind", "changed"],
)
def test_broken_data_is_refused(name: str, change, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ImageError, match=f"the layer's {name} {reason}"):
        content(change(MAKERS[name](CONTENT)))


@pytest.mark.parametrize("name", ["gzip", "zstd", "bzip2", "xz"])
def test_parts_one_behind_the_other_are_one_content(name: str) -> None:
    make = MAKERS[name]
    assert content(make(b"one ") + make(b"") + make(CONTENT) + make(b" two") + bytes(700)) == (
        b"one " + CONTENT + b" two"
    )


def test_zstd_frames_that_carry_no_data_are_skipped() -> None:
    data = SKIPPABLE + zstd.compress(b"one ") + SKIPPABLE + zstd.compress(b"two") + SKIPPABLE
    assert content(data) == b"one two"


@pytest.mark.parametrize("name", ["gzip", "zstd", "bzip2", "xz"])
def test_bombs_are_refused_before_they_go_off(name: str) -> None:
    bomb = MAKERS[name](bytes(50 << 20))
    stream = io.BytesIO(bomb)
    reader = open_decompressed(stream, Inflation(ratio=100, free_bytes=1 << 20))
    pieces = iter(lambda: reader.read(1 << 16), b"")
    with pytest.raises(ImageError, match=f"the layer is a {name} bomb: [0-9]+ bytes became"):
        collections.deque(pieces, maxlen=0)


@pytest.mark.parametrize("name", MAKERS)
def test_the_whole_size_is_bounded(name: str) -> None:
    with pytest.raises(ImageError, match="the layer has more than 300000 bytes"):
        content(MAKERS[name](CONTENT), Inflation(total_bytes=300_000))


def test_zstd_windows_that_take_much_memory_are_refused() -> None:
    options = {zstd.CompressionParameter.window_log: 28}
    compressor = zstd.ZstdCompressor(options=options)
    data = compressor.compress(b"a" * 1000) + compressor.flush()
    with pytest.raises(ImageError, match="zstd data is broken"):
        content(data)


def test_errors_of_the_stream_are_not_taken_for_broken_data() -> None:
    class Gone(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell():
                raise ConnectionResetError("gone")
            return super().read(1000)

    reader = open_decompressed(Gone(gzip.compress(CONTENT)))
    reader.read(1 << 20)
    with pytest.raises(ConnectionResetError):
        reader.read(1 << 20)


def test_what_is_read_is_hashed() -> None:
    stream = Hashed(io.BytesIO(b"abc"))
    assert stream.read(2) + stream.read(2) == b"abc"
    assert stream.size_bytes == 3
    assert stream.digest == (
        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def written(pieces: list[bytes], threads: int) -> bytes:
    out = io.BytesIO()
    with GzipWriter(out, threads=threads) as writer:
        for piece in pieces:
            assert writer.write(piece) == len(piece)
    return out.getvalue()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 3_000_000), max_size=4), st.integers(1, 4))
def test_gzip_is_the_same_however_it_is_written(sizes: list[int], threads: int) -> None:
    data = random.Random(2).randbytes(100_000) * 121
    ends = sorted(sizes)
    pieces = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    once = written([b"".join(pieces)], 1)
    assert written(pieces, threads) == once
    assert gzip.decompress(once) == b"".join(pieces)


def test_gzip_says_neither_name_nor_time() -> None:
    data = written([b"text"], 1)
    assert data[:10] == b"\x1f\x8b\x08\0\0\0\0\0\0\x03"
    assert zlib.decompress(data, 31) == b"text"


def test_gzip_that_failed_has_no_end() -> None:
    out = io.BytesIO()
    writer = GzipWriter(out)
    writer.write(CONTENT)
    writer.__exit__(KeyError, KeyError(), None)
    with pytest.raises(ImageError, match="it is cut off"):
        content(out.getvalue())
