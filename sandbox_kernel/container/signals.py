"""Signals inside a session with one user id: a cell reaches its own processes, and no other.

With ids of their own, heads are out of a cell's reach by Linux' own rule (kill(2)). An ordinary
user without a range in /etc/subuid has but one id to give, so the filter holds each call that
signals or steers a process, and init decides: whoever is in the caller's cgroup is of its cell.

A call to the caller itself goes on: its arguments are in registers and cannot change any more.
Everything else init does in the caller's place and by pidfd, so that no pid can have been used
again between the look and the act. The signal's sender is init then, and a value that
sigqueue(3) would carry is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from typing import NamedTuple

from sandbox_kernel.container.gate import PROCEED, Verdict
from sandbox_kernel.linux.notify import Notification
from sandbox_kernel.linux.seccomp import ONE_PROCESS, SIGNALLING, STEERING
from sandbox_kernel.linux.syscalls import NUMBERS

_NUMBERS = NUMBERS[os.uname().machine]
_NAMES = {_NUMBERS[name]: name for name in (*SIGNALLING, *STEERING)}
_ROUNDS = 32
"""How often the processes of a cell are listed anew while some of them fork."""
_NO_SUCH = Verdict(errno.ESRCH)
_DENIED = Verdict(errno.EPERM)


def _int(register: int) -> int:
    """Read a C int from a register."""
    low = register & 0xFFFFFFFF
    return low - (1 << 32) if low >= 1 << 31 else low


class _Caller(NamedTuple):
    pid: int
    cell: bytes
    """Its cgroup, as /proc/PID/cgroup has it."""


class Signals:
    """Judge calls that name other processes; `proc` is where the session's proc is mounted."""

    def __init__(self, *, proc: str) -> None:
        self._proc = proc

    def judge(self, call: Notification, still_waits: Callable[[], bool]) -> Verdict:
        """Judge one call, and do what it asks for if it may and does not concern the caller.

        `still_waits` tells whether the caller does: else its pid may be another's by now.
        """
        name = _NAMES.get(call.number, "")
        try:
            pid = int(self._status(call.pid, "Tgid"))
            caller = _Caller(pid, self._cell(pid))
            if not still_waits():
                return _NO_SUCH
            if name in STEERING:
                return self._steer(caller, name, call.args)
            return self._signal(caller, name, call)
        except (FileNotFoundError, ProcessLookupError):  # the caller died
            return _NO_SUCH

    def _steer(self, caller: _Caller, name: str, args: tuple[int, ...]) -> Verdict:
        if name in ONE_PROCESS and _int(args[0]) != ONE_PROCESS[name]:
            return _DENIED
        pid = _int(args[STEERING[name]])
        if not os.path.exists(f"{self._proc}/{pid}"):
            return _NO_SUCH
        return PROCEED if self._cell(pid) == caller.cell else _DENIED

    def _signal(self, caller: _Caller, name: str, call: Notification) -> Verdict:
        args = call.args
        if name == "pidfd_send_signal":
            return self._by_descriptor(caller, call)
        if name in ("tgkill", "rt_tgsigqueueinfo"):
            return self._one(caller, _int(args[0]), _int(args[2]))
        target, number = _int(args[0]), _int(args[1])
        if name == "tkill" and os.path.exists(f"{self._proc}/{caller.pid}/task/{target}"):
            return PROCEED
        if name != "kill" or target > 0:
            return self._one(caller, target, number)
        return self._many(caller, target, number)

    def _by_descriptor(self, caller: _Caller, call: Notification) -> Verdict:
        """Signal whom a pidfd of the caller means; to itself by that way only without threads."""
        try:
            with open(f"{self._proc}/{call.pid}/fdinfo/{_int(call.args[0])}", "rb") as file:
                fields = dict(line.split(b":", 1) for line in file.read().splitlines())
        except FileNotFoundError:
            return Verdict(errno.EBADF)
        target = int(fields.get(b"Pid", b"0"))
        if target <= 0:
            return _NO_SUCH if target else Verdict(errno.EBADF)
        if target == caller.pid and int(self._status(caller.pid, "Threads")) > 1:
            return _DENIED  # another thread could exchange the descriptor meanwhile
        return self._one(caller, target, _int(call.args[1]))

    def _one(self, caller: _Caller, target: int, number: int) -> Verdict:
        if target == caller.pid:
            return PROCEED
        if target <= 0:
            return Verdict(errno.EINVAL)
        return Verdict(self._send(target, number, caller.cell))

    def _many(self, caller: _Caller, target: int, number: int) -> Verdict:
        """Signal a process group (0: the caller's, -N: group N), or all of the cell (-1)."""
        if not 0 <= number <= signal.NSIG:
            return Verdict(errno.EINVAL)
        own_group = self._group(caller.pid)
        group = own_group if target == 0 else -target
        everybody = target == -1
        done: set[int] = set()
        for _ in range(_ROUNDS):
            members = self._members(caller.cell) - done - {caller.pid}
            meant = {pid for pid in members if everybody or self._group(pid) == group}
            if not meant:
                break
            for pid in meant:
                self._send(pid, number, caller.cell)
            done |= meant
        # The caller is of its own group, but kill(2) with -1 leaves it out.
        if everybody or own_group != group:
            return Verdict(0 if done or everybody else errno.ESRCH)

        def to_caller() -> None:
            self._send(caller.pid, number, caller.cell)

        # A signal before the answer would have the caller's call restarted, and so sent twice.
        return Verdict(then=to_caller)

    def _send(self, pid: int, number: int, cell: bytes) -> int:
        """Send a signal to a process of a cell; give an errno."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            return error.errno or errno.ESRCH
        try:
            if self._cell(pid) != cell:
                return errno.EPERM
            signal.pidfd_send_signal(pidfd, number)
        except FileNotFoundError:
            return errno.ESRCH
        except OSError as error:
            return error.errno or errno.EPERM
        finally:
            os.close(pidfd)
        return 0

    def _members(self, cell: bytes) -> set[int]:
        """List the processes of a cell."""
        members = set()
        for name in os.listdir(self._proc):
            if name.isdigit():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if self._cell(int(name)) == cell:
                        members.add(int(name))
        return members

    def _cell(self, pid: int) -> bytes:
        """Tell which cgroup a process is in, as only the kernel of the session can change it."""
        with open(f"{self._proc}/{pid}/cgroup", "rb") as file:
            return file.read()

    def _group(self, pid: int) -> int:
        """Give the process group; 0 for a process that has just ended."""
        try:
            return os.getpgid(pid)
        except ProcessLookupError:
            return 0

    def _status(self, pid: int, field: str) -> str:
        with open(f"{self._proc}/{pid}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name == field:
                    return value.strip()
        raise ProcessLookupError(pid)
