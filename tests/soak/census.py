"""What there is of a soak on the host, counted: before it, while it runs, after it.

All is read from /proc and the cgroup trees. Other programs use the host meanwhile, so whatever can
be told apart is: processes by descent, cgroups by the kernel in their name, files by folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration import leaks
from tests.kernel import traces
from tests.soak.home import Home

LOOKS, LOOK_EVERY_S = 25, 0.2
PR_SET_CHILD_SUBREAPER = 36
"""prctl(2)."""
NAMESPACES = ("mnt", "net", "ipc", "uts", "cgroup", "pid", "user")
SLABS = ("pid_namespace", "user_namespace", "net_namespace", "mnt_cache")
"""Objects of Linux's own, by the names of their caches in /proc/slabinfo."""


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own dies: so none gets out of sight."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def bury(known: set[int]) -> None:
    """Wait for orphans that have ended; `known` are children that somebody else waits for."""
    for pid in leaks.zombies() - known:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


@dataclass(frozen=True)
class Census:
    """What a soak has on the host at one moment."""

    processes: set[int]
    cgroups: set[str]
    mounts: Counter[str]
    files: set[str]
    slabs: dict[str, int]

    def leaked_since(self, before: Census) -> dict[str, list[str]]:
        """Give what there is now and was not then, by kind."""
        return {
            "processes": [_named(pid) for pid in sorted(self.processes - before.processes)],
            "cgroups": sorted(self.cgroups - before.cgroups),
            "mounts": sorted((self.mounts - before.mounts).elements()),
            "files": sorted(self.files - before.files),
        }


@dataclass
class Host:
    """Where a soak looks; `kernels` are the pids of all that it has started."""

    home: Home
    kernels: set[int] = field(default_factory=set)

    def look(self) -> Census:
        """Count now; orphans that have ended are waited for first."""
        bury(set())
        return Census(
            traces.descendants(os.getpid()),
            {path for pid in self.kernels for path in leaks.session_cgroups(pid)},
            leaks.mounts(),
            self.home.files(),
            slabs(),
        )

    def leaked(self, before: Census) -> dict[str, list[str]]:
        """Give what has leaked, once what is leaving had time to leave."""
        leaks.until(lambda: not any(self.look().leaked_since(before).values()))
        return self.look().leaked_since(before)


@dataclass(frozen=True)
class Vitals:
    """A kernel and its session between two cells."""

    memory_bytes: int
    """What the kernel's process has for itself alone."""
    open: Counter[str]
    """Its descriptors, by what they stand for."""
    processes: int
    cgroups: int
    mounts: int
    namespaces: int

    @classmethod
    def of(cls, kernel: int) -> Vitals:
        """Look at a kernel; the figures that only root may see are 0 for others."""
        groups = leaks.session_cgroups(kernel)
        pids = traces.descendants(kernel) | leaks.session_processes(kernel)
        inner = [name for group in groups for name in os.listdir(group) if name.startswith("cell-")]
        return cls(
            anonymous_bytes(kernel),
            _kinds(leaks.descriptors(kernel)),
            sum(map(leaks.runs, pids)),
            len(inner),
            max((_lines(f"/proc/{pid}/mountinfo") for pid in pids), default=0),
            len({ns for pid in pids for ns in _namespaces(pid)}),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The figures of the session."""
        return {
            "processes of the session": self.processes,
            "cgroups of cells": self.cgroups,
            "mounts in a cell": self.mounts,
            "namespaces of the session": self.namespaces,
        }

    def more_than(self, before: Vitals) -> bool:
        """Tell whether there is more of anything but memory than before."""
        more = any(self.sizes[what] > count for what, count in before.sizes.items())
        return more or bool(self.open - before.open)


def settled(kernel: int, *, like: Vitals | None = None) -> Vitals:
    """Look at a kernel whose session has nothing left to do, or at what it still has after 5 s."""
    before, now = None, Vitals.of(kernel)
    for _ in range(LOOKS):
        is_still = before is not None and (now.open, now.sizes) == (before.open, before.sizes)
        if is_still and (like is None or not now.more_than(like)):
            break
        wait_s(LOOK_EVERY_S)
        before, now = now, Vitals.of(kernel)
    return now


def anonymous_bytes(pid: int) -> int:
    """Give the memory of a process that is no file's; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    return 0


def _kinds(found: Counter[str]) -> Counter[str]:
    """Count descriptors by kind: of a group's name only its kind is of interest."""
    kinds: Counter[str] = Counter()
    for name, count in found.items():
        folder, mark, group = name.partition("/sandbox-kernel-")
        part = group.partition("/")[2].partition("-")[0] or "session"
        kinds[f"cgroup of {part}" if mark and folder else name] += count
    return kinds


def wait_s(seconds: float) -> None:
    """Let time pass."""
    signal.sigtimedwait((), seconds)


def slabs() -> dict[str, int]:
    """Count Linux's own objects on the whole host; empty where it does not say."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/slabinfo").read_text("ascii").splitlines():
            words = line.split()
            if words[0] in SLABS:
                found[words[0]] = int(words[1])
    return found


def _lines(path: str) -> int:
    try:
        return len(Path(path).read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError:
        return 0


def _namespaces(pid: int) -> set[str]:
    found = set()
    for name in NAMESPACES:
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/ns/{name}"))
    return found


def _named(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        name = "gone"
    return f"{pid} {name} ({leaks.state(pid) or '-'})"
