"""One suite for cgroups over this host's layout, over that without its v2 tree, and over fakes.

Each real layout is tried where the host has it; an ordinary user's is what systemd delegates.
What only a kernel can do (enforce, count, signal an event) runs over the real trees; everything
is made below the own group of the test process, and must be gone afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox_kernel.errors import ConfigError, HostError
from sandbox_kernel.linux.cgroup import Cgroup, CgroupTree, block_devices, session_name
from sandbox_kernel.linux.mountinfo import parse_mounts
from tests.fakes.cgroupfs import DISK, FakeCgroupFiles, FakeHost

MIB = 1024**2
LAYOUT = CgroupTree.detect().layout
REAL = {"hybrid": ("hybrid", "v1")}.get(LAYOUT, (LAYOUT,))
"""This host's layout; a hybrid one without its v2 tree is v1."""
FAKE = ("fake-v2", "fake-v1", "fake-hybrid")
Spawn = Callable[..., "subprocess.Popen[str]"]


def real_tree(tmp_path: Path, *, hidden: str) -> CgroupTree:
    """Read this host, as if file systems of type `hidden` were not mounted."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    kept = [line for line in mounts if f" - {hidden} " not in line]
    (proc / "self/mountinfo").write_text("\n".join(kept))
    (proc / "self/cgroup").write_text(Path("/proc/self/cgroup").read_text())
    (proc / str(os.getpid())).symlink_to(f"/proc/{os.getpid()}")
    return CgroupTree.detect(proc=proc)


@functools.cache
def own_tree() -> CgroupTree:
    """Give this host's tree; the test process is in another cgroup from now on, maybe."""
    return CgroupTree.acquire()


@pytest.fixture
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> CgroupTree:
    kind: str = request.param
    if kind.startswith("fake-"):
        host = FakeHost(tmp_path, kind.removeprefix("fake-"))
        return CgroupTree.detect(proc=host.proc, root=host.root, files=host.files)
    if kind == "none":
        pytest.skip("this host has no cgroups")
    if kind != LAYOUT:
        return usable(real_tree(tmp_path, hidden="cgroup2"))
    try:
        return usable(own_tree())
    except HostError as error:
        pytest.skip(str(error))


def usable(tree: CgroupTree) -> CgroupTree:
    if missing := tree.missing():
        pytest.skip(f"this host does not limit {', '.join(missing)}")
    return tree


@pytest.fixture
def disk(tree: CgroupTree, tmp_path: Path) -> tuple[int, int]:
    """Give a disk whose traffic can be limited: the one below `tmp_path`."""
    if why := tree.missing(io=True).get("io"):
        pytest.skip(why)
    devices = (DISK,) if isinstance(tree._files, FakeCgroupFiles) else block_devices([tmp_path])
    if not devices:
        pytest.skip(f"{tmp_path} is on no disk")
    return devices[0]


@pytest.fixture
def session(tree: CgroupTree) -> Iterator[Cgroup]:
    with tree.session(session_name("contract")) as group:
        paths = group.paths
        yield group
    assert not [path for path in paths if os.path.exists(path)]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start Python programs that wait for a line before they begin."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str = "") -> subprocess.Popen[str]:
        argv = [sys.executable, "-I", "-S", "-c", f"input()\n{code}"]
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()
        with contextlib.suppress(BrokenPipeError):
            child.__exit__(None, None, None)


def go(child: subprocess.Popen[str]) -> str:
    return child.communicate("\n", timeout=30)[0].strip()


def begin(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def read(group: Cgroup, name: str) -> str:
    """Read a file from whichever hierarchy has it."""
    return next(f.read_text() for p in group.paths if (f := Path(p, name)).exists()).strip()


everywhere = pytest.mark.parametrize("tree", REAL + FAKE, indirect=True)
enforced = pytest.mark.parametrize("tree", REAL, indirect=True)


@everywhere
def test_nothing_is_missing(tree: CgroupTree) -> None:
    assert tree.missing() == {}


@everywhere
def test_limits_can_be_read_back_after_lowering_and_raising(session: Cgroup) -> None:
    with session.child("cell") as cell:
        for size in (64 * MIB, 32 * MIB, 128 * MIB):
            cell.limit(memory_bytes=size, cpus=0.5, processes=7)
            unified = Path(cell.paths[0], "memory.max").exists()
            names = ["memory.max"] if unified else ["memory.limit_in_bytes"]
            if not unified and Path(cell.paths[0], "memory.memsw.limit_in_bytes").exists():
                names.append("memory.memsw.limit_in_bytes")
            assert {read(cell, name) for name in names} == {str(size)}
            assert read(cell, "pids.max") == "7"
            cpu = "cpu.max" if unified else "cpu.cfs_quota_us"
            assert read(cell, cpu).split()[0] == "50000"


@everywhere
def test_only_the_given_limit_is_written(session: Cgroup) -> None:
    with session.child("cell") as cell:
        cell.limit(processes=7)
        assert read(cell, "pids.max") == "7"
        cell.limit(cpus=1)
        assert read(cell, "pids.max") == "7"


@everywhere
def test_swap_is_off_and_a_cell_dies_as_a_whole(session: Cgroup) -> None:
    with session.child("cell") as cell:
        cell.limit(memory_bytes=64 * MIB)
        if not Path(cell.paths[0], "memory.max").exists():
            return  # on v1 swap is part of what was read back above; it knows no groups for OOM
        if Path(cell.paths[0], "memory.swap.max").exists():
            assert read(cell, "memory.swap.max") == "0"
        assert read(cell, "memory.oom.group") == "1"


@everywhere
def test_traffic_of_a_disk_can_be_read_back(tree: CgroupTree, disk: tuple[int, int]) -> None:
    name = f"{disk[0]}:{disk[1]}"
    with tree.session(session_name("io"), io=True) as group, group.child("cell") as cell:
        for size in (4 * MIB, 1 * MIB, 8 * MIB):
            cell.limit(io_bytes_per_s=size, devices=(disk,))
            if Path(cell.paths[0], "io.max").exists():
                assert read(cell, "io.max").startswith(f"{name} rbps={size} wbps={size}")
            else:
                assert read(cell, "blkio.throttle.read_bps_device") == f"{name} {size}"
                assert read(cell, "blkio.throttle.write_bps_device") == f"{name} {size}"


@everywhere
def test_device_that_takes_no_limit(tree: CgroupTree, disk: tuple[int, int]) -> None:
    none = (4000, 77)
    with tree.session(session_name("io"), io=True) as group, group.child("cell") as cell:
        cell.limit(io_bytes_per_s=MIB, devices=(none, disk))
        with pytest.raises(HostError, match="4000:77"):
            cell.limit(io_bytes_per_s=MIB, devices=(none,))
        with pytest.raises(HostError, match="no disk is behind the files"):
            cell.limit(io_bytes_per_s=MIB)


@everywhere
def test_traffic_is_not_limited_by_chance(session: Cgroup) -> None:
    """A session that was made without the controller says so."""
    with session.child("cell") as cell, pytest.raises(HostError, match=r"io.*made without it"):
        cell.limit(io_bytes_per_s=MIB, devices=(DISK,))


@everywhere
@pytest.mark.parametrize("limit", [{"memory_bytes": 0}, {"cpus": 0.0}, {"processes": 0}])
def test_impossible_value_is_named(session: Cgroup, limit: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="is 0"):
        session.limit(**limit)


@everywhere
def test_add_lists_and_kill_empties(session: Cgroup, spawn: Spawn) -> None:
    child = spawn()
    with session.child("cell") as cell:
        assert not cell.populated()
        cell.add(child.pid)
        assert cell.processes() == [child.pid]
        assert session.processes() == [child.pid]
        assert cell.populated()
        assert session.populated()
        started_s = time.monotonic()
        cell.kill()
        assert child.wait(timeout=1) == -signal.SIGKILL
        cell.remove()
        assert time.monotonic() - started_s < 1
        assert not any(map(os.path.exists, cell.paths))
        assert not cell.populated()
        assert cell.processes() == []


@everywhere
def test_whose_group_a_process_is_in_is_told(session: Cgroup, spawn: Spawn) -> None:
    child = spawn()
    with session.child("one") as one, session.child("other") as other:
        assert not one.holds(child.pid)
        one.add(child.pid)
        assert one.holds(child.pid)
        other.add(child.pid)
        assert (one.holds(child.pid), other.holds(child.pid)) == (False, True)
        other.kill()
        child.wait(timeout=1)
        assert not other.holds(child.pid)


@everywhere
def test_killing_a_session_reaches_the_cells_and_removing_it_too(
    session: Cgroup, spawn: Spawn
) -> None:
    children = [spawn(), spawn()]
    cells = [session.child("one"), session.child("two")]
    for cell, child in zip(cells, children, strict=True):
        cell.add(child.pid)
        cell.close()
    session.kill()
    assert [child.wait(timeout=1) for child in children] == [-signal.SIGKILL] * 2
    session.remove()
    assert not any(map(os.path.exists, cells[0].paths + session.paths))


@everywhere
def test_removing_twice_is_fine(session: Cgroup) -> None:
    with session.child("cell") as cell:
        cell.remove()
        cell.remove()
        cell.kill()
        cell.thaw()


@everywhere
def test_only_leaves_hold_processes(session: Cgroup, spawn: Spawn) -> None:
    child = spawn()
    with session.child("cell") as cell:
        with pytest.raises(HostError, match="has groups inside"):
            session.add(child.pid)
        cell.add(child.pid)
        with pytest.raises(HostError, match="holds processes"):
            cell.child("inner")


@everywhere
def test_process_that_ended_is_not_added(session: Cgroup, spawn: Spawn) -> None:
    child = spawn()
    go(child)
    with session.child("cell") as cell, pytest.raises(ProcessLookupError):
        cell.add(child.pid)


@everywhere
@pytest.mark.parametrize("name", ["", "..", "a/b", "cgroup.procs", "-x", "a\0b", "memory.max"])
def test_names_cannot_lead_elsewhere(session: Cgroup, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        session.child(name)


@everywhere
def test_name_is_taken_once(session: Cgroup) -> None:
    with session.child("cell") as cell:
        with pytest.raises(HostError, match="exist"):
            session.child("cell")
        assert all(map(os.path.exists, cell.paths))


@everywhere
def test_no_fd_is_left(tree: CgroupTree) -> None:
    tree.session(session_name("warm")).__exit__(None, None, None)
    before = os.listdir("/proc/self/fd")
    with tree.session(session_name("fds")) as group, group.child("cell") as cell:
        cell.limit(memory_bytes=64 * MIB)
        cell.usage()
        tree.sweep()
        tree.missing()
    assert os.listdir("/proc/self/fd") == before


@everywhere
def test_freeze_and_thaw_are_written(session: Cgroup) -> None:
    with session.child("cell") as cell:
        cell.freeze()
        cell.thaw()


@everywhere
def test_sweep_takes_the_dead_only(tree: CgroupTree, session: Cgroup, spawn: Spawn) -> None:
    child = spawn()
    dead = tree.session("sandbox-kernel-4194305-1-dead")  # beyond the highest pid there can be
    reused = tree.session(f"sandbox-kernel-{os.getpid()}-1-reused")
    other = tree.session("something-else")
    with dead.child("cell") as cell:
        cell.add(child.pid)
        with other:
            swept = set(tree.sweep())  # and what other dead kernels of this group have left
            assert {dead.name, reused.name} <= swept
            assert not {session.name, other.name} & swept
            assert child.wait(timeout=1) == -signal.SIGKILL
            assert not any(map(os.path.exists, dead.paths + reused.paths + cell.paths))
            assert all(map(os.path.exists, session.paths + other.paths))
    dead.close()
    reused.close()


@everywhere
def test_usage_of_a_removed_group_is_an_error(session: Cgroup) -> None:
    with session.child("cell") as cell:
        cell.remove()
        with pytest.raises(HostError, match="usage"):
            cell.usage()


@everywhere
def test_group_that_vanishes_under_the_session(
    tree: CgroupTree, session: Cgroup, spawn: Spawn
) -> None:
    """Somebody who cleans up takes the directories away: errors, no hang, and an end."""
    child = spawn()
    with session.child("cell") as cell:
        for path in cell.paths:
            tree._files.remove_dir(path)
        for act in (
            lambda: cell.limit(memory_bytes=64 * MIB),
            lambda: cell.limit(cpus=1),
            lambda: cell.limit(processes=5),
            lambda: cell.add(child.pid),
            lambda: cell.child("inner"),
            cell.usage,
        ):
            with pytest.raises(HostError, match=r"cell: No such .*somebody else has removed it"):
                act()
        assert not cell.exists()
        assert session.exists()
        assert not cell.holds(child.pid)
        assert not cell.populated()
        assert cell.processes() == []
        cell.freeze()
        cell.thaw()
        cell.kill()
        cell.remove()
    with session.child("next") as following:
        following.add(child.pid)


@everywhere
def test_session_that_vanishes_takes_no_cell(tree: CgroupTree) -> None:
    with tree.session(session_name("gone")) as group:
        group.child("cell").__exit__(None, None, None)
        for path in group.paths:
            tree._files.remove_dir(path)
        with pytest.raises(HostError, match="somebody else has removed it"):
            group.child("another")


@enforced
def test_more_groups_than_allowed(session: Cgroup) -> None:
    limit = Path(session.paths[0], "cgroup.max.descendants")
    if not limit.exists():
        pytest.skip("v1 has no such limit")
    limit.write_text("1")
    with session.child("one") as one:
        with pytest.raises(HostError, match=r"raise its cgroup\.max\.descendants"):
            session.child("two")
        assert all(map(os.path.exists, one.paths))
    with session.child("two"):
        pass


@enforced
@pytest.mark.slow
def test_traffic_is_limited(
    tree: CgroupTree, disk: tuple[int, int], tmp_path: Path, spawn: Spawn
) -> None:
    code = f"""
import mmap, os
data = mmap.mmap(-1, {MIB})
fd = os.open({str(tmp_path / "big")!r}, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
for _ in range(4):
    os.write(fd, data)
"""
    child = spawn(code)
    with tree.session(session_name("io"), io=True) as group, group.child("cell") as cell:
        cell.limit(io_bytes_per_s=2 * MIB, devices=(disk,))
        cell.add(child.pid)
        started_s = time.monotonic()
        go(child)
        assert child.returncode == 0
        assert time.monotonic() - started_s > 1


@enforced
def test_memory_hog_is_killed_and_counted(session: Cgroup, spawn: Spawn) -> None:
    child = spawn("x = bytearray(256 * 1024 ** 2)")
    with session.child("cell") as cell:
        cell.limit(memory_bytes=48 * MIB)
        cell.add(child.pid)
        go(child)
        assert child.returncode == -signal.SIGKILL
        usage = cell.usage()
        assert usage.oom_kills in (1, 2)  # v2 meets the victim again as it kills the whole group
        assert usage.oom_events >= 1
        assert usage.peak_memory_bytes is not None
        assert 40 * MIB < usage.peak_memory_bytes <= 48 * MIB


@enforced
def test_limit_of_the_session_kills_in_the_cell(session: Cgroup, spawn: Spawn) -> None:
    """The kill is counted where the victim was, whichever limit was hit."""
    child, idle = spawn("x = bytearray(256 * 1024 ** 2)"), spawn()
    session.limit(memory_bytes=64 * MIB)
    with session.child("head") as head, session.child("cell") as cell:
        head.add(idle.pid)
        cell.add(child.pid)
        go(child)
        assert child.returncode == -signal.SIGKILL
        assert cell.usage().oom_kills == 1
        assert head.usage().oom_kills == 0
        assert idle.poll() is None


@enforced
def test_fork_beyond_the_limit_is_denied_and_counted(session: Cgroup, spawn: Spawn) -> None:
    code = """
import os, signal
pids = []
try:
    while len(pids) < 50:
        pid = os.fork()
        if not pid:
            signal.pause()
        pids.append(pid)
except OSError as error:
    print(error.errno, len(pids))
for pid in pids:
    os.kill(pid, 9)
"""
    child = spawn(code)
    with session.child("cell") as cell:
        cell.limit(processes=5)
        cell.add(child.pid)
        assert go(child) == f"{errno.EAGAIN} 4"
        usage = cell.usage()
        assert usage.fork_denials == 1
        assert usage.peak_processes in (None, 5)


@enforced
def test_cpu_time_is_counted_and_limited(session: Cgroup, spawn: Spawn) -> None:
    child = spawn("import time\nwhile time.process_time() < 0.3: pass")
    with session.child("cell") as cell:
        cell.limit(cpus=0.5)
        cell.add(child.pid)
        started_s = time.monotonic()
        go(child)
        assert 0.2 < cell.usage().cpu_s < 0.6
        assert time.monotonic() - started_s > 0.4


@enforced
def test_fork_bomb_is_dead_within_a_second(session: Cgroup, spawn: Spawn) -> None:
    child = spawn("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    with session.child("cell") as cell:
        cell.limit(processes=40, cpus=0.5)
        cell.add(child.pid)
        begin(child)
        deadline_s = time.monotonic() + 10
        while len(cell.processes()) < 40 and time.monotonic() < deadline_s:
            pass
        started_s = time.monotonic()
        cell.kill()
        child.wait(timeout=5)
        cell.remove()
        assert time.monotonic() - started_s < 1


@enforced
def test_frozen_processes_stand_still_and_can_be_killed(session: Cgroup, spawn: Spawn) -> None:
    child = spawn("while True: pass")
    with session.child("cell") as cell:
        cell.add(child.pid)
        begin(child)
        cell.freeze()
        before = cell.usage().cpu_s
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=0.1)
        assert cell.usage().cpu_s == before
        cell.thaw()
        cell.freeze()
        cell.kill()
        cell.thaw()
        assert child.wait(timeout=1) == -signal.SIGKILL


@enforced
def test_last_process_that_leaves_is_an_event(
    tree: CgroupTree, session: Cgroup, spawn: Spawn
) -> None:
    child = spawn()
    with session.child("cell") as cell:
        cell.add(child.pid)
        events_fd = cell.empty_fd()
        if events_fd is None:
            assert tree.layout == "v1"
            return
        try:
            poll = select.poll()
            poll.register(events_fd, select.POLLPRI)
            assert poll.poll(0) == []
            go(child)
            assert poll.poll(5000)
            assert not cell.populated()
        finally:
            os.close(events_fd)


@enforced
def test_group_in_use_is_not_removed(
    session: Cgroup, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox_kernel.linux.cgroup_group.REMOVE_TIMEOUT_S", 0.1)
    child = spawn()
    with session.child("cell") as cell:
        cell.add(child.pid)
        with pytest.raises(HostError, match=str(child.pid)):
            cell.remove()


def test_controller_that_is_not_delegated_is_named() -> None:
    try:
        tree = own_tree()
    except HostError as error:
        pytest.skip(str(error))
    if "cpus" not in tree.missing():
        pytest.skip("here it is")
    with tree.session(session_name("contract")) as session, session.child("cell") as cell:
        cell.limit(memory_bytes=64 * MIB)
        with pytest.raises(HostError) as caught:
            cell.limit(cpus=1)
    assert "controller cpu is not delegated to" in caught.value.message
    assert "Delegate=cpu cpuset io memory pids" in caught.value.hint
    assert "/etc/systemd/system/user@.service.d/delegate.conf" in caught.value.hint


READ_ONLY = """
import os, sys
from sandbox_kernel.errors import HostError
from sandbox_kernel.linux.cgroup import CgroupTree
try:
    CgroupTree.detect().session("read-only")
except HostError as error:
    print(error)
"""


def test_read_only_cgroupfs_gives_no_session() -> None:
    """In a mount namespace of its own, all cgroup mounts are made read-only."""
    mounts = [
        m for m in parse_mounts(Path("/proc/self/mountinfo").read_text()) if "cgroup" in m.fs_type
    ]
    script = "".join(
        f"mount --bind {p} {p} && mount -o remount,bind,ro {p} && "
        for p in (m.mount_point for m in mounts)
    )
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    argv = ["unshare", "--mount", *user, "sh", "-c", f'{script}exec "$@"', "sh"]
    done = subprocess.run(
        [*argv, sys.executable, "-c", READ_ONLY],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )
    if done.stderr.startswith(("unshare:", "mount:")):
        pytest.skip(done.stderr)
    assert "no cgroup can be made on this host" in done.stdout, done.stderr
    assert "Read-only file system" in done.stdout
    assert "mount cgroups writable" in done.stdout
