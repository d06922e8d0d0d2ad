"""The frames between the kernel and a guest, and between the kernel and init.

A frame is a 12-byte prefix (`!III`: a magic number, the length of the JSON, the length of all
buffers), the JSON object, and the raw buffers one after the other; the object's key `buffers`
holds their lengths. Both ends speak it, so this module must run on Python 3.9 with nothing but
the standard library. File descriptors travel as SCM_RIGHTS beside the first byte of a frame.

What arrives is not trusted: lengths are bounded before anything is read, and only JSON objects
come out. A frame that breaks a rule raises WireError, after which the link is of no use.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

MAGIC = 0x5B0CE115
PREFIX = struct.Struct("!III")
MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_BUFFERS_BYTES = 256 * 1024 * 1024
MAX_BUFFERS = 1024
MAX_VALUES = 4_000_000
"""Of one frame's JSON: an empty object takes two bytes as text, and seventy in memory."""


class WireError(ValueError):
    """Bytes that are no frame, or one beyond the bounds."""


class Frame(NamedTuple):
    """One message: a JSON object with a string `op`, and raw buffers."""

    body: dict[str, Any]
    buffers: tuple[bytes, ...] = ()

    @property
    def op(self) -> str:
        """The verb of the frame."""
        op = self.body.get("op")
        return op if isinstance(op, str) else ""


def encode(body: dict[str, Any], buffers: tuple[bytes, ...] = ()) -> bytes:
    """Give the bytes of one frame; raises WireError if it is beyond the bounds."""
    if buffers:
        body = {**body, "buffers": [len(buffer) for buffer in buffers]}
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    size = sum(map(len, buffers))
    check_bounds(len(text), size)
    _check_values(text)
    return b"".join((PREFIX.pack(MAGIC, len(text), size), text, *buffers))


def check_bounds(json_bytes: int, buffers_bytes: int) -> None:
    """Raise WireError if a frame of these lengths may not be sent or read."""
    if json_bytes > MAX_JSON_BYTES:
        raise WireError(f"a frame's JSON has {json_bytes} bytes, the limit is {MAX_JSON_BYTES}")
    if buffers_bytes > MAX_BUFFERS_BYTES:
        raise WireError(
            f"a frame's buffers have {buffers_bytes} bytes, the limit is {MAX_BUFFERS_BYTES}"
        )


def _check_values(text: bytes) -> None:
    """Raise WireError if a frame's JSON may hold too many values to be parsed.

    What begins a value is counted wherever it stands, in a text too: a bound, not the number.
    """
    # Fewer bytes cannot hold that many.
    if len(text) > MAX_VALUES and sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise WireError(f"a frame's JSON may have over {MAX_VALUES} values, which is the limit")


class Decoder:
    """Cut a byte stream into frames; feed it what arrived, in pieces of any size."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield every frame that is now complete; raises WireError."""
        self._pending += data
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> Frame | None:
        if len(self._pending) < PREFIX.size:
            return None
        magic, json_bytes, buffers_bytes = PREFIX.unpack_from(self._pending)
        if magic != MAGIC:
            raise WireError("a frame does not begin with the magic number")
        check_bounds(json_bytes, buffers_bytes)
        end = PREFIX.size + json_bytes + buffers_bytes
        if len(self._pending) < end:
            return None
        text = bytes(self._pending[PREFIX.size : PREFIX.size + json_bytes])
        raw = bytes(self._pending[PREFIX.size + json_bytes : end])
        del self._pending[:end]
        return _parse(text, raw)


def _parse(text: bytes, raw: bytes) -> Frame:
    _check_values(text)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a frame's JSON does not parse: {error}") from None
    if not isinstance(body, dict):
        raise WireError("a frame's JSON is not an object")
    return Frame(body, _split(raw, body.pop("buffers", [])))


def _split(raw: bytes, sizes: object) -> tuple[bytes, ...]:
    if not isinstance(sizes, list) or len(sizes) > MAX_BUFFERS:
        raise WireError("a frame's list of buffers is no short list")
    if not all(type(size) is int and size >= 0 for size in sizes) or sum(sizes) != len(raw):
        raise WireError("the lengths of a frame's buffers do not add up")
    buffers, start = [], 0
    for size in sizes:
        buffers.append(raw[start : start + size])
        start += size
    return tuple(buffers)
