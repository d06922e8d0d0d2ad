"""Bytes of any kind break no parser: what is wrong is refused by the error that is meant for it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.guest import wire
from tests.escape.parsers import PARSERS
from tests.escape.probe import Probe

pytestmark = pytest.mark.escape

PROBES = tuple(
    Probe(0, f"fuzz: {name}", "refused or read")
    for name in (*PARSERS, "frame that is JSON", "frame of one bit changed", "cell line of words")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=20,
)
BODIES = st.dictionaries(st.sampled_from(["op", "buffers", "sync", "reply", "é"]), VALUES)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=300))
def test_bytes(name: str, data: bytes) -> None:
    PARSERS[name](data)


@settings(max_examples=150, deadline=None)
@given(body=BODIES, raw=st.binary(max_size=40))
def test_a_frame_that_is_json(body: dict[str, object], raw: bytes) -> None:
    text = json.dumps(body).encode()
    data = wire.PREFIX.pack(wire.MAGIC, len(text), len(raw)) + text + raw
    PARSERS["frames"](data)
    PARSERS["packet"](text)


@settings(max_examples=150, deadline=None)
@given(
    body=st.dictionaries(st.text(max_size=9), VALUES.filter(lambda v: v == v), max_size=3),
    buffers=st.lists(st.binary(max_size=30), max_size=4),
    at=st.integers(0, 10_000),
)
def test_a_frame_of_one_bit_changed(body: dict[str, object], buffers: list[bytes], at: int) -> None:
    body.pop("buffers", None)
    data = bytearray(wire.encode(body, tuple(buffers)))
    (frame,) = wire.Decoder().feed(bytes(data))
    assert frame.buffers == tuple(buffers)
    data[at % len(data)] ^= 1 << at % 8
    PARSERS["frames"](bytes(data))


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(
        st.tuples(
            st.sampled_from(
                ["memory", "timeout", "wall_time", "cpus", "processes", "disk", "io", "x"]
            ),
            st.sampled_from(["1", "-1", "1G", "1e400", "nan", "inf", "0", "1s", "9" * 50, "∞", ""]),
        ),
        max_size=4,
    )
)
def test_a_cell_line_of_words(words: list[tuple[str, str]]) -> None:
    PARSERS["cell_line"](" ".join(f"{name}={value}" for name, value in words).encode())
