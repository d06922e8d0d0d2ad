"""Signals in a session with one user id: a cell reaches its own processes, and no others."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox_kernel.container.gate import PROCEED
from sandbox_kernel.container.signals import Signals
from sandbox_kernel.linux.notify import Notification
from sandbox_kernel.linux.syscalls import NUMBERS

Start = Callable[[str], subprocess.Popen[bytes]]
NUMBERS_HERE = NUMBERS[os.uname().machine]
ALL = 0xFFFFFFFFFFFFFFFF  # -1 as a register holds it


class Host:
    """A proc that says which cell a process is in; the processes are real."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        self.signals = Signals(proc=str(proc))
        self.caller = os.getpid()
        self.waits = True
        self.put(self.caller, "cell")

    def put(self, pid: int, cell: str, *, threads: int = 1) -> None:
        folder = self.proc / str(pid)
        (folder / "fdinfo").mkdir(parents=True)
        (folder / "cgroup").write_text(f"0::/session/{cell}\n")
        (folder / "status").write_text(f"Tgid:\t{pid}\nThreads:\t{threads}\n")
        (folder / "task" / str(pid)).mkdir(parents=True)

    def judge(self, name: str, *args: int) -> tuple[int, bool]:
        call = Notification(1, self.caller, NUMBERS_HERE[name], (*args, 0, 0, 0, 0, 0, 0)[:6])
        verdict = self.signals.judge(call, lambda: self.waits)
        return verdict.error, verdict.proceed


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def start(host: Host) -> Iterator[Start]:
    running: list[subprocess.Popen[bytes]] = []

    def begin(cell: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        running.append(process)
        host.put(process.pid, cell)
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()


ONE = {
    "kill": lambda pid: (pid, 15),
    "tkill": lambda pid: (pid, 15),
    "tgkill": lambda pid: (pid, pid, 15),
    "rt_sigqueueinfo": lambda pid: (pid, 15, 0),
    "rt_tgsigqueueinfo": lambda pid: (pid, pid, 15, 0),
}


@pytest.mark.parametrize("name", ONE)
def test_a_process_of_the_same_cell_gets_the_signal(host: Host, start: Start, name: str) -> None:
    process = start("cell")
    assert host.judge(name, *ONE[name](process.pid)) == (0, False)
    assert process.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize("name", ONE)
def test_a_head_does_not(host: Host, start: Start, name: str) -> None:
    head = start("heads")
    assert host.judge(name, *ONE[name](head.pid)) == (errno.EPERM, False)
    assert head.poll() is None


def test_the_caller_signals_itself_without_init(host: Host) -> None:
    assert host.judge("kill", host.caller, 15) == (0, True)
    assert host.judge("tgkill", host.caller, host.caller, 15) == (0, True)
    assert host.judge("tkill", host.caller, 15) == (0, True)


def test_who_does_not_wait_any_more_moves_nothing(host: Host, start: Start) -> None:
    mine = start("cell")
    host.waits = False  # the pid that asked may be another process by now
    assert host.judge("kill", mine.pid, 9) == (errno.ESRCH, False)
    assert host.judge("kill", ALL, 9) == (errno.ESRCH, False)
    assert mine.poll() is None


def test_nobody(host: Host) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert host.judge("kill", process.pid, 15) == (errno.ESRCH, False)
    assert host.judge("prlimit64", process.pid, 7) == (errno.ESRCH, False)


def test_all_means_all_of_the_cell_but_the_caller(host: Host, start: Start) -> None:
    mine, head = start("cell"), start("heads")
    assert host.judge("kill", ALL, 9) == (0, False)
    assert mine.wait(5) == -signal.SIGKILL
    assert head.poll() is None


def test_of_a_group_the_cell_s_members(host: Host, start: Start) -> None:
    mine, head = start("cell"), start("heads")
    assert host.judge("kill", ALL + 1 - mine.pid, 15) == (0, False)
    assert mine.wait(5) == -signal.SIGTERM
    assert host.judge("kill", ALL + 1 - head.pid, 15) == (errno.ESRCH, False)
    assert head.poll() is None


def test_by_pidfd(host: Host, start: Start) -> None:
    mine, head = start("cell"), start("heads")
    for number, process in ((5, mine), (6, head)):
        (host.proc / str(host.caller) / "fdinfo" / str(number)).write_text(f"Pid:\t{process.pid}\n")
    assert host.judge("pidfd_send_signal", 5, 15, 0, 0) == (0, False)
    assert mine.wait(5) == -signal.SIGTERM
    assert host.judge("pidfd_send_signal", 6, 15, 0, 0) == (errno.EPERM, False)
    assert head.poll() is None
    assert host.judge("pidfd_send_signal", 7, 15, 0, 0) == (errno.EBADF, False)


@pytest.mark.parametrize("name", ["prlimit64", "sched_setaffinity", "sched_setscheduler"])
def test_only_processes_of_the_cell_can_be_steered(host: Host, start: Start, name: str) -> None:
    assert host.judge(name, start("cell").pid, 0) == (0, PROCEED.proceed)
    assert host.judge(name, start("heads").pid, 0) == (errno.EPERM, False)


def test_priorities_of_groups_and_users_are_not_set(host: Host, start: Start) -> None:
    process_, user = 0, 2
    assert host.judge("setpriority", process_, start("cell").pid, 5) == (0, True)
    assert host.judge("setpriority", process_, start("heads").pid, 5) == (errno.EPERM, False)
    assert host.judge("setpriority", user, 1000, 5) == (errno.EPERM, False)
