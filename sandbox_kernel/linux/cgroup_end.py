"""How a group ends: kill its processes without cgroup.kill, and remove its directories."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import cgroup_v1, cgroup_v2
from sandbox_kernel.linux.cgroup_files import CgroupFiles

KILL_TIMEOUT_S = 5.0
ROUND_FREEZE_S = 0.05


def kill_members(
    name: str,
    members: Callable[[], list[int]],
    freeze: Callable[[float], bool],
    thaw: Callable[[], None],
) -> None:
    """Freeze, kill and thaw until nothing is left; raise HostError when something survives."""
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    while pids := members():
        if time.monotonic() > deadline_s or not any(pids):
            raise HostError(
                f"processes {pids} of cgroup {name} survive SIGKILL",
                hint="they hang in the kernel, or are out of this PID namespace",
            )
        # Not all may stand still in time, or none in a tree that was made read-only; the forks
        # that got away are in the next round.
        with contextlib.suppress(HostError):
            freeze(ROUND_FREEZE_S)
        try:
            pidfds = _signal(pids, members)
        finally:
            # A v1 freezer delivers the signal on thawing only.
            with contextlib.suppress(HostError):
                thaw()
        _await_end(pidfds, deadline_s)


def _signal(pids: list[int], members: Callable[[], list[int]]) -> list[int]:
    """Kill the processes, and return the pidfds of those."""
    pidfds: dict[int, int] = {}
    for pid in filter(None, pids):
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            pidfds[pid] = os.pidfd_open(pid)
    # A pid may have been used again before the pidfd was opened: only who is a member
    # after that is the one that was meant.
    still = set(members())
    for pid in pidfds.keys() - still:
        os.close(pidfds.pop(pid))
    for pidfd in pidfds.values():
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return list(pidfds.values())


def _await_end(pidfds: list[int], deadline_s: float) -> None:
    """Wait until all processes have ended, at most until the deadline; close the pidfds."""
    waiting = set(pidfds)
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    try:
        while waiting and (left_s := deadline_s - time.monotonic()) > 0:
            for pidfd, _ in poll.poll(left_s * 1000):
                poll.unregister(pidfd)
                waiting.discard(pidfd)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def remove_dir(files: CgroupFiles, path: str, *, unified: bool, deadline_s: float) -> None:
    """Remove a group's directory in one hierarchy with those inside; one that is gone is fine.

    Waits for processes that are just leaving; raises EBUSY when one is left at the deadline.
    """
    while True:
        try:
            files.remove_dir(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() > deadline_s:
                raise
        _empty_dir(files, path, unified=unified, deadline_s=deadline_s)


def _empty_dir(files: CgroupFiles, path: str, *, unified: bool, deadline_s: float) -> None:
    """Remove the groups inside, and wait until the last process has left."""
    try:
        fd = files.open_dir(path)
    except FileNotFoundError:
        return
    try:
        for name in files.subdirs(fd):
            remove_dir(files, f"{path}/{name}", unified=unified, deadline_s=deadline_s)
        left_s = deadline_s - time.monotonic()
        if unified:
            cgroup_v2.wait_event(files, fd, "populated", wanted=0, timeout_s=left_s)
        else:
            cgroup_v1.settle(lambda: not files.read(fd, "cgroup.procs"), left_s)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # else removed meanwhile
            raise
    finally:
        os.close(fd)
