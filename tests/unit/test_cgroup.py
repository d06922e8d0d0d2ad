"""Cgroups over a fake tree: finding the own groups, and what differs from host to host."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_kernel.errors import ConfigError, HostError
from sandbox_kernel.linux.cgroup import CgroupTree, CgroupUsage, session_name
from sandbox_kernel.linux.cgroup_files import CgroupFiles, keyed
from sandbox_kernel.linux.cgroup_v2 import SUPERVISOR
from sandbox_kernel.linux.mountinfo import Hierarchy, find_hierarchies, parse_mounts, parse_own
from tests.fakes.cgroupfs import FakeHost

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
    assert found == [Hierarchy(own, frozenset(), unified=True)]


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
    assert "run as root" in missing["memory"]
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
