"""Frames that a hostile cell forges on the link: each ends the cell, is named, and changes nothing."""

from __future__ import annotations

import resource

import pytest

from sandbox_kernel.guest import wire
from sandbox_kernel.model import Outcome
from sandbox_kernel.session import pod
from tests.escape.conftest import Open
from tests.escape.probe import Probe

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.escape,
]

WAIT = "\nwhile True: __import__('signal').pause()"
RAW = """
import json, os, struct
def send(body, raw=b""):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    data = struct.pack("!III", 0x5B0CE115, len(text), len(raw)) + text + raw
    while data: data = data[os.write(3, data):]
"""
DONE = "'op': 'done', 'reply': {'status': 'ok'}, 'threads': [], 'fragile': [], 'comms': {}"
FORGED = {
    "a length beyond the bound": (
        "os.write(3, struct.pack('!III', 0x5B0CE115, 0xFFFFFFFF, 0))",
        "a frame's JSON has 4294967295 bytes, the limit is",
    ),
    "buffers beyond the bound": (
        "os.write(3, struct.pack('!III', 0x5B0CE115, 2, 0xFFFFFFFF))",
        "a frame's buffers have 4294967295 bytes, the limit is",
    ),
    "no frame at all": ("os.write(3, b'GET / HTTP/1.1\\r\\n')", "the magic number"),
    "JSON that nests for ever": ("send(b'[' * 1_000_000)", "a frame's JSON does not parse"),
    "a number of a million digits": ("send(b'[' + b'9' * 1_000_000 + b']')", "does not parse"),
    "JSON of millions of values": ("send(b'[' + b'{},' * 16_000_000 + b'0]')", "values"),
    "a text in the place of an object": ("send('done')", "a frame's JSON is not an object"),
    "a verb that is no text": ("send({'op': ['done']})", "a cell said '', which is no verb"),
    "a verb of the kernel's": ("send({'op': 'execute', 'code': ''})", "'execute', which is no verb"),
    "a verb of another moment": ("send({'op': 'parked', 'threads': []})", "'parked', which is no"),
    "an answer that nobody asked for": ("send({'op': 'answer', 'content': {}})", "'answer', which"),
    "the end of a cell without a reply": ("send({'op': 'done'})", "done without a reply"),
    "a reply without its threads": (
        "send({'op': 'done', 'reply': {'status': 'ok'}})", "without its list of threads",
    ),
    "a reply with a status of its own": (
        "send({'op': 'done', 'reply': {'status': 'memory'}, 'threads': []})",
        "done without a reply",
    ),
    "a message to another request": (
        ("send({'op': 'message', 'msg_type': 'execute_reply', 'content': {}, 'metadata': {},"
        " 'parent_header': {'msg_id': 'x'}, 'sync': 1})"),
        "may not publish 'execute_reply'",
    ),
    "a message of status": (
        ("send({'op': 'message', 'msg_type': 'status', 'content': {'execution_state': 'dead'},"
        " 'metadata': {}, 'sync': 1})"),
        "may not publish 'status'",
    ),
    "buffers that do not add up": (
        "send({'op': 'sync', 'sync': 1, 'buffers': [5]}, b'four')", "do not add up",
    ),
    "a number that is none": ("send({'op': 'sync', 'sync': True})", "without its number"),
    "the end of another cell's child": (
        "send({'op': 'exited', 'id': '1', 'code': 1, 'status': 0})", "which child ended how",
    ),
    "a question of the wrong type": (
        "send({'op': 'input', 'prompt': 1, 'password': 0})", "an input request without a prompt",
    ),
    "another process on the link": (
        "if os.fork() == 0: send({'op': 'sync', 'sync': 1}); os._exit(0)",
        "another process spoke on the link",
    ),
}  # fmt: skip
PROBES = (
    *(Probe(0, f"frame: {name}", "cell ended and named") for name in FORGED),
    Probe(0, "frame: the end of a cell that goes on", "session goes on"),
    Probe(0, "frame: the exit of any child, a thousand times", "session goes on"),
)


@pytest.mark.parametrize(("code", "words"), FORGED.values(), ids=FORGED)
async def test_a_forged_frame_ends_the_cell(boxes: Open, code: str, words: str) -> None:
    box = await boxes()
    await box.ok("x = 1")
    ran = await box.run(f"x = 2{RAW}{code}{WAIT}")
    assert ran.outcome is Outcome.CRASHED, ran.said()
    assert words in " ".join(ran.result.notes)
    assert await box.value("x") == 1


async def test_a_cell_that_says_it_is_done_and_goes_on(
    boxes: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod, "ENTER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(pod, "FORK_TIMEOUT_S", 0.5)
    box = await boxes()
    await box.ok("x = 1")
    ran = await box.run(f"x = 2{RAW}send({{{DONE}, 'alone': True}}){WAIT}")
    # Its word is taken; but then it does not park, so it never becomes the head.
    assert ran.outcome is Outcome.OK
    ran = await box.run("print(x)")
    assert ran.text() == "1\n", ran.said()
    assert "variables are as they were before" in " ".join(ran.result.notes)


async def test_lies_about_the_exit_of_others_change_nothing(boxes: Open) -> None:
    box = await boxes()
    await box.ok("x = 1")
    lies = "for n in range(1000): send({'op': 'exited', 'id': n, 'code': 1, 'status': 0})"
    assert (await box.run(f"{RAW}{lies}\nprint('told')")).text() == "told\n"
    assert await box.value("x") == 1
    ran = await box.run("__import__('os')._exit(5)")
    assert (ran.outcome, ran.result.exit_code) == (Outcome.EXITED, 5)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def test_what_is_refused_was_not_built_in_memory() -> None:
    text = b"[" + b"{}," * (wire.MAX_JSON_BYTES // 3 - 2) + b"0]"
    before = _peak_bytes()
    decoder = wire.Decoder()
    with pytest.raises(wire.WireError, match="values"):
        list(decoder.feed(wire.PREFIX.pack(wire.MAGIC, len(text), 0) + text))
    # The bytes themselves, twice or thrice; the values would be over a gigabyte.
    assert _peak_bytes() - before < 6 * wire.MAX_JSON_BYTES
