"""One way in which a cell fails, as a value: what it runs, and what the notebook must say."""

from __future__ import annotations

from dataclasses import dataclass

COMMITTED = ("ok", "error")
"""Outcomes after which the state of the cell is kept."""

ENAMES = {
    "ok": "",
    "memory": "MemoryLimitExceeded",
    "wall_time": "WallTimeLimitExceeded",
    "cpu_time": "CpuTimeLimitExceeded",
    "processes": "ProcessLimitExceeded",
    "disk": "DiskLimitExceeded",
    "crashed": "CellCrashed",
    "exited": "CellExited",
}
"""The error of each outcome, but of `error`, which is the program's own."""


@dataclass(frozen=True)
class Case:
    """One bad cell.

    `within_s` guards the test run against a cell that hangs; how soon a breach is told is measured
    by the benchmarks.
    """

    name: str
    code: str
    outcome: str
    """What the reply's metadata must say."""
    limits: str = ""
    """What stands in the `%%sandbox` line."""
    ename: str = ""
    """The error's name where the outcome does not say it: that of the program's exception."""
    says: tuple[str, ...] = ()
    """Texts that the error must have: the limit with its value, a signal, an exit code."""
    prints: tuple[str, ...] = ()
    """Texts that stdout must have."""
    warns: tuple[str, ...] = ()
    """Texts that stderr must have."""
    later: tuple[str, ...] = ()
    """Texts that stderr of the cell after it must have."""
    within_s: float = 30.0
    alone: bool = False
    """Whether it needs a kernel of its own: what it leaves behind, other cells would meet."""

    @property
    def is_kept(self) -> bool:
        """Tell whether the cell commits."""
        return self.outcome in COMMITTED

    @property
    def source(self) -> str:
        """The cell: it changes x first, where that must be rolled back."""
        line = f"%%sandbox {self.limits}\n" if self.limits else ""
        return f"{line}{'' if self.is_kept else 'x = 0'}\n{self.code.strip()}\n"

    @property
    def error_name(self) -> str:
        """The name of the error that the notebook shows; empty for none."""
        return self.ename or ENAMES.get(self.outcome, "")
