"""Every limit holds, and its breach has a name or is an error that the program sees."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.errors import ConfigError, HostError
from sandbox_kernel.linux.cgroup import CgroupTree
from sandbox_kernel.model import Outcome, Stream
from tests.conftest import capabilities
from tests.integration import leaks
from tests.integration.driver import (
    DEFAULTS,
    GRACE_S,
    Driver,
    Ran,
    Shared,
    assert_quiet,
    start,
    stop,
)

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp", "memory", "cpus", "processes"),
    pytest.mark.kernel,
]

MIB = 1 << 20

# ---- memory

HOGS = {
    "list": "l = []\nwhile True: l.append(bytearray(MIB * 4))",
    "at once": "b = bytearray(MIB * 400)",
    "numpy": "import numpy as np; a = np.ones(MIB * 60)",
    "numpy, rewritten": "import numpy as np; a = np.zeros(MIB * 60); a += 1",
    "subprocess": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'x = bytearray(400 << 20)'])",
    "shell": "import os; os.system('head -c 400M /dev/zero | tail -c 399M > /dev/null')",
    "fork": "import os\nif os.fork() == 0: b = bytearray(MIB * 400); os._exit(0)\nos.wait()",
    "thread": "import threading\nt = threading.Thread(target=lambda: bytearray(MIB * 400)); t.start(); t.join()",
    "map": "import mmap; m = mmap.mmap(-1, MIB * 400); m.write(bytes(1) * (MIB * 390))",
}


@pytest.mark.parametrize("code", HOGS.values(), ids=HOGS)
async def test_memory(box: Driver, code: str) -> None:
    await box.ok("MIB = 1 << 20; calm = 1")
    ran = await box.run("calm = 2\n" + code, memory_bytes=128 * MIB)
    assert ran.outcome is Outcome.MEMORY, ran.said()
    assert not ran.result.committed
    peak = ran.result.usage.peak_memory_bytes
    assert peak is not None
    assert 100 * MIB < peak <= 129 * MIB
    assert await box.value("calm") == 1


async def test_memory_within_the_limit_is_left_alone(box: Driver) -> None:
    ran = await box.run("b = bytearray(100 << 20); del b", memory_bytes=200 * MIB)
    assert ran.outcome is Outcome.OK, ran.said()
    assert ran.result.usage.peak_memory_bytes is not None
    assert 100 * MIB <= ran.result.usage.peak_memory_bytes < 130 * MIB


async def test_a_small_limit_holds_for_one_cell(box: Driver) -> None:
    assert (
        await box.run("b = bytearray(100 << 20)", memory_bytes=32 * MIB)
    ).outcome is Outcome.MEMORY
    assert (await box.run("b = bytearray(100 << 20); del b")).outcome is Outcome.OK


async def test_memory_of_earlier_cells_does_not_count(box: Driver) -> None:
    for n in range(3):
        ran = await box.run(f"kept{n} = bytearray(60 << 20)", memory_bytes=100 * MIB)
        assert ran.outcome is Outcome.OK, ran.said()
    assert await box.value("len(kept0) + len(kept1) + len(kept2)") == 180 * MIB
    await box.ok("del kept0, kept1, kept2")


async def test_the_ceiling_holds_again_and_again(fresh: Driver) -> None:
    await fresh.ok("kept = bytearray(600 << 20)")
    for _ in range(2):
        ran = await fresh.run("more = bytearray(1100 << 20)")
        assert ran.outcome is Outcome.MEMORY, ran.said()
    assert await fresh.value("len(kept)") == 600 * MIB


# ---- processor


async def test_cpus(box: Driver) -> None:
    ran = await box.run(
        "import multiprocessing as mp, time\ndef spin(s):\n    end = time.monotonic() + s\n    while time.monotonic() < end: pass\n"
        "with mp.get_context('fork').Pool(2) as p: p.map(spin, [1.0, 1.0], chunksize=1)",
        cpus=0.5,
    )
    assert ran.outcome is Outcome.OK, ran.said()
    usage = ran.result.usage
    assert 0.2 * usage.wall_s < usage.cpu_s < 0.75 * usage.wall_s, usage


SPINS = {
    "loop": "while True: pass",
    "subprocess": "import subprocess; subprocess.run(['sh', '-c', 'while :; do :; done'])",
    "two processes": "import os\nos.fork()\nwhile True: pass",
    "thread": "import threading\nt = threading.Thread(target=lambda: sum(iter(int, 1))); t.start(); t.join()",
}


@pytest.mark.parametrize("code", SPINS.values(), ids=SPINS)
async def test_cpu_time(box: Driver, code: str) -> None:
    ran = await box.run(code, cpu_time_s=0.4)
    assert ran.outcome is Outcome.CPU_TIME, ran.said()
    assert not ran.result.committed
    # It may run on through the grace, on two processors.
    assert 0.35 < ran.result.usage.cpu_s < 0.4 + 2 * GRACE_S + 0.5


async def test_cpu_time_shows_the_line(box: Driver) -> None:
    ran = await box.run("def spin():\n    while True:\n        x = 1 + 1\nspin()", cpu_time_s=0.3)
    assert ran.outcome is Outcome.CPU_TIME
    assert "in spin()" in ran.trace
    assert "KeyboardInterrupt" in ran.trace


async def test_cpu_time_is_that_of_one_cell(box: Driver) -> None:
    spin = "import time\nt = time.process_time()\nwhile time.process_time() - t < 0.25: pass"
    for _ in range(4):
        ran = await box.run(spin, cpu_time_s=0.5)
        assert ran.outcome is Outcome.OK, ran.said()
        assert 0.2 < ran.result.usage.cpu_s < 0.5


async def test_sleep_takes_no_cpu_time(box: Driver) -> None:
    ran = await box.run("import time; time.sleep(0.5)", cpu_time_s=0.3)
    assert ran.outcome is Outcome.OK
    assert ran.result.usage.cpu_s < 0.3


# ---- the clock


async def test_wall_time_shows_the_line(box: Driver) -> None:
    ran = await box.run(
        "import time\ndef wait_long():\n    time.sleep(60)\nwait_long()", wall_time_s=0.4
    )
    assert ran.outcome is Outcome.WALL_TIME, ran.said()
    assert not ran.result.committed
    assert "----> 3     time.sleep(60)" in ran.trace
    assert ran.messages("error") == []  # the kernel words it
    assert 0.4 <= ran.result.usage.wall_s < 1.0


@pytest.mark.parametrize(
    "code",
    [
        "await asyncio.sleep(60)",
        "__import__('subprocess').run(['sleep', '60'])",
        "__import__('threading').Event().wait()",
    ],
    ids=["await", "subprocess", "event"],
)
async def test_wall_time_interrupts_whatever_waits(box: Driver, code: str) -> None:
    ran = await box.run("import asyncio\n" + code, wall_time_s=0.4)
    assert ran.outcome is Outcome.WALL_TIME, ran.said()
    assert 0.4 <= ran.result.usage.wall_s < 1.2
    assert ran.trace


async def test_wall_time_while_waiting_for_input(box: Driver) -> None:
    ran = await box.run("input('never answered')", wall_time_s=0.4, allow_stdin=True)
    assert ran.outcome is Outcome.WALL_TIME, ran.said()


async def test_a_cell_that_ignores_the_limit_is_killed_after_the_grace(box: Driver) -> None:
    ran = await box.run(
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
        wall_time_s=0.4,
    )
    assert ran.outcome is Outcome.WALL_TIME
    assert 0.4 + GRACE_S <= ran.result.usage.wall_s < 0.4 + GRACE_S + 0.6


async def test_a_cell_that_swallows_the_interrupt_and_ends_is_over_the_limit_all_the_same(
    box: Driver,
) -> None:
    await box.ok("swallowed = 0")
    ran = await box.run(
        "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: swallowed = 1", wall_time_s=0.3
    )
    assert ran.outcome is Outcome.WALL_TIME
    assert await box.value("swallowed") == 0


# ---- processes

FORK_BOMB = """
import os, errno
children = []
try:
    while len(children) < 500:
        pid = os.fork()
        if pid == 0:
            while True: os.read(r, 1)
        children.append(pid)
except BlockingIOError as e:
    print(errno.errorcode[e.errno], len(children))
"""


async def test_a_fork_bomb_sees_the_limit(box: Driver) -> None:
    await box.ok("import os; r, w = os.pipe()")
    ran = await box.run(FORK_BOMB, processes=20)
    assert ran.outcome is Outcome.OK, ran.said()
    name, number = ran.text().split()
    assert (name, int(number)) == ("EAGAIN", 19)
    if ran.result.usage.peak_processes is not None:
        assert ran.result.usage.peak_processes == 20
    await assert_quiet(box)


async def test_threads_count(box: Driver) -> None:
    ran = await box.run(
        "import threading\nstop = threading.Event(); ts = []\ntry:\n"
        "    while len(ts) < 500:\n        t = threading.Thread(target=stop.wait); t.start(); ts.append(t)\n"
        "except RuntimeError as e: print(len(ts), e)\nstop.set(); [t.join() for t in ts]; del ts, t",
        processes=20,
    )
    assert ran.outcome is Outcome.OK, ran.said()
    assert ran.text().split(maxsplit=1) == ["19", "can't start new thread\n"]


async def test_subprocess_sees_the_limit(box: Driver) -> None:
    ran = await box.run("import subprocess\nsubprocess.run('true')", processes=1)
    assert ran.outcome is Outcome.ERROR
    assert ran.result.reply["ename"] == "BlockingIOError"
    assert str(errno.EAGAIN) in ran.result.reply["evalue"]


async def test_the_shells_fork_bomb(box: Driver) -> None:
    ran = await box.run(
        "import subprocess; subprocess.run(['bash', '-c', ':(){ :|:& };:; sleep 60'])",
        processes=64,
        wall_time_s=1.5,
        output_bytes=1 << 16,
    )
    assert ran.outcome in (Outcome.WALL_TIME, Outcome.OK), ran.said()
    assert await box.value("6 * 7") == 42
    await assert_quiet(box)


async def test_a_python_bomb_that_spreads(box: Driver) -> None:
    ran = await box.run(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        processes=64,
        wall_time_s=1,
    )
    assert ran.outcome in (Outcome.WALL_TIME, Outcome.CPU_TIME), ran.said()
    assert not ran.result.committed
    assert await box.value("6 * 7") == 42
    await assert_quiet(box)


# ---- disk


@pytest.mark.parametrize("place", ["/workspace", "/tmp", "/home/jovyan", "/dev/shm"])
async def test_disk(fresh: Driver, place: str) -> None:
    code = f"f = open('{place}/big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20)); f.flush()"
    ran = await fresh.run(code, disk_bytes=32 * MIB)
    assert ran.outcome is Outcome.ERROR, ran.said()
    assert ran.result.reply["ename"] == "OSError"
    assert f"[Errno {errno.ENOSPC}]" in ran.result.reply["evalue"]
    assert 25 * MIB < ran.result.usage.disk_bytes <= 32 * MIB
    ran = await fresh.run(
        f"f.close(); open('{place}/more', 'wb').write(bytes(1 << 20))", disk_bytes=32 * MIB
    )
    assert ran.outcome is Outcome.ERROR
    await fresh.ok(f"import os; os.remove('{place}/big')")
    await fresh.ok(f"open('{place}/more', 'wb').write(bytes(8 << 20))")


async def test_a_disk_limit_below_what_is_in_use(fresh: Driver) -> None:
    await fresh.ok("open('/tmp/big', 'wb').write(bytes(32 << 20))")
    with pytest.raises(ConfigError, match="disk"):
        await fresh.run("1", disk_bytes=16 * MIB)
    fresh.broken = False  # it was refused before it began
    assert await fresh.value("6 * 7") == 42


async def test_files_of_a_killed_cell_take_no_room(box: Driver) -> None:
    for _ in range(5):
        ran = await box.run("import os; open('/tmp/x', 'wb').write(bytes(200 << 20)); os._exit(1)")
        assert ran.outcome is Outcome.EXITED, ran.said()


# ---- open files


async def test_open_files(box: Driver) -> None:
    ran = await box.run("fs = []\nwhile True: fs.append(open('/dev/null'))", open_files=64)
    assert ran.outcome is Outcome.ERROR, ran.said()
    assert f"[Errno {errno.EMFILE}]" in ran.result.reply["evalue"]
    assert 30 < await box.value("len(fs)", open_files=64) <= 64
    await box.ok(
        "fs += [open('/dev/null') for _ in range(200)]; [f.close() for f in fs]; fs.clear()"
    )


async def test_open_files_of_a_program(box: Driver) -> None:
    assert await box.ok("import os; _ = os.system('ulimit -n')", open_files=77) == "77\n"
    assert await box.ok("_ = os.system('ulimit -n')") == f"{box.limits.open_files}\n"


async def test_open_files_cannot_be_raised_above_the_ceiling(box: Driver) -> None:
    ran = await box.run("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))")
    assert ran.outcome is Outcome.ERROR


# ---- disk traffic

BIG_MIB = 24
UNIT = f"""
import mmap, os
data = mmap.mmap(-1, {MIB})
def read(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    while os.readv(fd, [data]): print(end=".")
def write(path):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    for _ in range({BIG_MIB}):
        os.write(fd, data)
        os.fsync(fd)
        print(end=".")
"""
is_v2 = CgroupTree.detect().layout == "v2"


@asynccontextmanager
async def slow(
    shared: Shared, folder: Path, mib_per_s: int, **changes: Any
) -> AsyncIterator[Driver]:
    """Give a session whose cells may read and write so much; `folder` has a file of 24 MiB."""
    await shared.end()  # what it builds ahead would look like a leak
    (folder / "big").write_bytes(bytes(BIG_MIB * MIB))
    before = leaks.Snapshot()
    limits = replace(DEFAULTS, io_bytes_per_s=mib_per_s * MIB)
    driver = await start(folder, limits, **changes)
    try:
        yield driver
        await assert_quiet(driver)
    finally:
        await stop(driver)
    before.assert_clean()


def bounds(driver: Driver) -> dict[str, str]:
    """Give the limits of disk traffic of all groups in the session, as their files say."""
    names = ("io.max", "blkio.throttle.read_bps_device")
    found = {}
    for path in driver.cgroups:
        for name in names:
            for file in Path(path).glob(f"*/{name}"):
                found[file.parent.name] = file.read_text().strip()
    return found


def traffic(driver: Driver, kind: str) -> float:
    """Give the MiB that the busiest cell has read (`r`) or written (`w`), as its group counts."""
    found = []
    for path in map(Path, driver.cgroups):
        for file in path.glob("cell-*/io.stat"):
            words = file.read_text().split()
            found.append(sum(int(w[7:]) for w in words if w.startswith(f"{kind}bytes=")))
        for file in path.glob("cell-*/blkio.throttle.io_service_bytes"):
            lines = map(str.split, file.read_text().splitlines())
            name = {"r": "Read", "w": "Write"}[kind]
            found.append(sum(int(line[2]) for line in lines if line[1] == name))
    return max(found) / MIB


async def watched(driver: Driver, kind: str, code: str, **limits: Any) -> tuple[Ran, float]:
    """Run a cell; give also the MiB that it had read or written when it printed last."""
    seen_mib = 0.0

    def look(_: object) -> None:
        nonlocal seen_mib
        seen_mib = max(seen_mib, traffic(driver, kind))

    return await driver.run(code, on_event=look, **limits), seen_mib


@pytest.mark.needs("io")
async def test_reads_are_slowed_down(shared: Shared, tmp_path: Path) -> None:
    async with slow(shared, tmp_path, 1000) as box:
        await box.ok(UNIT)
        ran, read_mib = await watched(box, "r", "read('/workspace/big')")
        assert ran.text() == "." * BIG_MIB
        assert read_mib > BIG_MIB - 1
        ran, read_mib = await watched(
            box, "r", "read('/workspace/big')", io_bytes_per_s=MIB, wall_time_s=2
        )
        assert ran.outcome is Outcome.WALL_TIME, ran.said()
        assert len(ran.text()) < BIG_MIB / 2
        assert 0 < read_mib < BIG_MIB / 2


@pytest.mark.needs("io")
async def test_io_is_set_on_every_group_of_cells(shared: Shared, tmp_path: Path) -> None:
    async with slow(shared, tmp_path, 50) as box:
        await box.session.ready()
        await box.ok("1")
        found: dict[str, str] = {}

        def look(_: object) -> None:
            found.update(bounds(box))

        await box.run("print('up')", on_event=look, io_bytes_per_s=3 * MIB)
    cells = [text for name, text in found.items() if name.startswith("cell-")]
    assert any(str(3 * MIB) in text for text in cells), found
    assert str(50 * MIB) in found["heads"]
    if is_v2:
        assert any(f"rbps={3 * MIB} wbps={3 * MIB}" in text for text in cells), found


@pytest.mark.needs("io")
async def test_a_killed_cell_does_not_wait_for_its_disk(shared: Shared, tmp_path: Path) -> None:
    """A direct read of the whole file at once cannot be interrupted, and would take 24 s."""
    async with slow(shared, tmp_path, 1) as box:
        await box.ok(
            "import mmap, os\nfd = os.open('/workspace/big', os.O_RDONLY | os.O_DIRECT)\n"
            f"def read_all(): os.readv(fd, [mmap.mmap(-1, {BIG_MIB * MIB})])"
        )
        ran = await box.run("read_all()", wall_time_s=1)
        assert ran.outcome is Outcome.WALL_TIME, ran.said()
        assert ran.result.usage.wall_s < BIG_MIB / 2
        # Nor does one that has left such a process behind.
        await box.ok("if os.fork() == 0:\n    read_all()\n    os._exit(0)")
        assert await box.value("6 * 7") == 42


@pytest.mark.needs("io")
@pytest.mark.skipif(not is_v2, reason="only v2 knows who has written what is in the page cache")
async def test_writes_to_the_notebooks_folder_are_slowed_down(
    shared: Shared, tmp_path: Path
) -> None:
    async with slow(shared, tmp_path, 2, workspace_mode="rw") as box:
        await box.ok(UNIT)
        (session,) = {Path(path) for path in box.cgroups if (Path(path) / "io.max").exists()}
        bound = (session / "io.max").read_text()
        assert f"rbps={2 * MIB} wbps={2 * MIB}" in bound
        ran, written_mib = await watched(
            box, "w", "write('/workspace/new')", io_bytes_per_s=MIB, wall_time_s=2
        )
        assert ran.outcome is Outcome.WALL_TIME, ran.said()
        assert len(ran.text()) < BIG_MIB / 2
        assert 0 < written_mib < BIG_MIB / 2
        assert await box.value("6 * 7") == 42
        assert (session / "io.max").read_text() == bound  # it was lifted to end the cell


@pytest.mark.needs("io")
@pytest.mark.skipif(is_v2, reason="here it is")
async def test_writes_that_cannot_be_slowed_down_are_refused(
    shared: Shared, tmp_path: Path
) -> None:
    with pytest.raises(HostError, match=r"cannot limit io with workspace=rw: .*--waive io"):
        async with slow(shared, tmp_path, 1, workspace_mode="rw"):
            pass
    waived = frozenset({"io"})
    async with slow(shared, tmp_path, 1, workspace_mode="rw", waived=waived) as box:
        assert await box.value("6 * 7") == 42


async def test_io_that_cannot_be_limited_is_refused(shared: Shared, tmp_path: Path) -> None:
    why = capabilities()["io"]
    if not why:
        pytest.skip("here it is")
    with pytest.raises(HostError) as caught:
        async with slow(shared, tmp_path, 1):
            pass
    assert str(caught.value).startswith("cannot limit io: ")
    assert why in str(caught.value)
    assert caught.value.hint


# ---- output

FLOODS = {
    "python": "for _ in range(1024): print('x' * (1 << 20))",
    "os.write": "import os\nb = b'x' * (1 << 20)\nfor _ in range(1024): os.write(1, b)",
    "program": "import os; os.system('head -c 1G /dev/zero')",
    "lines": "import os; os.system('yes | head -c 1G')",
    "stderr": "import os; os.system('head -c 1G /dev/zero >&2')",
}
MARKER = "output limit of 1 MiB reached"


@pytest.mark.parametrize("code", FLOODS.values(), ids=FLOODS)
async def test_a_flood_is_cut_and_starves_nobody(box: Driver, code: str) -> None:
    worst_s, flooding = 0.0, True

    async def others() -> None:
        nonlocal worst_s
        loop = asyncio.get_running_loop()
        while flooding:
            before_s = loop.time()
            await asyncio.sleep(0.01)
            worst_s = max(worst_s, loop.time() - before_s - 0.01)

    watching = asyncio.create_task(others())
    ran = await box.run(code, output_bytes=MIB)
    flooding = False
    await watching
    assert ran.outcome is Outcome.OK, ran.said()
    assert ran.result.usage.output_bytes >= 1 << 30
    texts = [event.text for event in ran.events if isinstance(event, Stream)]
    assert sum(MARKER in text for text in texts) == 1
    assert MARKER in texts[-1]
    assert MIB <= sum(map(len, texts[:-1])) <= MIB + 16
    assert worst_s < 0.2


async def test_displays_count_too(box: Driver) -> None:
    ran = await box.run(
        "from IPython.display import display\nfor _ in range(100): display({'text/plain': 'x' * 20000}, raw=True)",
        output_bytes=MIB,
    )
    assert ran.outcome is Outcome.OK
    assert 40 <= len(ran.messages("display_data")) <= 52
    assert ran.text("stderr").count(MARKER) == 1


async def test_after_the_flood_the_next_cell_prints(box: Driver) -> None:
    await box.run("print('x' * (2 << 20))", output_bytes=MIB)
    assert await box.ok("print('clear')") == "clear\n"


async def test_a_flood_can_be_interrupted(box: Driver) -> None:
    ran = await box.interrupted("print('up')\nwhile True: print('x' * 100000)", output_bytes=MIB)
    assert ran.outcome is Outcome.INTERRUPTED, ran.said()
    assert ran.result.committed


# ---- what was used


async def test_usage(box: Driver) -> None:
    ran = await box.run(
        "import time, os\ntime.sleep(0.2)\nb = bytearray(50 << 20)\nopen('/tmp/used', 'wb').write(bytes(3 << 20))\n"
        "print('x' * 999)\n_ = os.system('true')"
    )
    usage = ran.result.usage
    assert 0.2 <= usage.wall_s < 2
    assert 0 < usage.cpu_s < 1
    assert usage.peak_memory_bytes is not None
    assert 50 * MIB < usage.peak_memory_bytes < 80 * MIB
    assert usage.peak_processes is None or usage.peak_processes >= 2
    assert 3 * MIB <= usage.disk_bytes < 4 * MIB
    assert usage.output_bytes == 1000
    assert ran.result.limits == box.limits
