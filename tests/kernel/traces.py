"""What a kernel has on the host, noted while it lives and looked for when it should be gone."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.integration import leaks

GONE_S = leaks.GONE_S


def children() -> dict[int, set[int]]:
    """Give the children of every process of the host."""
    found: dict[int, set[int]] = defaultdict(set)
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            # The name in brackets may hold anything; the parent is the second field after it.
            found[int(stat.rpartition(")")[2].split()[1])].add(int(entry))
    return found


def descendants(pid: int) -> set[int]:
    """Give all processes below one."""
    known = children()
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        new = known[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _born(pid: int) -> str:
    """Give when a process was started; a number of a process is soon that of another."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]


@dataclass(frozen=True)
class Traces:
    """The processes, cgroups and mounts of a kernel at one moment."""

    kernel: int
    processes: dict[int, str]
    cgroups: list[str]
    mounts: frozenset[str]

    @classmethod
    def of(cls, kernel: int) -> Traces:
        """Note them."""
        pids = descendants(kernel) | leaks.session_processes(kernel)
        return cls(
            kernel,
            {pid: _born(pid) for pid in pids if leaks.runs(pid)},
            leaks.session_cgroups(kernel),
            frozenset(leaks.mounts()),
        )

    @property
    def monitor(self) -> int:
        """The one child of the kernel."""
        (pid,) = (pid for pid in children()[self.kernel] if leaks.runs(pid))
        return pid

    @property
    def init(self) -> int:
        """The one child of the monitor."""
        (pid,) = (pid for pid in children()[self.monitor] if leaks.runs(pid))
        return pid

    @property
    def heads(self) -> set[int]:
        """The parked guests."""
        return set().union(*(leaks.processes_in(f"{folder}/heads") for folder in self.cgroups))

    def user_ids(self) -> set[str]:
        """Give the user ids, as the host sees them, of all but the kernel's and the monitor's."""
        found = set()
        for pid in leaks.session_processes(self.kernel):
            try:
                text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            except OSError:  # gone since it was listed
                continue
            (line,) = (line for line in text.splitlines() if line.startswith("Uid:"))
            found.update(line.split()[1:])
        return found

    def left(self) -> dict[str, object]:
        """Give what is still there of the session, the kernel process aside."""
        now = descendants(self.kernel) | leaks.session_processes(self.kernel)
        known = {pid for pid, born in self.processes.items() if _born(pid) == born}
        found = {
            "processes": {pid for pid in known | now if leaks.runs(pid)},
            "cgroups": leaks.session_cgroups(self.kernel),
            "mounts": set(leaks.mounts()) - self.mounts,
        }
        return {name: value for name, value in found.items() if value}

    def assert_gone(self, within_s: float = GONE_S) -> None:
        """Assert that nothing of what was noted, and nothing new, is left."""
        leaks.until(lambda: not self.left(), within_s)
        assert not self.left()

    def assert_dead(self, within_s: float = GONE_S) -> None:
        """Assert that the kernel process itself has ended, too."""
        assert leaks.until(lambda: not leaks.runs(self.kernel), within_s)
        self.assert_gone(within_s)


def kill(pid: int) -> None:
    """Kill -9 one process."""
    os.kill(pid, signal.SIGKILL)
