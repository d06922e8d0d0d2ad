"""A session whose threads outlive their cells: the same process goes on, in a new cgroup and root."""

from __future__ import annotations

import asyncio

import pytest

from sandbox_kernel.model import Outcome
from tests.integration import leaks
from tests.integration.driver import Driver

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.kernel,
]

MIB = 1 << 20

THREAD = """
import os, threading, time
n = 0; stop = threading.Event(); x = [1]
def count():
    global n
    while not stop.wait(0.002): n += 1
t = threading.Thread(target=count, daemon=True); t.start()
"""
KILL = "import os; os.kill(os.getpid(), 9)"


async def go_resident(box: Driver) -> None:
    ran = await box.run(THREAD)
    assert ran.outcome is Outcome.OK, ran.said()
    assert not ran.result.resident


async def test_the_result_says_so(fresh: Driver) -> None:
    await go_resident(fresh)
    for _ in range(3):
        ran = await fresh.run("x.append(n)")
        assert ran.result.resident
        assert ran.outcome is Outcome.OK, ran.said()
    assert len(await fresh.value("x")) == 4


async def test_the_thread_runs_on_between_cells(fresh: Driver) -> None:
    await go_resident(fresh)
    first = await fresh.value("n")
    deadline_s = asyncio.get_running_loop().time() + 5
    while await fresh.value("n") < first + 50:
        assert asyncio.get_running_loop().time() < deadline_s
    assert await fresh.value("t.is_alive()") is True


async def test_it_is_the_same_process_with_another_container(fresh: Driver) -> None:
    await go_resident(fresh)
    runs = [
        await fresh.run(
            "import os; print(os.getpid(), os.readlink('/proc/self/ns/pid'), open('/proc/self/cgroup').read())"
        )
        for _ in range(3)
    ]
    assert len({ran.text().split()[0] for ran in runs}) == 1
    assert len({ran.result.container_id for ran in runs}) == 3


async def test_when_the_thread_ends_the_session_is_as_any_other(fresh: Driver) -> None:
    await go_resident(fresh)
    ran = await fresh.run("stop.set(); t.join()")
    assert ran.result.resident
    await fresh.ok("y = 5")
    ran = await fresh.run("print(y, n > 0)")
    assert not ran.result.resident
    assert ran.text() == "5 True\n"


# ---- transaction


async def test_memory_and_files_roll_back(fresh: Driver) -> None:
    await go_resident(fresh)
    await fresh.ok(
        "open('f', 'w').write('one'); x.append(2); w = open('w', 'w'); w.write('a'); w.flush()"
    )
    ran = await fresh.run(
        "open('f', 'w').write('two'); open('g', 'w').close(); x.append(3); w.write('b'); w.flush()\n"
        + KILL
    )
    assert (ran.outcome, ran.result.signal, ran.result.committed) == (Outcome.CRASHED, 9, False), (
        ran.said()
    )
    assert ran.result.resident
    assert await fresh.value("(x, open('f').read(), os.path.exists('g'), w.tell(), n > 0)") == (
        [1, 2],
        "one",
        False,
        1,
        True,
    )
    await fresh.ok("w.write('c'); w.close()")
    assert await fresh.value("open('w').read()") == "ac"


async def test_the_thread_is_gone_after_a_roll_back(fresh: Driver) -> None:
    await go_resident(fresh)
    await fresh.run(KILL)
    assert await fresh.value("(t.is_alive(), threading.active_count(), x)") == (False, 1, [1])
    ran = await fresh.run("t = threading.Thread(target=count, daemon=True); t.start()")
    assert ran.outcome is Outcome.OK, ran.said()
    assert (await fresh.run("1")).result.resident


@pytest.mark.parametrize(
    ("code", "limits", "outcome"),
    [
        ("b = bytearray(300 << 20)", {"memory_bytes": 128 * MIB}, Outcome.MEMORY),
        ("while True: pass", {"wall_time_s": 0.4}, Outcome.WALL_TIME),
        ("while True: pass", {"cpu_time_s": 0.4}, Outcome.CPU_TIME),
        ("import os; os._exit(3)", {}, Outcome.EXITED),
        ("import os; os.abort()", {}, Outcome.CRASHED),
        ("import os; os.system('kill -9 -1'); os.kill(os.getpid(), 9)", {}, Outcome.CRASHED),
    ],
    ids=["memory", "wall time", "cpu time", "exit", "abort", "kill all"],
)
async def test_ends(fresh: Driver, code: str, limits: dict[str, float], outcome: Outcome) -> None:
    await go_resident(fresh)
    await fresh.ok("x.append(2)")
    ran = await fresh.run("x.append(3)\n" + code, **limits)
    assert ran.outcome is outcome, ran.said()
    assert not ran.result.committed
    assert await fresh.value("x") == [1, 2]


async def test_an_exception_commits(fresh: Driver) -> None:
    await go_resident(fresh)
    ran = await fresh.run("x.append(2); 1/0")
    assert (ran.outcome, ran.result.committed) == (Outcome.ERROR, True)
    assert await fresh.value("x") == [1, 2]


async def test_interrupt(fresh: Driver) -> None:
    await go_resident(fresh)
    ran = await fresh.interrupted("x.append(2); print('up'); time.sleep(100)")
    assert (ran.outcome, ran.result.committed) == (Outcome.INTERRUPTED, True), ran.said()
    assert await fresh.value("(x, t.is_alive())") == ([1, 2], True)


async def test_a_deaf_cell_is_killed(fresh: Driver) -> None:
    await go_resident(fresh)
    ran = await fresh.interrupted(
        "x.append(2); import signal; signal.signal(2, signal.SIG_IGN); print('up')\nwhile True: pass"
    )
    assert (ran.outcome, ran.result.committed) == (Outcome.INTERRUPTED, False), ran.said()
    assert await fresh.value("x") == [1]


async def test_many_deaths(fresh: Driver) -> None:
    await go_resident(fresh)
    for n in range(4):
        ran = await fresh.run("x.append(9)\n" + KILL)
        assert ran.outcome is Outcome.CRASHED, ran.said()
        await fresh.ok("t = threading.Thread(target=count, daemon=True); t.start()")
        assert (await fresh.run("1")).result.resident, n
    assert await fresh.value("x") == [1]


# ---- limits are fresh for every cell


async def test_cpu_time_is_that_of_the_cell(fresh: Driver) -> None:
    await go_resident(fresh)
    for _ in range(4):
        ran = await fresh.run(
            "c = time.process_time()\nwhile time.process_time() - c < 0.25: pass", cpu_time_s=0.5
        )
        assert ran.outcome is Outcome.OK, ran.said()
        assert 0.2 < ran.result.usage.cpu_s < 0.5


async def test_memory_is_that_of_the_cell(fresh: Driver) -> None:
    await go_resident(fresh)
    for n in range(3):
        ran = await fresh.run(f"k{n} = bytearray(60 << 20)", memory_bytes=100 * MIB)
        assert ran.outcome is Outcome.OK, ran.said()
        assert ran.result.usage.peak_memory_bytes is not None
        assert 60 * MIB <= ran.result.usage.peak_memory_bytes < 100 * MIB


async def test_output_and_processes_and_files(fresh: Driver) -> None:
    await go_resident(fresh)
    for _ in range(2):
        ran = await fresh.run("print('x' * 3000)", output_bytes=2048)
        assert ran.text("stderr").count("output limit") == 1
        ran = await fresh.run("import subprocess; subprocess.run('true')", processes=2)
        assert ran.result.reply.get("ename") == "BlockingIOError", ran.said()
        assert await fresh.ok("_ = os.system('ulimit -n')", open_files=88) == "88\n"
    assert await fresh.ok("print('x' * 3000)") == "x" * 3000 + "\n"
    assert await fresh.ok("_ = os.system('ulimit -n')") == "1024\n"


async def test_children_do_not_outlive_the_cell(fresh: Driver) -> None:
    await go_resident(fresh)
    mark = "1357913579"
    ran = await fresh.run(
        f"import subprocess; p = subprocess.Popen(['sleep', '{mark}'], start_new_session=True)"
    )
    assert leaks.with_argument(mark) == []
    assert ran.outcome is Outcome.OK, ran.said()
    assert await fresh.value("p.wait(5) is not None") is True


# ---- output, input, questions


async def test_output_comes_in_order(fresh: Driver) -> None:
    await go_resident(fresh)
    text = await fresh.ok("for i in range(3):\n    print('p', i); _ = os.system(f'echo s {i}')")
    assert text == "".join(f"p {i}\ns {i}\n" for i in range(3))


async def test_output_of_the_thread_goes_to_the_running_cell(fresh: Driver) -> None:
    await fresh.ok(
        "import threading, time\nstop = threading.Event(); asked = threading.Event()\n"
        "def speak():\n    while not stop.is_set():\n        asked.wait(); asked.clear(); print('spoken'); said.set()\n"
        "said = threading.Event(); t = threading.Thread(target=speak, daemon=True); t.start()"
    )
    for _ in range(2):
        assert await fresh.ok("said.clear(); asked.set(); _ = said.wait(5)") == "spoken\n"


async def test_questions_leave_the_thread_alone(fresh: Driver) -> None:
    await go_resident(fresh)
    for _ in range(3):
        answer = await fresh.session.ask("complete_request", {"code": "thread", "cursor_pos": 6})
        assert "threading" in answer["matches"]
    assert await fresh.value("t.is_alive()") is True


async def test_a_thread_that_crashes_between_two_cells(fresh: Driver) -> None:
    await fresh.ok("import os, threading; x = [1]; go = threading.Event()")
    await fresh.ok(
        "x.append(2); threading.Thread(target=lambda: (go.wait(), os._exit(1)), daemon=True).start()"
    )
    ran = await fresh.run("x.append(3); threading.Timer(0.05, go.set).start()")
    assert ran.outcome is Outcome.OK, ran.said()
    resident = fresh.session._resident
    assert resident is not None
    assert await asyncio.to_thread(leaks.until, lambda: not leaks.runs(resident.child.pid), 5)
    ran = await fresh.run("print(x)")
    assert ran.outcome is Outcome.OK, ran.said()
    assert ran.text() == "[1, 2]\n"
    assert "crashed" in " ".join(ran.result.notes)


async def test_a_thread_that_floods_between_two_cells(fresh: Driver) -> None:
    await fresh.ok(
        "import os, threading\ndef flood():\n    while True: os.write(1, b'x' * 65536)\nthreading.Thread(target=flood, daemon=True).start()"
    )
    ran = await fresh.run("print('mine')", output_bytes=1 * MIB)
    assert ran.outcome is Outcome.OK, ran.said()
    ran = await fresh.run("1", output_bytes=1 * MIB)
    assert ran.outcome is Outcome.OK, ran.said()


async def test_a_thread_that_spins_between_two_cells_is_held_back(fresh: Driver) -> None:
    await fresh.ok(
        "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin, daemon=True).start()"
    )
    for _ in range(3):
        assert await fresh.value("6 * 7") == 42


async def test_deep(fresh: Driver) -> None:
    await go_resident(fresh)
    await fresh.ok("deep = 0")
    for _ in range(30):
        await fresh.ok("deep += 1; open(f'd{deep}', 'w').write('x')")
    assert await fresh.value(
        "(deep, len([f for f in os.listdir('.') if f.startswith('d')]), t.is_alive())"
    ) == (30, 30, True)
