"""The gate: which process may call `capset` and `setns`, and how often.

A guest keeps four capabilities of the session's user namespace in its permitted set, so that
it can step into a container. The seccomp filter turns the two calls that could make use of them
into notifications, and here they are answered: for a pid that the kernel has just announced, and
only in the announced order, yes; to everybody else EPERM, always.

Whoever wins a race for the gate gains nothing: see docs/security.md, "The window".
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

from sandbox_kernel.container.build import NAMESPACES
from sandbox_kernel.linux.notify import Notification
from sandbox_kernel.linux.syscalls import NUMBERS


class Verdict(NamedTuple):
    """What a held call gets: an errno (0: it is done already), or leave to go on by itself."""

    error: int = 0
    proceed: bool = False
    then: Callable[[], None] = lambda: None
    """What is to be done once the caller has its answer."""


PROCEED = Verdict(proceed=True)

_CAPSET = NUMBERS[os.uname().machine]["capset"]
_SETNS = NUMBERS[os.uname().machine]["setns"]
GATED = (_CAPSET, _SETNS)

SEQUENCES = {
    # After exec the capabilities that came as ambient ones are effective: drop; then park.
    "boot": (_CAPSET, _CAPSET, _CAPSET),
    # Raise, join the five namespaces, drop.
    "enter": (_CAPSET, *(_SETNS for _ in NAMESPACES), _CAPSET),
    # Raise, become the head's user, drop.
    "park": (_CAPSET, _CAPSET),
    "shut": (),
}


class Gate:
    """Judge calls of `capset` and `setns`; `proc` is where the session's proc is mounted."""

    def __init__(self, *, proc: str) -> None:
        self._proc = proc
        self._open: dict[int, list[int]] = {}

    def announce(self, pid: int, kind: str) -> None:
        """Let `pid` make the calls of one sequence, once; a new announcement voids an old one.

        At most two processes are let in at a time: one that parks, and the next that enters.
        """
        self._open.pop(pid, None)
        while len(self._open) >= 2:
            del self._open[next(iter(self._open))]
        if SEQUENCES[kind]:
            self._open[pid] = list(SEQUENCES[kind])

    def judge(self, call: Notification) -> Verdict:
        """Judge one call; the caller has read all announcements that were sent before."""
        return PROCEED if self._admits(call.pid, call.number) else Verdict(errno.EPERM)

    def _admits(self, pid: int, nr: int) -> bool:
        expected = self._open.get(pid)
        if not expected:
            return False
        # A second thread could change what the first one is about to do: never let it in.
        if expected[0] != nr or self._threads(pid) != 1:
            del self._open[pid]
            return False
        expected.pop(0)
        if not expected:
            del self._open[pid]
        return True

    def _threads(self, pid: int) -> int:
        # A task folder has a link for each thread, beside its own two (fs/proc/base.c); a stat is
        # a tenth of the time that reading a status file takes.
        try:
            return os.stat(f"{self._proc}/{pid}/task").st_nlink - 2
        except OSError:
            return 0
