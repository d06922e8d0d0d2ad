"""What a session leaves on the host: processes, cgroups, mounts, descriptors, zombies.

Everything is read from /proc and the cgroup trees, so it also sees what the product does not know of.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GONE_S = 2.0 * float(os.environ.get("SANDBOX_KERNEL_TEST_SLOWDOWN", "1"))
"""How long the last traces of a session may take to go; longer where the processor is emulated."""
_LOOK_AGAIN_S = 0.005


def until(holds: Callable[[], bool], timeout_s: float = GONE_S) -> bool:
    """Look until `holds`, at most for the time given; tell whether it did."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        signal.sigtimedwait((), _LOOK_AGAIN_S)
    return True


def cgroup_mounts() -> list[str]:
    """Give the mount point of every cgroup tree."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    split = [(line.split(" - ")[0].split()[4], line.split(" - ")[1].split()[0]) for line in lines]
    return [point for point, kind in split if kind in ("cgroup", "cgroup2")]


def session_cgroups(pid: int | None = None) -> list[str]:
    """Give every cgroup directory that a kernel with this pid has made and not removed."""
    prefix = f"sandbox-kernel-{pid or os.getpid()}-"
    found = []
    for top in cgroup_mounts():
        for folder, names, _ in os.walk(top):
            # A scope that a kernel asked for is systemd's to remove, and holds its groups.
            ours = [name for name in names if name.startswith("sandbox-kernel-")]
            ours = [name for name in ours if not name.endswith(".scope")]
            found += [f"{folder}/{name}" for name in ours if name.startswith(prefix)]
            names[:] = [name for name in names if name not in ours]
    return found


def processes_in(folder: str) -> set[int]:
    """Give the processes in a cgroup directory and all below; none when it is gone."""
    found: set[int] = set()
    for below, _, _ in os.walk(folder):
        try:
            text = Path(below, "cgroup.procs").read_text(encoding="ascii")
        except OSError:
            continue
        found.update(map(int, text.split()))
    return found


def session_processes(pid: int | None = None) -> set[int]:
    """Give every process in the cgroups of a kernel with this pid."""
    return set().union(*map(processes_in, session_cgroups(pid)))


def state(pid: int) -> str:
    """Give the letter of a process's state; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


def runs(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    return state(pid) not in ("", "Z", "X")


def with_argument(marker: str) -> list[int]:
    """Give the processes of the whole host that have `marker` in their command line."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in line.split(b"\0") and runs(int(entry)):
                found.append(int(entry))
    return found


def zombies() -> set[int]:
    """Give the children of this process that have ended and were not waited for."""
    pids: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        text = Path(f"/proc/self/task/{task}/children").read_text(encoding="ascii")
        pids.update(int(pid) for pid in text.split() if state(int(pid)) == "Z")
    return pids


def descriptors(pid: int | None = None) -> Counter[str]:
    """Give what the open descriptors of a process stand for, and how many there are of each."""
    found: Counter[str] = Counter()
    folder = f"/proc/{pid or 'self'}/fd"
    for fd in os.listdir(folder):
        try:
            found[_kind(os.readlink(f"{folder}/{fd}"))] += 1
        except OSError:  # the one of the listing itself
            continue
    return found


def _kind(target: str) -> str:
    # A socket's or pipe's number says nothing; what it is does. An anon_inode has no number.
    kind, _, rest = target.partition(":")
    return f"{kind}:" if rest.startswith("[") and kind != "anon_inode" else target


def mounts() -> Counter[str]:
    """Give the mounts in the namespace of this process, by place and kind."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return Counter(" ".join([line.split()[4], line.split(" - ")[1]]) for line in lines)


@dataclass(frozen=True)
class Snapshot:
    """How this process and its host look at one moment."""

    descriptors: Counter[str] = field(default_factory=descriptors)
    mounts: Counter[str] = field(default_factory=mounts)
    zombies: set[int] = field(default_factory=zombies)
    cgroups: set[str] = field(default_factory=lambda: set(session_cgroups()))

    def leaked(self) -> dict[str, Any]:
        """Give what is there now and was not then; empty values are left out."""
        now = Snapshot()
        found = {
            "descriptors": dict(now.descriptors - self.descriptors),
            "mounts": dict(now.mounts - self.mounts),
            "zombies": now.zombies - self.zombies,
            "cgroups": now.cgroups - self.cgroups,
            "processes": set().union(*map(processes_in, now.cgroups - self.cgroups)),
        }
        return {name: value for name, value in found.items() if value}

    def assert_clean(self) -> None:
        """Assert that nothing has leaked since, once what is leaving had time to leave."""
        until(lambda: not self.leaked())
        left = self.leaked()
        assert not left, left
