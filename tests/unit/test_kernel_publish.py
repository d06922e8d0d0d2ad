from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.kernel.publish import (
    FLUSH_EVERY_S,
    MAX_PENDING_BYTES,
    Publisher,
    StreamMerger,
    checked,
    encodable,
)
from sandbox_kernel.kernel.report import CellError
from sandbox_kernel.model import InputRequest, Json, Message, Stream


class Timer:
    def __init__(self, loop: Loop, due_s: float, call: Callable[[], None]) -> None:
        self.due_s, self.call = due_s, call
        self._loop = loop

    def cancel(self) -> None:
        if self in self._loop.timers:
            self._loop.timers.remove(self)


class Loop:
    """As much of a loop as a merger needs, with a clock that tests move."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers: list[Timer] = []

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        timer = Timer(self, self.now_s + delay_s, call)
        self.timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for timer in [t for t in self.timers if t.due_s <= self.now_s]:
            timer.cancel()
            timer.call()


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def sent() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def merger(loop: Loop, sent: list[tuple[str, str]]) -> StreamMerger:
    return StreamMerger(lambda name, text: sent.append((name, text)), loop)  # type: ignore[arg-type]


def test_first_line_goes_out_at_once_and_the_rest_together(
    merger: StreamMerger, loop: Loop, sent: list[tuple[str, str]]
) -> None:
    merger.push("stdout", "1\n")
    assert sent == [("stdout", "1\n")]
    merger.push("stdout", "2\n")
    merger.push("stdout", "3\n")
    assert len(sent) == 1
    loop.advance(FLUSH_EVERY_S)
    assert sent[1:] == [("stdout", "2\n3\n")]
    loop.advance(FLUSH_EVERY_S)
    assert loop.timers == []  # an idle stream wakes nobody
    merger.push("stdout", "4\n")
    assert sent[2:] == [("stdout", "4\n")]


def test_text_and_its_newline_are_one_message(
    merger: StreamMerger, sent: list[tuple[str, str]]
) -> None:
    merger.push("stdout", "42")
    merger.push("stdout", "\n")
    assert sent == [("stdout", "42\n")]


def test_text_without_newline_does_not_wait_long(
    merger: StreamMerger, loop: Loop, sent: list[tuple[str, str]]
) -> None:
    merger.push("stdout", "50 %")
    loop.advance(0.006)
    assert sent == [("stdout", "50 %")]


def test_another_stream_sends_the_one_before(
    merger: StreamMerger, sent: list[tuple[str, str]]
) -> None:
    for name, text in [("stdout", "a\n"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d")]:
        merger.push(name, text)
    merger.flush()
    assert sent == [("stdout", "a\n"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d")]


def test_much_text_does_not_wait(merger: StreamMerger, sent: list[tuple[str, str]]) -> None:
    merger.push("stdout", "a\n")
    merger.push("stdout", "b" * MAX_PENDING_BYTES)
    assert len(sent) == 2


@given(
    st.lists(
        st.tuples(st.sampled_from(["stdout", "stderr"]), st.text("ab\n", max_size=3), st.booleans())
    )
)
def test_nothing_is_lost_or_reordered(pieces: list[tuple[str, str, bool]]) -> None:
    loop, sent = Loop(), []
    merger = StreamMerger(lambda name, text: sent.append((name, text)), loop)  # type: ignore[arg-type]
    for name, text, pause in pieces:
        merger.push(name, text)
        if pause:
            loop.advance(FLUSH_EVERY_S)
    merger.flush()
    got = [(name, char) for name, text in sent for char in text]
    assert got == [(name, char) for name, text, _ in pieces for char in text]
    assert loop.timers == []


class Wire:
    """Take messages as zmq would: what is no UTF-8 JSON is refused."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Json]] = []

    def __call__(self, msg_type: str, content: Json, metadata: Any, buffers: Any) -> None:
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
        self.messages.append((msg_type, content))


def test_messages_stand_in_order_and_input_requests_are_no_output(loop: Loop) -> None:
    wire = Wire()
    publisher = Publisher(wire, loop)  # type: ignore[arg-type]
    publisher.take(Stream("stdout", "a"))
    publisher.take(Message("clear_output", {}))
    publisher.text("stderr", "b")
    publisher.error(CellError("E", "v", ()))
    publisher.take_output(InputRequest("?"))
    assert [m for m, _ in wire.messages] == ["stream", "clear_output", "stream", "error"]
    assert wire.messages[1][1] == {"wait": False}


def test_result_and_comms_are_noted(loop: Loop) -> None:
    wire = Wire()
    publisher = Publisher(wire, loop)  # type: ignore[arg-type]
    for comm_id in ("a", "b"):
        publisher.take(Message("comm_open", {"comm_id": comm_id, "target_name": "t"}))
    publisher.take(Message("comm_close", {"comm_id": "a"}))
    data = {"text/plain": "7"}
    publisher.take(Message("execute_result", {"data": data, "execution_count": 1}))
    assert publisher.result_text == "7"
    publisher.close_comms()
    assert wire.messages[-1] == ("comm_close", {"comm_id": "b", "data": {}})
    assert publisher.opened_comms == []


def test_what_cannot_be_sent_is_cleaned(loop: Loop) -> None:
    wire = Wire()
    publisher = Publisher(wire, loop)  # type: ignore[arg-type]
    data = {"text/plain": "\ud800", "application/json": [math.nan, {"\udfff": 1}]}
    publisher.take(Message("display_data", {"data": data}))
    ((_, content),) = wire.messages
    assert content["data"] == {
        "text/plain": "\\ud800",
        "application/json": ["nan", {"\\udfff": 1}],
    }


@pytest.mark.parametrize("msg_type", ["status", "stream", "execute_input", "input_request", ""])
def test_types_that_are_the_kernels_own_are_refused(msg_type: str) -> None:
    assert checked(Message(msg_type, {"execution_state": "idle", "name": "stdout"})) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(json_values)
def test_encodable_is_encodable_and_keeps_what_was(value: Any) -> None:
    cleaned = encodable(value)
    json.dumps(cleaned, ensure_ascii=False, allow_nan=False).encode()
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return
    assert cleaned is value


def test_depth_is_bounded() -> None:
    value: Any = "\ud800"
    for _ in range(5000):
        value = [value]
    json.dumps(encodable(value))
