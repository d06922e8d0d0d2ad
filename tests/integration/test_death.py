"""Whatever part of a session is killed, within two seconds nothing of it is left on the host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from sandbox_kernel.errors import ConfigError, SandboxError, SessionLost
from sandbox_kernel.model import Event, Stream
from sandbox_kernel.session.session import Session
from tests.integration import leaks
from tests.integration.driver import Driver, make_spec, start, stop

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.kernel,
]

ROOT = Path(__file__).resolve().parents[2]
BUSY = "import subprocess; p = subprocess.Popen(['sleep', '1000'], start_new_session=True); print('up')\nwhile True: pass"


# ---- the kernel's own process


@dataclass
class Victim:
    """A kernel in another process, in the midst of a cell."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    temporary: Path

    def left(self) -> dict[str, Any]:
        """Give what there still is of it."""
        pids = {*self.facts["processes"], self.facts["monitor"]}
        found = {
            "processes": [pid for pid in pids if leaks.runs(pid)],
            "cgroups": leaks.session_cgroups(self.facts["pid"]),
            "files": list(self.temporary.iterdir()),
        }
        return {name: value for name, value in found.items() if value}

    def assert_gone(self) -> None:
        leaks.until(lambda: not self.left())
        assert not self.left()


@contextlib.contextmanager
def victim(tmp_path: Path, code: str = BUSY) -> Iterator[Victim]:
    temporary, workspace = tmp_path / "temporary", tmp_path / "workspace"
    for folder in (temporary, workspace):
        folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.victim", str(workspace), code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "TMPDIR": str(temporary),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, "the victim did not start"
        yield Victim(process, json.loads(line), temporary)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture
def clean() -> Iterator[None]:
    """Look for mounts and cgroups of this very process that were not there before."""
    before = leaks.Snapshot()
    yield
    assert not leaks.until(lambda: False, 0)
    left = {name: value for name, value in before.leaked().items() if name in ("mounts", "cgroups")}
    assert not left


async def test_the_kernel_is_killed(tmp_path: Path, clean: None) -> None:
    with victim(tmp_path) as it:
        assert len(it.facts["processes"]) >= 4
        os.kill(it.facts["pid"], signal.SIGKILL)
        it.assert_gone()


async def test_the_kernels_whole_group_is_killed(tmp_path: Path, clean: None) -> None:
    # As Jupyter does it when a kernel does not shut down.
    with victim(tmp_path) as it:
        os.killpg(it.process.pid, signal.SIGKILL)
        it.assert_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSEGV])
async def test_the_kernel_dies_of_a_signal(tmp_path: Path, clean: None, number: int) -> None:
    with victim(tmp_path) as it:
        os.kill(it.facts["pid"], number)
        it.assert_gone()


async def test_kernel_and_init_are_killed_at_once(tmp_path: Path, clean: None) -> None:
    with victim(tmp_path) as it:
        for pid in (it.facts["pid"], *it.facts["init"]):
            os.kill(pid, signal.SIGKILL)
        it.assert_gone()


async def test_the_kernel_is_killed_while_a_resident_cell_runs(tmp_path: Path, clean: None) -> None:
    code = "import threading\nthreading.Thread(target=threading.Event().wait).start()\n" + BUSY
    with victim(tmp_path, code) as it:
        os.kill(it.facts["pid"], signal.SIGKILL)
        it.assert_gone()


async def test_what_a_crash_of_everything_leaves_is_swept_at_the_next_start(tmp_path: Path) -> None:
    with victim(tmp_path) as it:
        groups = leaks.session_cgroups(it.facts["pid"])
        assert groups
        # Stopped, neither can clean up behind the other; init goes with its parent.
        for pid in (it.facts["monitor"], it.facts["pid"]):
            os.kill(pid, signal.SIGSTOP)
        for pid in (it.facts["monitor"], it.facts["pid"]):
            os.kill(pid, signal.SIGKILL)
        assert leaks.until(lambda: not any(map(leaks.runs, it.facts["processes"])))
        it.process.wait()
        if f"/sandbox-kernel-{it.facts['pid']}-" in os.path.dirname(groups[0]):
            # In a scope of its own: systemd removes that with all there is in it.
            assert leaks.until(lambda: not leaks.session_cgroups(it.facts["pid"]))
        else:
            assert leaks.session_cgroups(it.facts["pid"])
        other = await start(tmp_path)
        try:
            assert leaks.session_cgroups(it.facts["pid"]) == []
            assert await other.value("6 * 7") == 42
        finally:
            await stop(other)


# ---- parts of the session


@pytest_asyncio.fixture(loop_scope="module")
async def doomed(tmp_path: Path) -> AsyncIterator[Driver]:
    """Give a session that will die; nothing of it may be left, two seconds after."""
    before = leaks.Snapshot()
    driver = await start(tmp_path)
    await driver.ok("x = 1")
    yield driver
    driver.broken = True
    await stop(driver)
    before.assert_clean()


def monitor(driver: Driver) -> set[int]:
    return {driver.session._pod._started.monitor.pid}


PARTS = {
    "init": lambda driver: driver.in_group("init"),
    "head": lambda driver: driver.in_group("heads"),
    "monitor": monitor,
    "everything": Driver.processes,
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
async def test_a_part_is_killed_while_a_cell_runs(doomed: Driver, part: Any) -> None:
    paths, everything = doomed.cgroups, doomed.processes()

    def act(event: Event) -> None:
        if isinstance(event, Stream) and "up" in event.text:
            everything.update(doomed.processes())
            for pid in part(doomed):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(SessionLost):
        await doomed.run(BUSY, on_event=act, timeout_s=10)
    await assert_gone(paths, everything)
    with pytest.raises(SandboxError):
        await doomed.run("1", timeout_s=10)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
async def test_a_part_is_killed_between_two_cells(doomed: Driver, part: Any) -> None:
    await doomed.session._settle_down()  # before, the head is one that nobody needs any more
    paths, everything = doomed.cgroups, doomed.processes()
    for pid in part(doomed):
        with contextlib.suppress(ProcessLookupError):  # init's end was theirs
            os.kill(pid, signal.SIGKILL)
    await assert_gone(paths, everything)
    with pytest.raises(SessionLost):
        await doomed.run("1", timeout_s=10)


async def test_the_prepared_child_is_killed(fresh: Driver) -> None:
    await fresh.ok("x = 1")
    for _ in range(3):
        init_and_heads = fresh.in_group("init") | fresh.in_group("heads")
        for pid in fresh.processes() - init_and_heads:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert await fresh.value("x", timeout_s=10) == 1


async def assert_gone(paths: tuple[str, ...], pids: set[int]) -> None:
    def left() -> list[Any]:
        return [pid for pid in pids if leaks.runs(pid)] + [p for p in paths if os.path.exists(p)]

    deadline_s = asyncio.get_running_loop().time() + leaks.GONE_S
    while left() and asyncio.get_running_loop().time() < deadline_s:
        await asyncio.sleep(0.02)  # the session cleans up in this very loop
    assert not left()


# ---- closing


async def test_close_during_a_cell(tmp_path: Path) -> None:
    before = leaks.Snapshot()
    driver = await start(tmp_path)
    up = asyncio.Event()
    running = asyncio.create_task(driver.run(BUSY, on_event=lambda _: up.set()))
    await asyncio.wait_for(up.wait(), 10)
    await stop(driver)
    with pytest.raises(SessionLost):
        await asyncio.wait_for(running, 5)
    before.assert_clean()


async def test_close_twice_and_use_after(tmp_path: Path) -> None:
    before = leaks.Snapshot()
    driver = await start(tmp_path)
    await stop(driver)
    await stop(driver)
    with pytest.raises(SessionLost):
        await driver.run("1", timeout_s=5)
    assert driver.session.usage() is not None
    driver.session.interrupt()
    before.assert_clean()


async def test_close_before_it_is_ready(tmp_path: Path) -> None:
    before = leaks.Snapshot()
    session = Session(make_spec(tmp_path))
    session.begin()
    await asyncio.wait_for(session.close(), 10)
    before.assert_clean()


async def test_close_while_it_gets_ready(tmp_path: Path) -> None:
    before = leaks.Snapshot()
    session = Session(make_spec(tmp_path))
    session.begin()
    getting_ready = asyncio.create_task(session.ready())
    await asyncio.sleep(0)
    await asyncio.wait_for(session.close(), 10)
    with pytest.raises((SandboxError, asyncio.CancelledError)):
        await asyncio.wait_for(getting_ready, 5)
    before.assert_clean()


async def test_kill_without_a_loop_to_wait_in(tmp_path: Path) -> None:
    before = leaks.Snapshot()
    driver = await start(tmp_path)
    pids = driver.processes()
    driver.session.kill()
    assert leaks.until(lambda: not any(map(leaks.runs, pids)))
    assert leaks.session_cgroups() == []
    await stop(driver)
    before.assert_clean()


async def test_close_is_quick(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(8):
        driver = await start(tmp_path)
        await driver.ok("x = 1")
        began_s = loop.time()
        await stop(driver)
        assert loop.time() - began_s < 1.0


async def test_sessions_side_by_side(tmp_path: Path) -> None:
    before = leaks.Snapshot()
    drivers = [await start(tmp_path) for _ in range(3)]
    for n, driver in enumerate(drivers):
        await driver.ok(f"x = {n}; open('/tmp/x', 'w').write('{n}')")
    victim_init = drivers[0].in_group("init")
    for pid in victim_init:
        os.kill(pid, signal.SIGKILL)
    for n, driver in enumerate(drivers[1:], 1):
        assert await driver.value("(x, open('/tmp/x').read())") == (n, str(n))
    for driver in drivers:
        await stop(driver)
    before.assert_clean()


async def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    before = leaks.Snapshot()
    session = Session(make_spec(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="missing"):
        session.begin()
    await session.close()
    before.assert_clean()


async def test_an_image_without_a_python_leaves_nothing(tmp_path: Path) -> None:
    from dataclasses import replace

    before = leaks.Snapshot()
    spec = make_spec(tmp_path)
    session = Session(replace(spec, image=replace(spec.image, python=("/no/such/python",))))
    session.begin()
    with pytest.raises(SandboxError, match="python"):
        await asyncio.wait_for(session.ready(), 10)
    await session.close()
    before.assert_clean()
