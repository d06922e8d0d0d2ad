"""The files of the v1 controllers: memory, cpu, pids, blkio, cpuacct, freezer.

All functions take the files and the fd of the group's directory in that controller's hierarchy,
and raise OSError. See Documentation/admin-guide/cgroup-v1.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from sandbox_kernel.linux.cgroup_files import CgroupFiles, keyed

CPU_PERIOD_US = 100_000
PAUSE_S = 0.0005


def settle(done: Callable[[], bool], timeout_s: float) -> bool:
    """Try `done` until it holds, at most `timeout_s`; tell whether it did.

    The one wait without an event: v1 has none for a group that becomes empty (its release
    agent is a program of the host's root group) nor for a freezer that has come to rest.
    """
    deadline_s = time.monotonic() + timeout_s
    pause_s = PAUSE_S
    while not done():
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(pause_s)  # noqa: TID251 - no event there, see above
        pause_s = min(2 * pause_s, 0.02)
    return True


def set_memory(files: CgroupFiles, fd: int, limit_bytes: int) -> None:
    """Limit memory, and memory plus swap to the same value: no swap.

    Raises EBUSY where more is in use and cannot be freed.
    """
    text = str(limit_bytes)
    try:
        files.write(fd, "memory.limit_in_bytes", text)
    except OSError as error:
        # The kernel keeps memory <= memory+swap at any time: on raising, the sum goes first.
        if error.errno != errno.EINVAL:
            raise
        if not files.write_optional(fd, "memory.memsw.limit_in_bytes", text):
            raise
        files.write(fd, "memory.limit_in_bytes", text)
    else:
        try:
            files.write(fd, "memory.memsw.limit_in_bytes", text)
        except FileNotFoundError:
            # No swap accounting (swapaccount=0): with swappiness 0 reclaim leaves anonymous
            # pages of this group alone, which is as good.
            files.write_optional(fd, "memory.swappiness", "0")


def set_cpus(files: CgroupFiles, fd: int, cpus: float) -> None:
    """Limit cpu time to `cpus` seconds a second.

    Raises EINVAL where a group above has a smaller share.
    """
    # The period of a new group is 100 ms whatever that above has, so it need not be written.
    files.write(fd, "cpu.cfs_quota_us", str(int(cpus * CPU_PERIOD_US)))


def set_io(files: CgroupFiles, fd: int, device: tuple[int, int], bytes_per_s: int) -> None:
    """Limit what is read from a disk, and what is written directly to it, in bytes a second.

    v1 does not know who has written what waits in the page cache. Raises ENODEV, EINVAL.
    """
    for name in ("blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"):
        files.write(fd, name, f"{device[0]}:{device[1]} {bytes_per_s}")


def lift_io(files: CgroupFiles, fd: int) -> None:
    """Take the limits of all disks off."""
    for name in ("blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"):
        for line in files.read(fd, name).splitlines():
            files.write(fd, name, f"{line.split()[0]} 0")


def count_below(files: CgroupFiles, fd: int) -> None:
    """Make the group's limit cover the groups inside it, before any is made."""
    # The default since 5.11, and later kernels may drop the file.
    files.write_optional(fd, "memory.use_hierarchy", "1")


def memory_usage(files: CgroupFiles, fd: int) -> tuple[int, int | None, int, int]:
    """Read memory in use, its peak, the kills in this very group and once more the kills.

    v1 counts no OOM events apart from kills (failcnt counts every reclaim at the limit).
    """
    peak = files.read_optional(fd, "memory.max_usage_in_bytes")
    kills = keyed(files.read(fd, "memory.oom_control"), "oom_kill")
    current = int(files.read(fd, "memory.usage_in_bytes"))
    return current, None if peak is None else int(peak), kills, kills


def cpu_s(files: CgroupFiles, fd: int) -> float:
    """Read the cpu time used, in seconds."""
    return int(files.read(fd, "cpuacct.usage")) / 1e9


def freeze(files: CgroupFiles, fd: int, timeout_s: float) -> bool:
    """Stop all tasks; tell whether they stand still."""
    files.write(fd, "freezer.state", "FROZEN")
    # Reading makes the kernel look again which tasks have arrived in the refrigerator.
    return settle(lambda: files.read(fd, "freezer.state").strip() == "FROZEN", timeout_s)


def thaw(files: CgroupFiles, fd: int) -> None:
    """Let the tasks go on."""
    files.write(fd, "freezer.state", "THAWED")
