"""Where hubs and containers start kernels: in a unit's or a namespace's cgroup, without a login.

Run as root. Each kernel is a real one, which Jupyter's own client starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox_kernel.linux.cgroup_v2 import SUPERVISOR
from sandbox_kernel.linux.scope import UNIT_NAME
from tests.vm.inside import talk
from tests.vm.inside.talk import Program

NOTEBOOK = talk.module("notebook")
EXHAUST = "held = []\nwhile True: held.append(bytearray(8 << 20))"
DELEGATED = "Delegate=yes"
NO_SYSTEMD = "mount -t tmpfs none /run/systemd"
NEW_TREE = "umount --lazy /sys/fs/cgroup\nmount -t cgroup2 none /sys/fs/cgroup"
# A container's runtime stays outside of its group, and gives it controllers.
RUNTIME = """\
cd /sys/fs/cgroup/system.slice/{name}
mkdir runtime container
echo 0 > runtime/cgroup.procs
echo +cpu +memory +pids > cgroup.subtree_control"""

Start = Callable[[list[str]], Program]
_numbers = itertools.count()


@pytest.fixture
def start() -> Iterator[Start]:
    """Give a function that starts a program; each must end well."""
    started: list[Program] = []

    def begin(argv: list[str]) -> Program:
        started.append(Program(argv))
        return started[-1]

    yield begin
    assert [program.close() for program in started] == [0] * len(started)


def unit(*properties: str, scope: bool = False) -> tuple[str, list[str]]:
    """Give the name of a new unit of the system, and the command that runs others in it."""
    kind = "scope" if scope else "service"
    name = f"hub-{next(_numbers)}.{kind}"
    how = ["--scope"] if scope else ["--wait", "--pipe", "--working-directory=/src"]
    given = [f"--property={one}" for one in properties]
    return name, ["systemd-run", "--quiet", "--collect", f"--unit={name}", *how, *given]


def assert_works(program: Program) -> None:
    """Run the cells that show a session, a limit and a roll back."""
    assert program.run("x = 1")["status"] == "ok"
    killed = program.run(EXHAUST)
    assert killed["ename"] == "MemoryLimitExceeded", killed
    assert "192 MiB" in killed["evalue"]
    after = program.run("print(x)")
    assert (after["status"], after["text"]) == ("ok", "1\n"), after


@pytest.mark.parametrize("user", ["User=ranged", "User=plain", "DynamicUser=yes"])
def test_a_delegated_unit_is_enough(start: Start, user: str) -> None:
    name, run = unit(DELEGATED, user)
    program = start([*run, *NOTEBOOK])
    group = f"/system.slice/{name}"
    assert program.begun["own"] == group
    assert program.begun["uid"] != 0
    assert_works(program)
    # No scope was asked for: the kernel is in a leaf of its unit, and cells are beside that.
    assert program.begun["kernel"] == f"{group}/{SUPERVISOR}"
    assert program.run(None)["cgroup"].startswith(f"{group}/sandbox-kernel-")


def test_a_unit_that_is_not_delegated_is_named_with_what_to_write(start: Start) -> None:
    name, run = unit("DynamicUser=yes")
    program = start([*run, *NOTEBOOK])
    for _ in range(2):
        ran = program.run("x = 1")
        assert (ran["status"], ran["ename"]) == ("error", "HostError")
        assert "no cgroup for this kernel" in ran["evalue"]
        assert f"/system.slice/{name}" in ran["evalue"]
        assert f"add 'Delegate=yes' below [Service]: systemctl edit {name}" in ran["evalue"]


def test_a_unit_that_is_not_delegated_is_left_where_the_user_has_a_manager(start: Start) -> None:
    _, run = unit("User=ranged")
    program = start([*run, *NOTEBOOK])
    assert_works(program)
    above, _, leaf = program.run(None)["cgroup"].partition("/sandbox-kernel-")
    assert above == "/user.slice/user-1000.slice/user@1000.service/app.slice"
    assert UNIT_NAME.fullmatch(f"sandbox-kernel-{leaf}".split("/")[0])


@pytest.mark.parametrize("hidden", [NO_SYSTEMD, "true"], ids=["alone", "beside systemd"])
def test_a_cgroup_namespace_is_enough(start: Start, hidden: str) -> None:
    """As a container has it: its own group is the root of the tree that it sees."""
    name, run = unit(DELEGATED, scope=True)
    inner = talk.apart(f"{NEW_TREE}\n{hidden}", NOTEBOOK, "--cgroup")
    program = start([*run, *inner])
    assert program.begun["own"] == "/"
    assert_works(program)
    assert program.begun["kernel"] == f"/{SUPERVISOR}"
    assert program.run(None)["cgroup"].startswith("/sandbox-kernel-")
    assert Path(f"/sys/fs/cgroup/system.slice/{name}/{SUPERVISOR}").is_dir()


def test_a_container_with_processes_of_its_own_is_enough(start: Start) -> None:
    name, run = unit(DELEGATED, scope=True)
    inner = talk.apart(f"{NEW_TREE}\n{NO_SYSTEMD}", NOTEBOOK, "--cgroup", "--mount-proc")
    enter = talk.behind(f"echo 0 > container/cgroup.procs\ncd {talk.SOURCE}", inner)
    runtime = talk.behind(RUNTIME.format(name=name), ["unshare", "--pid", "--fork", *enter])
    program = start([*run, *runtime])
    assert program.begun["own"] == "/"
    assert_works(program)


def test_a_login_without_a_bus_asks_systemd_itself(start: Start) -> None:
    """As where the package dbus-user-session is not installed."""
    no_bus = "mount --bind /dev/null /run/user/1000/bus"
    program = start(talk.apart(no_bus, talk.login("ranged", NOTEBOOK)))
    assert_works(program)
    group = program.run(None)["cgroup"]
    assert group.startswith("/user.slice/user-1000.slice/user@1000.service/app.slice/")


def test_a_root_without_a_bus_asks_systemd_itself(start: Start) -> None:
    no_bus = "mount --bind /dev/null /run/dbus/system_bus_socket"
    program = start(talk.apart(no_bus, NOTEBOOK))
    assert_works(program)
    assert program.run(None)["cgroup"].startswith("/system.slice/sandbox-kernel-")
