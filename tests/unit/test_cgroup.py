"""Cgroups over a fake tree: finding the own groups, and what differs from host to host."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox_kernel.errors import ConfigError, HostError
from sandbox_kernel.linux.cgroup import CgroupTree, CgroupUsage, block_devices, session_name
from sandbox_kernel.linux.cgroup_files import CgroupFiles, keyed
from sandbox_kernel.linux.cgroup_v2 import SUPERVISOR
from sandbox_kernel.linux.mountinfo import (
    Hierarchy,
    find_hierarchies,
    mount_of,
    parse_mounts,
    parse_own,
)
from tests.fakes.cgroupfs import DISK, FakeHost

NAME = "sandbox-kernel-1-2-test"
OTHER_USER = "Name:\tx\nUid:\t54321\t54321\t54321\t54321\n"


def detect(host: FakeHost) -> CgroupTree:
    return CgroupTree.detect(proc=host.proc, root=host.root, files=host.files)


@pytest.fixture
def v2(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path, "v2")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that can be moved and killed."""
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


def hierarchies(mountinfo: str, cgroup: str) -> list[Hierarchy]:
    return find_hierarchies(parse_mounts(mountinfo), parse_own(cgroup))


# --- where the own groups are ---------------------------------------------------------------


def test_systemd_v2() -> None:
    found = hierarchies(
        "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
        "0::/user.slice/user-1000.slice/run-1.scope\n",
    )
    own = "/sys/fs/cgroup/user.slice/user-1000.slice/run-1.scope"
    assert found == [Hierarchy(own, frozenset(), unified=True, mount_point="/sys/fs/cgroup")]


def test_hybrid_with_a_group_of_its_own_per_hierarchy() -> None:
    found = hierarchies(
        "33 31 0:30 / /cg/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "35 31 0:32 / /cg/memory rw - cgroup cgroup rw,memory\n"
        "40 31 0:37 / /cg/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
        "41 31 0:38 / /cg/unified rw - cgroup2 cgroup2 rw\n",
        "4:memory:/a/b\n2:cpu,cpuacct:/\n1:name=systemd:/\n9:freezer:/\n0::/\n",
    )
    assert [(h.own, h.unified) for h in found] == [
        ("/cg/unified", True),
        ("/cg/cpu,cpuacct", False),
        ("/cg/memory/a/b", False),
        ("/cg/systemd", False),
    ]
    assert found[1].controllers == {"cpu", "cpuacct"}


def test_mount_of_a_part_as_in_a_container_without_cgroup_namespace() -> None:
    mounts = (
        "35 31 0:32 /docker/x /cg/other ro - cgroup cgroup rw,memory\n"
        "36 31 0:32 /docker/abc /cg/memory ro,nosuid - cgroup cgroup rw,memory\n"
        "37 31 0:32 /docker/abc /cg/my\\040memory rw - cgroup cgroup rw,memory\n"
    )
    assert hierarchies(mounts, "4:memory:/docker/abc/sub\n")[0].own == "/cg/my memory/sub"
    assert hierarchies(mounts, "4:memory:/docker/abc\n")[0].own == "/cg/my memory"
    assert hierarchies(mounts, "4:memory:/docker/abcdef\n") == []


@pytest.mark.parametrize("path", ["/../elsewhere", "/gone (deleted)"])
def test_group_that_cannot_be_reached(path: str) -> None:
    assert hierarchies("30 1 0:26 / /cg rw - cgroup2 cgroup2 rw\n", f"0::{path}\n") == []


def test_lines_that_are_not_understood_are_left_out() -> None:
    assert parse_mounts("\nrubbish\n1 2 3 - x\n") == []
    assert parse_own("\nrubbish\nx:y:z\n") == {}


def test_group_path_with_colons() -> None:
    assert parse_own("0::/a:b\n") == {frozenset(): "/a:b"}


@pytest.mark.parametrize("layout", ["v1", "v2", "hybrid"])
def test_layout(tmp_path: Path, layout: str) -> None:
    assert detect(FakeHost(tmp_path, layout)).layout == layout


def test_host_without_cgroups(v2: FakeHost) -> None:
    (v2.proc / "self/mountinfo").write_text("")
    tree = detect(v2)
    assert tree.layout == "none"
    assert set(tree.missing()) == {"memory", "cpus", "processes", "cpu accounting"}
    with pytest.raises(HostError, match="no cgroup can be made"):
        tree.session(NAME)


# --- which group may be used ----------------------------------------------------------------


class Systemd:
    """Gives scopes, or refuses, and counts how often it was asked."""

    def __init__(self, host: FakeHost, *, refusal: str = "") -> None:
        self.host = host
        self.refusal = refusal
        self.asked = 0
        host.run_systemd()

    def __call__(self) -> str:
        self.asked += 1
        if self.refusal:
            raise HostError(self.refusal, hint="log in anew")
        self.host.move_to(f"/user.slice/app.slice/{SCOPE}")
        return SCOPE


SCOPE = "sandbox-kernel-77-0123abcd.scope"
TERMINAL = "/user.slice/user@1000.service/app.slice/terminal.scope"


def acquire(host: FakeHost, ask: Callable[[], str]) -> CgroupTree:
    return CgroupTree.acquire(proc=host.proc, root=host.root, files=host.files, ask=ask)


def never() -> str:
    raise AssertionError("systemd was asked")


@pytest.fixture(params=["root", "user"])
def who(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return become(request.param, monkeypatch)


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> str:
    return become("user", monkeypatch)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> str:
    return become("root", monkeypatch)


def become(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("os.geteuid", lambda: 0 if name == "root" else 1000)
    return name


@pytest.mark.parametrize("layout", ["v1", "hybrid"])
def test_v1_is_taken_as_it_is(tmp_path: Path, layout: str, who: str) -> None:
    host = FakeHost(tmp_path, layout)
    host.run_systemd()
    assert acquire(host, never).layout == layout


def test_without_systemd_the_own_group_is_used_where_it_can_be(v2: FakeHost, who: str) -> None:
    tree = acquire(v2, never)
    assert (tree.scope, tree.remark) == ("", "")
    with tree.session(NAME) as session:
        assert session.paths == (f"{v2.own('')}/{NAME}",)


def test_group_that_is_not_delegated_is_left(v2: FakeHost, who: str) -> None:
    v2.move_to(TERMINAL)
    systemd = Systemd(v2)
    tree = acquire(v2, systemd)
    assert (tree.scope, tree.remark, systemd.asked) == (SCOPE, "", 1)
    with tree.session(NAME) as session:
        assert session.paths == (f"{v2.own('', f'/user.slice/app.slice/{SCOPE}')}/{NAME}",)
    assert not list(v2.own("", TERMINAL).glob("sandbox*"))


@pytest.mark.parametrize("below", ["", "/sub/group", f"/{SUPERVISOR}"])
def test_delegated_unit_is_used(v2: FakeHost, who: str, below: str) -> None:
    v2.run_systemd()
    v2.move_to(TERMINAL + below)
    v2.delegated = {v2.own("", TERMINAL)}
    expected = TERMINAL + ("" if SUPERVISOR in below else below)
    with acquire(v2, never).session(NAME) as session:
        assert session.paths == (f"{v2.own('', expected)}/{NAME}",)


def test_second_kernel_stays_in_the_scope_of_the_first(v2: FakeHost, who: str) -> None:
    """Older managers of users do not mark what they delegate; the name tells."""
    v2.run_systemd()
    v2.move_to(f"/app.slice/{SCOPE}/{SUPERVISOR}")
    with acquire(v2, never).session(NAME) as session:
        assert session.paths == (f"{v2.own('', f'/app.slice/{SCOPE}')}/{NAME}",)


@pytest.mark.parametrize(("above", "asked"), [(0, 0), (1000, 1)])
def test_unit_that_was_given_to_the_user(v2: FakeHost, user: str, above: int, asked: int) -> None:
    """Without a mark: all groups of a user's manager are the user's, a service's was given."""
    v2.move_to("/system.slice/hub.service")
    v2.owners = {
        v2.own("", "/system.slice/hub.service"): 1000,
        v2.own("", "/system.slice"): above,
    }
    systemd = Systemd(v2)
    acquire(v2, systemd)
    assert systemd.asked == asked


def test_root_of_a_cgroup_namespace_is_used(v2: FakeHost, who: str) -> None:
    v2.run_systemd()
    v2.move_to("/")
    acquire(v2, never)


def test_root_of_the_whole_tree_is_systemds(v2: FakeHost, who: str) -> None:
    v2.move_to("/")
    (v2.mounts / "cgroup.events").unlink()
    systemd = Systemd(v2)
    acquire(v2, systemd)
    assert systemd.asked == 1


@pytest.mark.parametrize("name", ["cgroup.procs", "cgroup.subtree_control"])
def test_delegated_but_not_writable(v2: FakeHost, user: str, name: str) -> None:
    v2.delegated = {v2.own("", TERMINAL)}
    v2.move_to(TERMINAL)
    v2.denied = {name}
    systemd = Systemd(v2, refusal="there is no bus")
    with pytest.raises(HostError) as caught:
        acquire(v2, systemd)
    assert f"{TERMINAL}/{name}: Permission denied" in caught.value.message
    assert "there is no bus" in caught.value.message
    assert caught.value.hint.startswith("log in anew; or as root write")


def test_group_with_processes_of_others_is_left(v2: FakeHost, who: str) -> None:
    v2.delegated = {v2.own("")}
    (v2.own("") / "cgroup.procs").write_text(f"{os.getpid()}\n0\n")
    systemd = Systemd(v2)
    acquire(v2, systemd)
    assert systemd.asked == 1


def test_root_goes_on_in_place_and_says_so(v2: FakeHost, root: str) -> None:
    v2.move_to(TERMINAL)
    tree = acquire(v2, Systemd(v2, refusal="there is no bus"))
    assert "terminal.scope is not delegated; there is no bus" in tree.remark
    with tree.session(NAME) as session:
        assert session.paths == (f"{v2.own('', TERMINAL)}/{NAME}",)


def test_user_without_a_group_gets_none(v2: FakeHost, user: str) -> None:
    v2.move_to(TERMINAL)
    with pytest.raises(HostError, match=r"terminal\.scope is not delegated; .*there is no bus"):
        acquire(v2, Systemd(v2, refusal="there is no bus"))


def test_scope_that_cannot_be_used_either(v2: FakeHost, user: str) -> None:
    v2.move_to(TERMINAL)
    systemd = Systemd(v2)

    def ask() -> str:
        systemd()
        v2.mkdir_errno = errno.EAGAIN
        return SCOPE

    with pytest.raises(HostError, match=f"{SCOPE} cannot be used: .*temporarily unavailable"):
        acquire(v2, ask)


def test_trial_leaves_nothing(v2: FakeHost, who: str) -> None:
    before = sorted(v2.own("").rglob("*"))
    acquire(v2, never)
    assert sorted(v2.own("").rglob("*")) == before


# --- faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EAGAIN, "cgroup.max.descendants"),
        (errno.ENOSPC, "end other kernels or containers"),
        (errno.EROFS, "mount cgroups writable"),
    ],
)
@pytest.mark.parametrize("layout", ["v1", "v2", "hybrid"])
def test_group_that_cannot_be_made(tmp_path: Path, layout: str, number: int, remedy: str) -> None:
    host = FakeHost(tmp_path, layout)
    with detect(host).session(NAME) as session:
        host.mkdir_errno = number
        with pytest.raises(HostError, match=os.strerror(number)) as caught:
            session.child("cell")
        assert remedy in caught.value.hint
        with pytest.raises(HostError, match=os.strerror(number)) as caught:
            detect(host).session("other")
        assert remedy in caught.value.hint
        assert not [path for path in host.mounts.rglob("*") if path.name in ("cell", "other")]


def test_read_only_v2_tree(v2: FakeHost) -> None:
    v2.read_only = {""}
    tree = detect(v2)
    assert set(tree.missing()) == {"memory", "cpus", "processes", "cpu accounting"}
    with pytest.raises(HostError, match="Read-only file system") as caught:
        tree.session(NAME)
    assert "mount cgroups writable" in caught.value.hint


def test_controller_that_is_missing_is_named_by_the_limit(v2: FakeHost) -> None:
    v2.move_to("/user.slice/user@1000.service/app.slice/x.scope")
    group = v2.own("", "/user.slice/user@1000.service/app.slice/x.scope")
    (group / "cgroup.controllers").write_text("memory pids")
    with detect(v2).session(NAME) as session, session.child("cell") as cell:
        cell.limit(memory_bytes=4096, processes=3)
        with pytest.raises(HostError, match="controller cpu is not delegated to") as caught:
            cell.limit(cpus=1)
    assert "'Delegate=cpu cpuset io memory pids'" in caught.value.hint
    assert "systemctl restart user@1000.service" in caught.value.hint


# --- traffic of disks -----------------------------------------------------------------------


def test_io_is_given_only_when_asked_for(v2: FakeHost) -> None:
    tree = detect(v2)
    with tree.session(NAME) as session, session.child("cell") as cell:
        assert not Path(cell.paths[0], "io.max").exists()
    with tree.session(NAME, io=True) as session, session.child("cell") as cell:
        cell.limit(io_bytes_per_s=4096, devices=(DISK,))
        assert Path(cell.paths[0], "io.max").read_text() == "8:0 rbps=4096 wbps=4096"


def test_io_that_is_not_delegated(v2: FakeHost) -> None:
    (v2.own("") / "cgroup.controllers").write_text("cpu memory pids")
    assert detect(v2).missing() == {}
    missing = detect(v2).missing(io=True)
    assert list(missing) == ["io"]
    assert "controller io is not delegated to" in missing["io"]


class Disks:
    """A /sys and a mountinfo that know some devices."""

    def __init__(self, base: Path) -> None:
        self.sys, self.proc = base / "sys", base / "proc"
        (self.sys / "dev/block").mkdir(parents=True)
        (self.proc / "self").mkdir(parents=True)
        self.mounts: list[str] = []

    def add(self, number: str, folder: str, *, partition: bool = False) -> None:
        target = self.sys / "devices" / folder
        target.mkdir(parents=True, exist_ok=True)
        (target / "dev").write_text(f"{number}\n")
        if partition:
            (target / "partition").write_text("1\n")
        (self.sys / "dev/block" / number).symlink_to(target)

    def mount(self, point: Path, fs_type: str, source: str) -> None:
        self.mounts.append(f"1 1 0:9 / {point} rw - {fs_type} {source} rw\n")

    def find(self, *paths: Path) -> tuple[tuple[int, int], ...]:
        (self.proc / "self/mountinfo").write_text("".join(self.mounts))
        return block_devices(paths, sys=self.sys, proc=self.proc)


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


def number_of(path: Path) -> str:
    number = os.stat(path).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def test_partition_counts_as_its_disk(disks: Disks, tmp_path: Path) -> None:
    disks.add("8:0", "sda")
    disks.add(number_of(tmp_path), "sda/sda1", partition=True)
    (tmp_path / "file").touch()
    assert disks.find(tmp_path, tmp_path / "file") == ((8, 0),)


def test_whole_disk_and_mapped_device(disks: Disks, tmp_path: Path) -> None:
    disks.add(number_of(tmp_path), "virtual/block/dm-0")
    number = os.stat(tmp_path).st_dev
    assert disks.find(tmp_path) == ((os.major(number), os.minor(number)),)


@pytest.mark.parametrize(
    ("fs_type", "source"),
    [("tmpfs", "tmpfs"), ("overlay", "overlay"), ("9p", "share"), ("btrfs", "/dev/not-shown")],
)
def test_no_disk(disks: Disks, tmp_path: Path, fs_type: str, source: str) -> None:
    disks.mount(tmp_path, fs_type, source)
    assert disks.find(tmp_path) == ()


def test_btrfs_tells_its_device_by_the_mount(disks: Disks, tmp_path: Path) -> None:
    """/dev/null stands for the device: its number is the same everywhere."""
    disks.add("1:3", "nvme0n1")
    disks.mount(Path("/"), "ext4", "/dev/other")
    disks.mount(tmp_path, "btrfs", "/dev/null")
    assert disks.find(tmp_path / "proc") == ((1, 3),)


def test_path_that_is_not_there(disks: Disks, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        disks.find(tmp_path / "none")


def test_mount_of_a_path() -> None:
    mounts = parse_mounts(
        "1 1 0:1 / / rw - ext4 /dev/a rw\n"
        "2 1 0:2 / /home rw - ext4 /dev/b rw\n"
        "3 1 0:3 / /home rw - ext4 /dev/over rw\n"
        "4 1 0:4 / /home/x\\040y rw - tmpfs t rw\n"
    )
    found = {p: mount_of(p, mounts) for p in ("/", "/homes", "/home", "/home/a", "/home/x y/z")}
    assert [m and m.source for m in found.values()] == [
        "/dev/a",
        "/dev/a",
        "/dev/over",
        "/dev/over",
        "t",
    ]
    assert mount_of("/", []) is None


# --- sessions on v2 -------------------------------------------------------------------------


def test_own_processes_move_into_a_leaf(v2: FakeHost) -> None:
    with detect(v2).session(NAME) as session:
        assert session.paths == (f"{v2.own('')}/{NAME}",)
        assert v2.members(v2.own("")) == []
        assert v2.members(v2.own("") / SUPERVISOR) == [os.getpid()]
        assert (v2.own("") / "cgroup.subtree_control").read_text() == "cpu memory pids"
        with session.child("cell") as cell:
            cell.limit(memory_bytes=4096, cpus=1.5, processes=3)
            assert Path(cell.paths[0], "cpu.max").read_text() == "150000 100000"
            assert Path(cell.paths[0], "memory.swap.max").read_text() == "0"


def test_second_kernel_in_the_same_scope_goes_beside_the_first(v2: FakeHost) -> None:
    with detect(v2).session(NAME):
        (v2.proc / "self/cgroup").write_text(f"0::/user/scope/{SUPERVISOR}\n")
        with detect(v2).session(NAME + "2") as second:
            assert second.paths == (f"{v2.own('')}/{NAME}2",)


def test_oom_takes_a_whole_cell_but_never_a_whole_session(v2: FakeHost) -> None:
    with detect(v2).session(NAME) as session, session.child("cell") as cell:
        session.limit(memory_bytes=4096)
        cell.limit(memory_bytes=4096)
        assert Path(session.paths[0], "memory.oom.group").read_text() == "0"
        assert Path(cell.paths[0], "memory.oom.group").read_text() == "1"


@pytest.mark.parametrize("who", ["other user", "other namespace"])
def test_processes_of_others_are_not_moved(v2: FakeHost, who: str) -> None:
    parent = os.getppid()
    (v2.proc / str(parent)).mkdir()
    (v2.proc / str(parent) / "status").write_text(OTHER_USER)
    pid = parent if who == "other user" else 0
    (v2.own("") / "cgroup.procs").write_text(f"{os.getpid()}\n{pid}\n")
    tree = detect(v2)
    with tree.session(NAME) as session:
        with pytest.raises(HostError, match="cannot limit memory"):
            session.limit(memory_bytes=4096)
        assert session.usage().cpu_s == 2.0
    missing = tree.missing()
    assert set(missing) == {"memory", "cpus", "processes"}
    assert f"[{pid}]" in missing["memory"]
    assert "systemd-run" in missing["memory"]
    assert v2.members(v2.own("")) == [os.getpid(), pid]


def test_controller_that_is_not_delegated_is_named(v2: FakeHost) -> None:
    (v2.own("") / "cgroup.controllers").write_text("memory pids")
    missing = detect(v2).missing()
    assert list(missing) == ["cpus"]
    assert "controller cpu is not delegated to" in missing["cpus"]
    assert "Delegate=cpu" in missing["cpus"]


def test_probe_leaves_everything_as_it_was(v2: FakeHost) -> None:
    assert detect(v2).missing() == {}
    assert v2.members(v2.own("")) == [os.getpid()]
    assert (v2.own("") / "cgroup.subtree_control").read_text() == ""
    assert not (v2.own("") / SUPERVISOR).exists()


def test_probe_after_a_session_leaves_that_alone(v2: FakeHost) -> None:
    tree = detect(v2)
    with tree.session(NAME):
        assert tree.missing() == {}
        assert v2.members(v2.own("") / SUPERVISOR) == [os.getpid()]


def test_older_kernels(v2: FakeHost) -> None:
    """Before 5.19 there is no memory.peak, before 5.2 no memory.events.local."""
    with detect(v2).session(NAME) as session, session.child("cell") as cell:
        path = Path(cell.paths[0])
        for name in ("memory.peak", "memory.events.local", "pids.peak", "memory.swap.max"):
            (path / name).unlink()
        cell.limit(memory_bytes=4096)
        (path / "memory.events").write_text("low 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 1\n")
        (path / "pids.events").write_text("max 7\n")
        assert cell.usage() == CgroupUsage(2.0, 4096, None, None, 2, 3, 7)


# --- v1 and hybrid --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("v1", ["cpu,cpuacct", "memory", "pids", "freezer"]),
        ("hybrid", ["unified", "cpu,cpuacct", "memory", "pids"]),
    ],
)
def test_only_the_hierarchies_that_are_needed(
    tmp_path: Path, layout: str, expected: list[str]
) -> None:
    host = FakeHost(tmp_path, layout)
    with detect(host).session(NAME) as session:
        assert session.paths == tuple(f"{host.own(name)}/{NAME}" for name in expected)
        assert host.members(host.own("memory")) == [os.getpid()]


def test_v1_usage(tmp_path: Path) -> None:
    with detect(FakeHost(tmp_path, "v1")).session(NAME) as session:
        memory = Path(session.paths[1])
        (memory / "memory.oom_control").write_text("under_oom 1\noom_kill 4\n")
        assert session.usage() == CgroupUsage(2.0, 4096, 8192, 3, 4, 4, 0)


def test_v1_without_swap_accounting(tmp_path: Path) -> None:
    with detect(FakeHost(tmp_path, "v1")).session(NAME) as session:
        memory = Path(session.paths[1])
        (memory / "memory.memsw.limit_in_bytes").unlink()
        session.limit(memory_bytes=4096)
        assert (memory / "memory.limit_in_bytes").read_text() == "4096"
        assert (memory / "memory.swappiness").read_text() == "0"


def test_hierarchy_that_cannot_be_written_costs_only_its_limit(tmp_path: Path) -> None:
    host = FakeHost(tmp_path, "hybrid")
    host.read_only = {"memory"}
    tree = detect(host)
    missing = tree.missing()
    assert list(missing) == ["memory"]
    assert "Read-only file system" in missing["memory"]
    assert "mount cgroups writable" in missing["memory"]
    with tree.session(NAME) as session:
        session.limit(processes=3)
        with pytest.raises(HostError, match="cannot limit memory"):
            session.limit(memory_bytes=4096)


def test_group_that_exists_in_one_hierarchy_is_made_in_none(tmp_path: Path) -> None:
    host = FakeHost(tmp_path, "hybrid")
    (host.own("pids") / NAME).mkdir()
    with pytest.raises(HostError, match="File exists"):
        detect(host).session(NAME)
    assert not (host.own("memory") / NAME).exists()
    with detect(host).session("other") as session:
        Path(session.paths[-1], "cell").mkdir()
        with pytest.raises(HostError, match="choose another name"):
            session.child("cell")
        assert not Path(session.paths[0], "cell").exists()
        host.fill(Path(session.paths[-1], "cell"))


@pytest.mark.parametrize("layout", ["v1", "v2", "hybrid"])
def test_kill_without_cgroup_kill(
    tmp_path: Path, layout: str, sleeper: subprocess.Popen[bytes]
) -> None:
    host = FakeHost(tmp_path, layout)
    host.kernel_has_kill = False
    with detect(host).session(NAME) as session, session.child("cell") as cell:
        cell.add(sleeper.pid)
        session.kill()
        assert sleeper.wait(timeout=1) == -9


# --- names and left-overs -------------------------------------------------------------------


def test_session_name_tells_the_owner() -> None:
    stat = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()
    assert session_name("a-b_1") == f"sandbox-kernel-{os.getpid()}-{stat[19]}-a-b_1"
    with pytest.raises(ConfigError, match="cannot be the name"):
        session_name("../x")


def test_sweep_reads_a_start_time_behind_any_command_name(v2: FakeHost) -> None:
    (v2.proc / "77").mkdir()
    (v2.proc / "77/stat").write_text("77 (a) R) 1 (x) R " + " ".join(map(str, range(4, 30))))
    tree = detect(v2)
    with tree.session("sandbox-kernel-77-22-x") as living, tree.session("sandbox-kernel-77-9-x"):
        assert tree.sweep() == ["sandbox-kernel-77-9-x"]
        assert Path(living.paths[0]).exists()


def test_sweep_leaves_what_another_pid_namespace_owns(v2: FakeHost) -> None:
    tree = detect(v2)
    with tree.session("sandbox-kernel-4194305-1-x") as session:
        procs = Path(session.paths[0], "cgroup.procs")
        procs.write_text("0\n")
        assert tree.sweep() == []
        procs.write_text("")
        assert tree.sweep() == [session.name]


def test_keyed_takes_whole_names() -> None:
    assert keyed("oom_kill_disable 5\nunder_oom 6\noom_kill 7\n", "oom_kill") == 7
    assert keyed("a 1\n", "b") == 0


def test_long_files_are_read_to_the_end(tmp_path: Path) -> None:
    text = "\n".join(map(str, range(20000)))
    (tmp_path / "cgroup.procs").write_text(text)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert CgroupFiles().read(fd, "cgroup.procs") == text
    finally:
        os.close(fd)
