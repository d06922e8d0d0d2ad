"""Guests that answer for ever, speak unasked or never read: the kernel is bounded, and goes on."""

from __future__ import annotations

import pytest

from sandbox_kernel.errors import ProtocolError
from sandbox_kernel.model import InputRequest, Outcome
from sandbox_kernel.session import ahead, session
from sandbox_kernel.session.cell import PROMPT_CHARACTERS
from tests.escape.conftest import Open
from tests.escape.probe import Probe
from tests.escape.test_frames import RAW

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.escape,
]

QUESTION = {"code": "slow.", "cursor_pos": 5}
PROBES = (
    Probe(0, "completion: an object that is asked for ever", "no answer, in bounded time"),
    Probe(0, "completion: a guest that never gets ready for it", "no answer, in bounded time"),
    Probe(0, "completion: an answer that is none", "refused and named"),
    Probe(0, "link: a guest that speaks unasked", "guest ended"),
    Probe(0, "link: a guest that sends and never reads", "cell ended and named"),
    Probe(0, "link: a prompt of megabytes", "cut"),
)
SLOW = """
class Slow:
    def __dir__(self):
        while True: pass
slow = Slow(); x = 1
"""


async def test_a_completion_that_never_ends(boxes: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ASK_TIMEOUT_S", 0.3)
    box = await boxes()
    await box.ok(SLOW)
    for _ in range(2):
        with pytest.raises(ProtocolError, match=r"gave no 'answer' within 0\.3 s"):
            await box.session.ask("complete_request", QUESTION)
    assert await box.value("x") == 1


async def test_a_guest_that_never_gets_ready_for_completions(
    boxes: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ASK_TIMEOUT_S", 0.3)
    monkeypatch.setattr(ahead, "PRIME_TIMEOUT_S", 0.3)
    box = await boxes("masks")  # a session that was asked nothing yet
    await box.ok(
        SLOW
        + "from sandbox_kernel.guest.shell import Requests\n"
        + "def never(self):\n"
        + "    while True: pass\n"
        + "Requests.prime = never"
    )
    with pytest.raises(ProtocolError, match="gave no 'answer'"):
        await box.session.ask("complete_request", QUESTION)
    assert await box.value("x") == 1


async def test_an_answer_that_is_none(boxes: Open) -> None:
    box = await boxes()
    await box.ok(
        "from sandbox_kernel.guest.shell import Requests\n"
        "kept, Requests.ask = Requests.ask, lambda self, body: 'no object'; x = 1"
    )
    with pytest.raises(ProtocolError, match="an answer is no object"):
        await box.session.ask("inspect_request", QUESTION)
    await box.ok("Requests.ask = kept")
    assert await box.value("x") == 1


async def test_a_guest_that_speaks_unasked_is_ended(boxes: Open) -> None:
    box = await boxes()
    await box.ok("x = 1")
    await box.ok(
        "import os\n"
        "from sandbox_kernel.guest import enter\n"
        "from sandbox_kernel.guest.wire import encode\n"
        "kept = enter.enter\n"
        "def chatter(*args):\n"
        "    kept(*args)\n"
        "    os.write(3, encode({'op': 'ready', 'notes': []}) * 10)\n"
        "enter.enter = chatter; x = 2"
    )
    ran = await box.run("print(x)")
    assert ran.text() == "1\n", ran.said()
    assert "variables are as they were before" in " ".join(ran.result.notes)


async def test_a_guest_that_never_reads_is_ended(boxes: Open) -> None:
    box = await boxes()
    await box.ok("x = 1")
    ran = await box.run(f"{RAW}while True: send({{'op': 'sync', 'sync': 1}})")
    assert ran.outcome is Outcome.CRASHED
    assert "a guest sends and sends, and reads nothing" in ran.result.notes
    assert await box.value("x") == 1


async def test_a_prompt_is_cut(boxes: Open) -> None:
    box = await boxes()
    asked: list[str] = []
    ask = "send({'op': 'input', 'prompt': 'y' * (8 << 20), 'password': False, 'sync': 1})"
    await box.run(
        f"{RAW}{ask}\nos._exit(1)",
        on_event=lambda event: isinstance(event, InputRequest) and asked.append(event.prompt),
    )
    assert [len(prompt) for prompt in asked] == [PROMPT_CHARACTERS]
