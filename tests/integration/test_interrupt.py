"""An interrupt stops what runs, as in any kernel; what ignores it is killed and rolled back."""

from __future__ import annotations

import asyncio

import pytest

from sandbox_kernel.model import CommMessage, Event, InputRequest, Outcome, Stream
from tests.integration.driver import GRACE_S, PAST_PRINT_S, Driver, assert_quiet

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.kernel,
]

BLOCKED = {
    "sleep": "import time; time.sleep(100)",
    "loop": "while True: pass",
    "function": "def f():\n    while True: sum(range(1000))\nf()",
    "subprocess": "import subprocess; subprocess.run(['sleep', '100'])",
    "shell": "import subprocess; subprocess.run('sleep 100; sleep 100', shell=True)",
    "popen": "import subprocess; p = subprocess.Popen(['sleep', '100']); p.wait()",
    "input": "input('? ')",
    "getpass": "import getpass; getpass.getpass()",
    "await": "import asyncio; await asyncio.sleep(100)",
    "await in a task": "import asyncio\nasync def w(): await asyncio.sleep(100)\nawait asyncio.gather(w(), w())",
    "join": "import threading\nd = threading.Event(); d.wait()",
    "queue": "import queue; queue.Queue().get()",
    "socket": "import socket; a, b = socket.socketpair(); a.recv(1)",
    "select": "import select; select.select([], [], [])",
    "pool": "import multiprocessing as mp, time\nwith mp.get_context('fork').Pool(2) as p: p.map(time.sleep, [100, 100])",
}


@pytest.mark.parametrize("code", BLOCKED.values(), ids=BLOCKED)
async def test_interrupt(box: Driver, code: str) -> None:
    await box.ok("kept = 'before'")
    ran = await box.interrupted(f"kept = 'after'; print('up')\n{code}", allow_stdin=True)
    assert ran.outcome is Outcome.INTERRUPTED, ran.said()
    assert ran.result.committed
    assert ran.result.reply["ename"] in ("KeyboardInterrupt", "CancelledError")
    assert ran.result.usage.wall_s < 1.0
    assert await box.value("kept") == "after"
    await assert_quiet(box)


async def test_a_shell_escape_of_ipython_ends(box: Driver) -> None:
    # IPython itself passes the interrupt on to the program, and goes on with the cell.
    ran = await box.interrupted("print('up')\n!sleep 100")
    assert ran.outcome.commits, ran.said()
    assert ran.result.committed, ran.said()
    assert await box.value("6 * 7") == 42


async def test_the_traceback_shows_the_line(box: Driver) -> None:
    ran = await box.interrupted("import time\nprint('up')\ntime.sleep(100)")
    assert "----> 3 time.sleep(100)" in ran.trace
    assert ran.messages("error")[0].content["ename"] == "KeyboardInterrupt"


async def test_a_caught_interrupt_is_the_cells_affair(box: Driver) -> None:
    ran = await box.interrupted(
        "import time\ntry:\n    print('up'); time.sleep(100)\nexcept KeyboardInterrupt: print('caught')"
    )
    assert ran.outcome is Outcome.OK, ran.said()
    assert ran.text().endswith("caught\n")


async def test_cleanup_runs(box: Driver) -> None:
    ran = await box.interrupted(
        "import time\ntry:\n    print('up'); time.sleep(100)\nfinally: cleaned = True"
    )
    assert ran.outcome is Outcome.INTERRUPTED
    assert await box.value("cleaned") is True


async def test_an_error_of_ones_own_is_no_interrupt(box: Driver) -> None:
    ran = await box.run("raise KeyboardInterrupt")
    assert ran.outcome is Outcome.ERROR, ran.said()


# The print may be what is interrupted: that alone must not end these cells.
UP = "try: print('up')\nexcept KeyboardInterrupt: pass\n"
DEAF = {
    "ignored": "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    + UP
    + "while True: pass",
    # Two deep: the signal comes twice, and the second may hit where the first is being swallowed.
    "swallowed": UP
    + "while True:\n    try:\n        while True:\n            try:\n                while True: sum(range(100))"
    + "\n            except KeyboardInterrupt: pass\n    except KeyboardInterrupt: pass",
    "blocked": "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, {2})\n"
    + UP
    + "while True: time.sleep(1)",
    "in C": UP + "sum(range(10 ** 12))",
    "own handler": "import signal; signal.signal(signal.SIGINT, lambda *a: None)\n"
    + UP
    + "while True: pass",
    "stopped": "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, {2})\nprint('up'); os.kill(os.getpid(), 19)",
    # Stock ipykernel cancels the task only, which takes effect when it next awaits something.
    "coroutine that never awaits": "async def spin():\n    "
    + UP.replace("\n", "\n    ")
    + "while True: pass\nawait spin()",
}


@pytest.mark.parametrize("code", DEAF.values(), ids=DEAF)
async def test_a_deaf_cell_is_killed_after_the_grace(box: Driver, code: str) -> None:
    await box.ok("kept = 'before'")
    ran = await box.interrupted("kept = 'after'\n" + code)
    assert ran.outcome is Outcome.INTERRUPTED, ran.said()
    assert not ran.result.committed
    assert GRACE_S <= ran.result.usage.wall_s < GRACE_S + 0.6
    assert await box.value("kept") == "before"


async def test_a_handler_of_the_user_is_called_once_for_each(box: Driver) -> None:
    ran = await box.interrupted(
        "import signal, time\nhits = []\nold = signal.signal(signal.SIGINT, lambda *a: hits.append(1))\n"
        "print('up')\nwhile not hits: pass\nsignal.signal(signal.SIGINT, old); print(hits)"
    )
    assert ran.outcome is Outcome.OK, ran.said()
    assert "[1]" in ran.text()


async def test_two_interrupts_are_one(box: Driver) -> None:
    def act(event: Event) -> None:
        for _ in range(5):
            box.session.interrupt()

    ran = await box.run("import time; print('up'); time.sleep(100)", on_event=act)
    assert ran.outcome in (Outcome.INTERRUPTED, Outcome.ERROR), ran.said()
    assert await box.value("6 * 7") == 42


async def test_an_interrupt_between_cells_is_nothing(box: Driver) -> None:
    for _ in range(5):
        box.session.interrupt()
        assert await box.value("6 * 7") == 42


async def test_an_interrupt_at_the_very_start_is_not_lost(box: Driver) -> None:
    await box.ok("import time; log = []")
    for n in range(40):
        task = asyncio.create_task(box.run(f"log.append({n}); time.sleep(100)"))
        while box.session._cell is None:
            await asyncio.sleep(0)
        # From the very start on: 4 ms is about what a cell takes to come to its code.
        asyncio.get_running_loop().call_later(n * 0.0001, box.session.interrupt)
        ran = await task
        assert ran.outcome is Outcome.INTERRUPTED, (n, ran.said())
        assert ran.result.committed, (n, ran.said())
        # CPython may miss the first one; the second is sent at half of the grace.
        assert ran.result.usage.wall_s < GRACE_S
        # What was interrupted before it began must not begin in the next cell.
        log = await box.value("log", timeout_s=5)
        assert log == sorted(set(log))


async def test_interrupts_at_any_moment_cost_no_state(box: Driver) -> None:
    await box.ok("total = 0")
    loop = asyncio.get_running_loop()
    for n in range(60):
        task = asyncio.create_task(box.run("for _ in range(200): total += 0\nprint('done')"))
        timer = loop.call_later(n * 0.0004, box.session.interrupt)
        ran = await task
        timer.cancel()  # or it would hit the next cell
        assert ran.outcome in (Outcome.OK, Outcome.INTERRUPTED, Outcome.ERROR), (n, ran.said())
        assert ran.result.committed, (n, ran.said())
    assert await box.value("total") == 0


async def test_input_works_after_an_interrupted_input(box: Driver) -> None:
    ran = await box.interrupted("input('first? ')", allow_stdin=True)
    assert ran.outcome is Outcome.INTERRUPTED

    def act(event: Event) -> None:
        if isinstance(event, InputRequest):
            box.session.answer("answer")

    ran = await box.run("print(input('second? '))", on_event=act, allow_stdin=True)
    assert ran.text() == "answer\n"


async def test_a_comm_handler_is_interrupted(box: Driver) -> None:
    ran = await box.run(
        "import time\nfrom comm import create_comm\nheard = []\n"
        "def hear(message):\n    heard.append(1); print('up'); time.sleep(100)\n"
        "c = create_comm(target_name='t'); c.on_msg(hear)"
    )
    comm_id = ran.messages("comm_open")[0].content["comm_id"]
    loop = asyncio.get_running_loop()

    def act(event: Event) -> None:
        if isinstance(event, Stream):
            loop.call_later(PAST_PRINT_S, box.session.interrupt)

    message = CommMessage("comm_msg", {"comm_id": comm_id, "data": {}})
    result = await asyncio.wait_for(box.session.comm(message, act), 10)
    assert result.usage.wall_s < GRACE_S
    assert result.committed
    assert await box.value("heard") == [1]
    await box.ok("c.close()")
