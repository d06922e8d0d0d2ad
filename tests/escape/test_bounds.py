"""Floods against limits, each with a twin under a higher limit; and what one cell leaves another.

The conformance tests have every way to fail; here is one of each class, to show that it bites.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.escape.conftest import Open
from tests.escape.probe import PRELUDE, Probe
from tests.escape.sessions import session
from tests.integration.driver import Driver, stop

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp", "memory", "processes"),
    pytest.mark.escape,
]

MEGA = 1 << 20
HIGHER = "a higher limit"
FORKS = """
pids, said = [], 'ok'
for _ in range(40):
    try: pid = os.fork()
    except OSError as error:
        said = errno.errorcode[error.errno]
        break
    if pid == 0: signal.pause()
    pids.append(pid)
for pid in pids: os.kill(pid, 9); os.waitpid(pid, 0)
print(said)
"""
THREADS = """
import threading
halt, threads, said = threading.Event(), [], 'ok'
for _ in range(40):
    try: (thread := threading.Thread(target=halt.wait)).start()
    except RuntimeError:
        said = 'EAGAIN'
        break
    threads.append(thread)
halt.set()
for thread in threads: thread.join()
print(said)
"""
FILL = """
said = attempt(lambda: open('{0}/full', 'wb').write(bytes(24 << 20)))
os.unlink('{0}/full')
print(said)
"""
MEMFD = "fd = os.memfd_create('m'); [os.write(fd, bytes(1 << 20)) for _ in range(160)]; print('ok')"
SYSV = """
import ctypes
lib = ctypes.CDLL(None, use_errno=True)
lib.shmat.restype = ctypes.c_void_p
number = lib.shmget(0, 160 << 20, 0o1600)
ctypes.memset(lib.shmat(number, None, 0), 1, 160 << 20)
print('ok')
"""
FLOODS: tuple[tuple[Probe, dict[str, Any], dict[str, Any]], ...] = (
    (
        Probe(33, "flood of processes", "EAGAIN", HIGHER, "ok", FORKS),
        {"processes": 20}, {"processes": 100},
    ),
    (
        Probe(33, "flood of threads", "EAGAIN", HIGHER, "ok", THREADS),
        {"processes": 20}, {"processes": 100},
    ),
    (
        Probe(34, "flood of memory", "memory", HIGHER, "ok", "x = bytearray(160 << 20); print('ok')"),
        {"memory_bytes": 100 * MEGA}, {"memory_bytes": 400 * MEGA},
    ),
    (
        Probe(34, "flood of a memfd", "memory", HIGHER, "ok", MEMFD),
        {"memory_bytes": 100 * MEGA}, {"memory_bytes": 400 * MEGA},
    ),
    (
        Probe(34, "flood of SysV shared memory", "memory", HIGHER, "ok", SYSV),
        {"memory_bytes": 100 * MEGA}, {"memory_bytes": 400 * MEGA},
    ),
    (
        Probe(35, "flood of /tmp", "ENOSPC", HIGHER, "ok", FILL.format("/tmp")),
        {"disk_bytes": 16 * MEGA}, {"disk_bytes": 64 * MEGA},
    ),
    (
        Probe(35, "flood of the notebook's folder", "ENOSPC", HIGHER, "ok", FILL.format("/workspace")),
        {"disk_bytes": 16 * MEGA}, {"disk_bytes": 64 * MEGA},
    ),
    (
        Probe(35, "flood of /dev/shm", "ENOSPC", HIGHER, "ok", FILL.format("/dev/shm")),
        {"disk_bytes": 16 * MEGA}, {"disk_bytes": 64 * MEGA},
    ),
    (
        Probe(36, "sleep past the limit, ignoring signals", "wall_time", HIGHER, "ok",
              "for n in (2, 15): signal.signal(n, signal.SIG_IGN)\n"
              "import select; select.select([], [], [], 1.5); print('ok')"),
        {"wall_time_s": 0.2}, {"wall_time_s": 20.0},
    ),
    (
        Probe(36, "processor time of children", "cpu_time", HIGHER, "ok",
              "import time\n"
              "if not (pid := os.fork()):\n"
              "    while time.process_time() < 1: pass\n"
              "    os._exit(0)\n"
              "os.waitpid(pid, 0); print('ok')"),
        {"cpu_time_s": 0.3}, {"cpu_time_s": 20.0},
    ),
    (
        Probe(37, "flood of output", "cut", HIGHER, "ok",
              "for _ in range(100): os.write(1, b'x' * 9999 + b'\\n')\nprint('ok')"),
        {"output_bytes": 100_000}, {"output_bytes": 10 * MEGA},
    ),
)  # fmt: skip
SYSV_LEFT = Probe(
    39, "SysV objects of an earlier cell", "invisible", "ipc namespace", "visible",
    "print('visible' if len(open('/proc/sysvipc/shm').read().splitlines()) > 1 else 'invisible')",
)  # fmt: skip
RACE = Probe(
    8, "folder swapped for a link while another session starts", "nothing made outside",
)  # fmt: skip
PROBES = (*(probe for probe, _, _ in FLOODS), SYSV_LEFT, RACE)


async def _flooded(box: Driver, probe: Probe, limits: dict[str, Any]) -> str:
    ran = await box.run(f"{PRELUDE}\n{probe.code}\nos._exit(0)", **limits)
    if "output limit of" in ran.text("stderr"):
        return "cut"
    # What the program saw counts, if it lived to say it; else what became of the cell.
    return ran.text().strip().rpartition("\n")[2] or str(ran.outcome.value)


@pytest.mark.parametrize(("probe", "low", "high"), FLOODS, ids=[probe.id for probe, _, _ in FLOODS])
async def test_a_flood_is_stopped(
    boxes: Open, probe: Probe, low: dict[str, Any], high: dict[str, Any]
) -> None:
    box = await boxes()
    assert await _flooded(box, probe, low) == probe.refused
    assert await _flooded(box, probe, high) == probe.open


async def test_nothing_of_system_v_is_left_for_the_next_cell(boxes: Open) -> None:
    make = f"{PRELUDE}\nassert call('shmget', 0x50726F62, 4096, 0o1600) == 'ok'"
    for box, seen in (
        (await boxes(), SYSV_LEFT.refused),
        (await boxes(SYSV_LEFT.guard), SYSV_LEFT.open),
    ):
        await box.ok(make)
        assert (await box.ok(SYSV_LEFT.code)).strip() == seen
        await box.ok(
            "import ctypes; lib = ctypes.CDLL(None)\n"
            "lib.shmctl(lib.shmget(0x50726F62, 4096, 0), 0, None)"
        )


SWAP = """
import os, threading
halt = threading.Event()
def swap():
    while not halt.is_set():
        for make, take in ((lambda: os.symlink(TARGET, 'data'), lambda: os.unlink('data')),
                           (lambda: os.mkdir('data'), lambda: os.rmdir('data'))):
            try: make(); take()
            except OSError: pass
thread = threading.Thread(target=swap, daemon=True); thread.start()
"""


async def test_a_swap_while_another_session_starts_makes_nothing(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    outside.chmod(0o777)
    first = await session(tmp_path, workspace_mode="rw")
    try:
        await first.ok(f"TARGET = {str(outside)!r}\n{SWAP}")
        for mode in ("rw", "overlay"):
            second = await session(tmp_path, workspace_mode=mode)
            try:
                # Where the link leads is a path of the cell's own root.
                await second.run("import os; os.makedirs('data/made', exist_ok=True)")
            finally:
                await stop(second)
        await first.ok("halt.set(); thread.join()")
    finally:
        await stop(first)
    assert list(outside.iterdir()) == []
