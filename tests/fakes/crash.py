"""Run something again and again, and kill it before its first, second, third ... act on files.

Every run is a fork of this process, which must have one thread. What it started is waited for, so
that nothing of a dead run is still at work when the next begins.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from sandbox_kernel.linux import libc

# What Python reports by itself, of what changes files or locks ...
AUDITED = frozenset(
    {
        "fcntl.flock",
        "open",
        "os.chmod",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.utime",
        "subprocess.Popen",
    }
)
# ... and what it does not.
WRAPPED = ("close", "fsync", "write")
DONE = 0
FAILED = 1


class Death:
    """Counts acts, and kills its own process before the one that it is told."""

    def __init__(self) -> None:
        self.left = -1
        sys.addaudithook(lambda event, _: self.act(event) if event in AUDITED else None)
        for name in WRAPPED:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def act(self, what: str) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.act(name)
            return function(*arguments, **named)

        return counted


def run(death: Death, left: int, job: Callable[[], None]) -> int:
    """Run a job in a fork, killed before act number `left`, or never if negative; give its end."""
    pid = os.fork()
    if pid == 0:
        try:
            death.left = left
            job()
        except BaseException:
            death.left = -1
            sys.excepthook(*sys.exc_info())
            os._exit(FAILED)
        death.left = -1
        os._exit(DONE)
    _, status = os.waitpid(pid, 0)
    death.left = -1
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return os.waitstatus_to_exitcode(status)


def everywhere(
    job: Callable[[], None], before: Callable[[], None], after: Callable[[], None]
) -> int:
    """Run a job until no kill comes anymore; give how many came.

    `before` prepares each run, `after` raises what it does not like.
    """
    libc.set_child_subreaper(reaper=True)
    death = Death()
    number = 0
    while True:
        before()
        end = run(death, number, job)
        if end == DONE:
            return number
        if end != -signal.SIGKILL:
            raise AssertionError(f"the job failed before act {number}: status {end}")
        # In a fork too, so that locks and leases end with it.
        if run(death, -1, after) != DONE:
            raise AssertionError(f"what a kill before act {number} left is not right")
        number += 1
