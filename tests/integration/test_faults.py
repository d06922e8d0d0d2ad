"""A host that is spoilt before a session starts, or under one that runs.

Each fault is a clear error or a fallback that has a name; never a hang, never a cell without its
limits; nothing is left, and the next session works.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandbox_kernel.errors import HostError, SessionLost
from sandbox_kernel.model import Event, Outcome, Stream
from tests.integration import leaks
from tests.integration.driver import Driver, start, stop

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp", "memory", "cpus", "processes"),
    pytest.mark.kernel,
]

LEAF = "sandbox-kernel-supervisor"
STRAY = (
    "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True); print('up')\n"
)


@pytest_asyncio.fixture(loop_scope="module")
async def box(tmp_path: Path) -> AsyncIterator[Driver]:
    """Give a session whose host is about to be spoilt; the one after it must work."""
    before = leaks.Snapshot()
    driver = await start(tmp_path)
    await driver.ok("x = 1")
    yield driver
    await stop(driver)
    before.assert_clean()
    following = await start(tmp_path)
    try:
        assert await following.value("6 * 7") == 42
    finally:
        await stop(following)
    before.assert_clean()


# ---- cgroups that vanish


def evict(groups: list[str], *, keep: bool = False) -> None:
    """Move the processes of groups above the session's, and remove the groups."""
    for group in groups:
        session = next(path for path in (Path(group), Path(group).parent) if is_session(path))
        home = session.parent
        home = home / LEAF if (home / LEAF).exists() else home
        for folder, _, _ in os.walk(group, topdown=False):
            move(folder, home)
            assert keep or leaks.until(lambda folder=folder: remove(folder)), folder


def is_session(path: Path) -> bool:
    return path.name.startswith(f"sandbox-kernel-{os.getpid()}-")


def move(folder: str, home: Path) -> None:
    for pid in Path(folder, "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            (home / "cgroup.procs").write_text(pid)


def remove(folder: str) -> bool:
    """Remove a group, once the last process that has ended is gone from it."""
    try:
        os.rmdir(folder)
    except OSError:
        return False
    return True


def groups(driver: Driver, names: set[str]) -> list[str]:
    return [f"{path}/{name}" for path in driver.cgroups for name in sorted(names)]


async def some(driver: Driver, count: int) -> None:
    """Run some cells; what was made before the fault is still good for one or the other."""
    for _ in range(count):
        await driver.run("x += 1", timeout_s=10)


async def settled(driver: Driver) -> None:
    """Wait until the session has prepared what it prepares between two cells."""
    await driver.session._settle_down()
    assert driver.session._next is not None
    await driver.session._next
    assert driver.session._ahead._spare is not None
    await driver.session._ahead._spare


async def test_groups_of_waiting_containers_vanish(box: Driver) -> None:
    """Nothing has run in them yet: others are made, and the cell does not even notice."""
    await settled(box)
    strays = box.processes() - box.in_group("init") - box.in_group("heads")
    evict(groups(box, box.cell_groups()))
    assert await box.value("x", timeout_s=10) == 1
    assert leaks.until(lambda: not any(map(leaks.runs, strays)))
    assert await box.value("x") == 1


async def test_waiting_child_is_moved_out_of_its_limits(box: Driver) -> None:
    """Its group stays, but would limit nothing: another child runs the cell."""
    await settled(box)
    strays = box.processes() - box.in_group("init") - box.in_group("heads")
    evict(groups(box, box.cell_groups()), keep=True)
    ran = await box.run("b = bytearray(200 << 20)", memory_bytes=64 << 20)
    assert ran.outcome is Outcome.MEMORY, ran.said()
    assert leaks.until(lambda: not any(map(leaks.runs, strays)))
    assert await box.value("x") == 1


@pytest.mark.parametrize("name", ["heads", "init"])
async def test_group_of_the_session_vanishes(box: Driver, name: str) -> None:
    await settled(box)
    pids = box.processes()
    evict(groups(box, {name}))
    with pytest.raises(SessionLost, match=rf"removed the cgroup .*/{name} .*what cleans up cgroup"):
        await some(box, 3)
    assert leaks.until(lambda: not any(map(leaks.runs, pids)))


async def test_the_whole_tree_vanishes(box: Driver) -> None:
    await settled(box)
    pids = box.processes()
    evict(list(box.cgroups))
    with pytest.raises(SessionLost, match=r"removed the cgroup .* of the session"):
        await box.run("x", timeout_s=10)
    assert leaks.until(lambda: not any(map(leaks.runs, pids)))


CELLS = {
    "ends": "input()",
    "heeds": "while True: pass",
    "resists": "while True:\n    try:\n        while True: pass\n    except KeyboardInterrupt: pass",
}


@pytest.mark.parametrize("keep", [False, True], ids=["removed", "kept"])
@pytest.mark.parametrize("code", CELLS.values(), ids=CELLS)
async def test_cell_is_moved_out_of_its_limits_while_it_runs(
    box: Driver, code: str, keep: bool
) -> None:
    """It ends with the session, and so does what it has started: no limit reaches them."""
    everything: set[int] = set()

    def act(event: Event) -> None:
        if isinstance(event, Stream) and "up" in event.text:
            everything.update(box.processes())
            evict(groups(box, box.cell_groups()), keep=keep)
            box.session.answer("")

    with pytest.raises(SessionLost, match=r"took the cell out of its cgroup .* and its limits"):
        await box.run(STRAY + code, on_event=act, allow_stdin=True, wall_time_s=1.0, timeout_s=10)
    assert len(everything) >= 4
    assert leaks.until(lambda: not any(map(leaks.runs, everything)))


async def test_processor_time_is_looked_at_in_vain(box: Driver) -> None:
    """The look itself finds the fault, long before the wall time is over."""

    def act(event: Event) -> None:
        if isinstance(event, Stream) and "up" in event.text:
            evict(groups(box, box.cell_groups()))

    with pytest.raises(SessionLost, match="took the cell out of its cgroup"):
        await box.run(STRAY + CELLS["resists"], on_event=act, cpu_time_s=1.0, timeout_s=10)


async def test_kernels_own_tree_allows_no_more_groups(box: Driver) -> None:
    """A limit of the v2 tree; while it lasts the error names it, afterwards cells run again."""
    limits = [Path(path, "cgroup.max.descendants") for path in box.cgroups]
    limits = [path for path in limits if path.exists()]
    if not limits:
        pytest.skip("v1 has no such limit")
    await settled(box)
    for path in limits:
        path.write_text("1")
    with pytest.raises(HostError, match=r"raise its cgroup\.max\.descendants"):
        await some(box, 4)
    for path in limits:
        path.write_text("max")
    assert await box.value("x > 1") is True


# ---- the scratch file system

FILL = """
import errno, os
try:
    with open('/tmp/full', 'wb', buffering=0) as file:
        while True: file.write(bytes(1 << 20))
except OSError as error:
    print(errno.errorcode[error.errno])
"""


async def test_full_scratch_is_an_exception_and_rolls_back(box: Driver) -> None:
    ran = await box.run(FILL + "os._exit(1)", disk_bytes=64 << 20)
    assert ran.text() == "ENOSPC\n"
    assert (ran.outcome, ran.result.exit_code) == (Outcome.DISK, 1)
    assert await box.value("x") == 1
    await box.ok("open('/tmp/much', 'wb').write(bytes(48 << 20))", disk_bytes=64 << 20)


async def test_full_scratch_that_is_committed(box: Driver) -> None:
    assert await box.ok(FILL, disk_bytes=64 << 20) == "ENOSPC\n"
    ran = await box.run("open('/tmp/more', 'wb', buffering=0).write(bytes(1 << 20))")
    assert ran.outcome is Outcome.OK, ran.said()  # under the session's own limit, which is higher
    ran = await box.run("open('/tmp/most', 'wb').write(bytes(1 << 30))")
    assert ran.outcome is Outcome.ERROR
    assert "No space left on device" in ran.trace
    await box.ok("os.remove('/tmp/full'); os.remove('/tmp/most')")
    assert await box.value("x") == 1


EXHAUST = """
import errno, os
os.makedirs('/tmp/many', exist_ok=True)
n = 0
try:
    while True:
        open(f'/tmp/many/{n}', 'x').close()
        n += 1
except OSError as error:
    print(errno.errorcode[error.errno])
"""
REMOUNT = """
import os, sys
from sandbox_kernel.linux import libc
fds = [os.open(f'/proc/{sys.argv[1]}/ns/{name}', os.O_RDONLY) for name in ('user', 'mnt')]
for fd in fds:
    libc.setns(fd)
os.chdir('/')
flags = libc.MS_REMOUNT | libc.MS_NOSUID | libc.MS_NODEV
libc.mount('tmpfs', '/s', fstype='tmpfs', flags=flags, data='nr_inodes=2000')
"""


async def test_exhausted_inodes(box: Driver) -> None:
    """A machine with little memory allows that few; a cell that used up all can be committed."""
    init = min(pid for pid in box.in_group("init") if comm(pid) == "sandbox-init")
    done = subprocess.run(
        [sys.executable, "-c", REMOUNT, str(init)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ran = await box.run(EXHAUST + "os._exit(1)")
    assert (ran.outcome, ran.text()) == (Outcome.DISK, "ENOSPC\n")
    assert await box.ok(EXHAUST) == "ENOSPC\n"
    assert await box.value("n > 1000") is True
    ran = await box.run("n = 0\n" + EXHAUST.replace("many", "more") + "assert n == -1")
    assert ran.outcome is Outcome.ERROR, ran.said()
    await box.ok("for i in range(100): os.remove(f'/tmp/many/{i}')")
    assert await box.value("len(os.listdir('/tmp/many')) == len(os.listdir('/tmp/many'))") is True


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


# ---- processes

CROWD = """
import errno, os, subprocess
crowd = []
try:
    while True: crowd.append(subprocess.Popen(['sleep', '1000']))
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def limit_processes(driver: Driver, number: int) -> None:
    """Let the session have so many processes, all together."""
    found = [Path(path, "pids.max") for path in driver.cgroups]
    next(path for path in found if path.exists()).write_text(str(number))


@pytest.mark.parametrize("end", ["", "os._exit(1)", "raise SystemError"])
async def test_cell_that_leaves_no_room_for_processes(box: Driver, end: str) -> None:
    await settled(box)
    limit_processes(box, 24)
    ran = await box.run(CROWD + end)
    assert ran.text() == "EAGAIN\n"
    assert ran.outcome in (Outcome.OK, Outcome.EXITED, Outcome.ERROR), ran.said()
    for _ in range(2):
        assert await box.value("x", timeout_s=10) == 1


async def test_no_room_for_a_child(box: Driver) -> None:
    """The state is kept while the host has no process left for the session."""
    await settled(box)
    limit_processes(box, 3)  # init, the builder, the head
    with pytest.raises(HostError, match=r"head could not be forked .*raise pids.max"):
        await some(box, 3)
    limit_processes(box, 24)
    assert await box.value("x >= 1") is True


def environment() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
