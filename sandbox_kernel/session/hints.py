"""What the limits of a cell refused it: a hint below the program's own error, or why it died.

A fork beyond `processes` and a write beyond `disk` are ordinary exceptions in the program, which
does not know whose limit it met.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

from sandbox_kernel.linux.cgroup import CgroupUsage
from sandbox_kernel.model import Json, Limits, Outcome
from sandbox_kernel.session import advice
from sandbox_kernel.session.guest import ExitStatus
from sandbox_kernel.session.scratch import Scratch
from sandbox_kernel.units import format_size

_YELLOW = "\x1b[33m"
_PLAIN = "\x1b[39m"


class Hints:
    """The refusals of one cell; `files` looks at the file system that its files are in."""

    def __init__(self, limits: Limits, ceiling: Limits, files: Callable[[], Scratch]) -> None:
        self.limits = limits
        self._ceiling = ceiling
        self._files = files
        self._was_full = files().is_full

    def denied_forks(self, counted: CgroupUsage) -> int:
        """Give how many processes and threads the cell's own limit has refused it.

        The cgroup counts those too that a limit above refused, of the user's session for one.
        """
        peak = counted.peak_processes
        is_own = peak is None or peak >= self.limits.processes
        return counted.fork_denials if is_own else 0

    def cause_of_death(self, counted: CgroupUsage, status: ExitStatus | None) -> Outcome | None:
        """Name the limit that refused something to a cell that died, if one did.

        A file system that was full before says nothing, unless the cell died of it: SIGBUS is a
        page of a mapped file without room.
        """
        if self.denied_forks(counted):
            return Outcome.PROCESSES
        is_bus = status in ((os.CLD_KILLED, signal.SIGBUS), (os.CLD_DUMPED, signal.SIGBUS))
        if (is_bus or not self._was_full) and self._files().is_full:
            return Outcome.DISK
        return None

    def add_to(self, content: Json, counted: CgroupUsage) -> None:
        """Put below the traceback of the program's error what a limit refused it."""
        evalue = str(content["evalue"])
        found = [self._of_processes(counted), self._of_disk(evalue), self._of_files(evalue)]
        content["traceback"] += [f"{_YELLOW}hint{_PLAIN}: {text}" for text in found if text]

    def _of_processes(self, counted: CgroupUsage) -> str:
        limit = self.limits.processes
        if denied := self.denied_forks(counted):
            return (
                f"the limit `processes` allows this cell {limit} processes and threads, and "
                f"refused {denied} more; {advice.processes(self.limits, self._ceiling)}"
            )
        if counted.fork_denials:
            return (
                f"this machine refused the cell {counted.fork_denials} processes or threads, "
                f"below its limit `processes` of {limit}: a limit above is reached (pids.max)"
            )
        return ""

    def _of_disk(self, evalue: str) -> str:
        files = self._files()
        if not _is(evalue, errno.ENOSPC) and (self._was_full or not files.is_full):
            return ""
        limit, used = format_size(self.limits.disk_bytes), format_size(files.used_bytes)
        return (
            f"the limit `disk` allows the files of this session {limit}, and they take {used}; "
            f"delete some, or {advice.disk(self.limits, self._ceiling)}"
        )

    def _of_files(self, evalue: str) -> str:
        if not _is(evalue, errno.EMFILE):
            return ""
        return (
            f"the limit `open_files` allows each process {self.limits.open_files} open files; "
            f"{advice.open_files(self.limits, self._ceiling)}"
        )


def _is(evalue: str, number: int) -> bool:
    return f"[Errno {number}]" in evalue
