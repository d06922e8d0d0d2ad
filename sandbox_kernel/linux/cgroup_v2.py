"""The files of the v2 tree, and its rule that only leaves hold processes.

All functions take the files and the fd of the group's directory, and raise OSError.
See Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time

from sandbox_kernel.linux.cgroup_files import CgroupFiles, keyed

CPU_PERIOD_US = 100_000
SUPERVISOR = "sandbox-kernel-supervisor"
"""The leaf into which the processes of the own group move, so that it may have children with
controllers; shared by all kernels that were started in the same group."""
MOVE_ROUNDS = 16


def set_memory(files: CgroupFiles, fd: int, limit_bytes: int, *, oom_group: bool) -> None:
    """Limit memory without swap; with `oom_group` an OOM takes all processes of the group."""
    files.write(fd, "memory.max", str(limit_bytes))
    # Missing where swap is not accounted; then there is none to limit, or the host was told so.
    files.write_optional(fd, "memory.swap.max", "0")
    if oom_group:
        files.write_optional(fd, "memory.oom.group", "1")


def set_cpus(files: CgroupFiles, fd: int, cpus: float) -> None:
    """Limit cpu time to `cpus` seconds a second."""
    files.write(fd, "cpu.max", f"{int(cpus * CPU_PERIOD_US)} {CPU_PERIOD_US}")


def set_io(files: CgroupFiles, fd: int, device: tuple[int, int], bytes_per_s: int) -> None:
    """Limit what is read from a disk and written to it, in bytes a second each.

    With the memory controller also what is written back later from the page cache. Raises ENODEV.
    """
    text = f"{device[0]}:{device[1]} rbps={bytes_per_s} wbps={bytes_per_s}"
    files.write(fd, "io.max", text)


def lift_io(files: CgroupFiles, fd: int) -> None:
    """Take the limits of all disks off."""
    for line in files.read(fd, "io.max").splitlines():
        files.write(fd, "io.max", f"{line.split()[0]} rbps=max wbps=max")


def memory_usage(files: CgroupFiles, fd: int) -> tuple[int, int | None, int, int]:
    """Read memory in use, its peak (5.19), the OOM kills and the OOM events of this very group."""
    peak = files.read_optional(fd, "memory.peak")
    events = files.read_optional(fd, "memory.events.local")
    if events is None:  # before 5.2: with those of the groups below
        events = files.read(fd, "memory.events")
    current = int(files.read(fd, "memory.current"))
    kills = keyed(events, "oom_kill")
    return current, None if peak is None else int(peak), kills, keyed(events, "oom")


def cpu_s(files: CgroupFiles, fd: int) -> float:
    """Read the cpu time used, in seconds; counted in every group, with or without controllers."""
    return keyed(files.read(fd, "cpu.stat"), "usage_usec") / 1e6


def freeze(files: CgroupFiles, fd: int, timeout_s: float) -> bool:
    """Stop all tasks; tell whether they stand still."""
    files.write(fd, "cgroup.freeze", "1")
    return wait_event(files, fd, "frozen", wanted=1, timeout_s=timeout_s)


def thaw(files: CgroupFiles, fd: int) -> None:
    """Let the tasks go on."""
    files.write(fd, "cgroup.freeze", "0")


def kill(files: CgroupFiles, fd: int) -> None:
    """Send SIGKILL to all processes in the group and below, also to those that fork meanwhile."""
    files.write(fd, "cgroup.kill", "1")


def populated(files: CgroupFiles, fd: int) -> bool:
    """Tell whether a process is in the group or below."""
    return keyed(files.read(fd, "cgroup.events"), "populated") != 0


def open_events(files: CgroupFiles, fd: int) -> int:
    """Open cgroup.events and arm it: only what changes from now on is an event (POLLPRI)."""
    events_fd = files.open(fd, "cgroup.events")
    os.read(events_fd, 256)
    return events_fd


_LOST_EVENT_S = 0.02


def wait_event(files: CgroupFiles, fd: int, key: str, *, wanted: int, timeout_s: float) -> bool:
    """Wait until `key` of cgroup.events has the value; tell whether it came in time."""
    deadline_s = time.monotonic() + timeout_s
    events_fd = files.open(fd, "cgroup.events")
    try:
        poll = select.poll()
        poll.register(events_fd, select.POLLPRI)
        # Reading arms the poll, so a change between the two is not lost.
        while keyed(os.pread(events_fd, 256, 0).decode("ascii"), key) != wanted:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            # Notifications are throttled by a timer that goes with the group: one may be lost
            # when somebody else removes it at the same time. The next read fails then.
            poll.poll(min(left_s, _LOST_EVENT_S) * 1000)
        return True
    finally:
        os.close(events_fd)


def is_root(files: CgroupFiles, fd: int) -> bool:
    """Tell whether this is the root of the whole tree, which may hold processes and children."""
    return not files.has(fd, "cgroup.events")


def offered(files: CgroupFiles, fd: int) -> set[str]:
    """Name the controllers that the group may give to its children."""
    return set(files.read(fd, "cgroup.controllers").split())


def enabled(files: CgroupFiles, fd: int) -> set[str]:
    """Name the controllers that the group's children have."""
    return set(files.read(fd, "cgroup.subtree_control").split())


def enable(files: CgroupFiles, fd: int, controllers: set[str]) -> dict[str, OSError]:
    """Give the controllers to the group's children; return the error of each that failed."""
    failed = {}
    for controller in sorted(controllers):
        # One write each: a write with several is all or nothing, and would not say which failed.
        try:
            files.write(fd, "cgroup.subtree_control", f"+{controller}")
        except OSError as error:
            failed[controller] = error
    return failed


def members(files: CgroupFiles, fd: int) -> list[int]:
    """List the processes of the group; 0 stands for one outside the own PID namespace."""
    return [int(pid) for pid in files.read(fd, "cgroup.procs").split()]


def move_all(files: CgroupFiles, source_fd: int, target_fd: int) -> None:
    """Move every process from one group to another; those forked meanwhile too.

    Raises EBUSY where new ones appear faster than they are moved.
    """
    for _ in range(MOVE_ROUNDS):
        pids = members(files, source_fd)
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # ended before its turn
                files.write(target_fd, "cgroup.procs", str(pid))
    raise OSError(errno.EBUSY, "processes appear faster than they can be moved")
