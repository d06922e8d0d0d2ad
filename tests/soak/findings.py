"""From what was counted to a verdict: pure, so that it can be tested without a kernel."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

MAX_RATIO = 1.2
"""Of the median cell at the end to that at the start."""
MAX_BYTES_PER_CELL = 1024
"""The history keeps the text of each cell, so a kernel grows a little: 10 MiB in 10 000 cells."""
SETTLING_BYTES = 2 << 20
"""What a kernel may grow by in all while its caches fill: counts in a short soak only."""
SLAB_SLACK = 1000
"""Objects by which the whole host may differ: others use it, and Linux frees with delay."""
EXAMPLES = 3


@dataclass
class Problems:
    """What went wrong, each kind counted and shown by a few examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, example: str) -> None:
        """Note one more of a kind."""
        self.counts[what] += 1
        seen = self.examples.setdefault(what, [])
        if len(seen) < EXAMPLES:
            seen.append(example)

    def merge(self, counts: dict[str, int], examples: dict[str, list[str]]) -> None:
        """Take over what another process has noted."""
        for what, count in counts.items():
            self.counts[what] += count
            seen = self.examples.setdefault(what, [])
            seen += examples.get(what, [])[: EXAMPLES - len(seen)]


@dataclass(frozen=True)
class Row:
    """One line of the table; `good` is None where nothing is asked for."""

    what: str
    before: str
    after: str
    bar: str
    good: bool | None

    @property
    def verdict(self) -> str:
        """The word at the end of the line."""
        return {True: "pass", False: "FAILED", None: "-"}[self.good]


def same(what: str, before: int, after: int) -> Row:
    """Ask that a number is the same as before, or less."""
    return Row(what, str(before), str(after), "same", after <= before)


def none_left(what: str, before: int, left: Sequence[str]) -> Row:
    """Ask that nothing of a kind was left."""
    return Row(what, str(before), f"{before}+{len(left)}" if left else str(before), "same",
               not left)  # fmt: skip


def slab(what: str, before: int, after: int, cells: int) -> Row:
    """Ask that Linux's own objects have not grown with the cells."""
    slack = SLAB_SLACK + cells // 20
    return Row(f"{what} (host)", str(before), str(after), f"+{slack}", after - before <= slack)


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Give the median slope between all pairs of points (Theil-Sen); None without two of them.

    A flood leaves the memory of a process larger for a while; the median does not follow it.
    """
    slopes = [
        (y2 - y1) / (x2 - x1)
        for number, (x1, y1) in enumerate(points)
        for x2, y2 in points[number + 1 :]
        if x2 != x1
    ]
    return median(slopes) if slopes else None


def memory(points: Sequence[tuple[float, float]]) -> Row:
    """Ask that the kernel's memory is flat; `points` are (cells, bytes)."""
    found = slope(points)
    if found is None:
        return Row("memory of the kernel, growth per cell", "-", "-", "-", None)
    mib = [f"{value / (1 << 20):.1f} MiB" for _, value in (points[0], points[-1])]
    most = MAX_BYTES_PER_CELL + SETTLING_BYTES / (points[-1][0] - points[0][0])
    title = f"memory of the kernel: {found:+.0f} B per cell"
    return Row(title, *mib, f"<= {most:.0f} B per cell", found <= most)


def pace(what: str, before_s: Sequence[float], after_s: Sequence[float], *, counts: bool) -> Row:
    """Ask that the median of the second is not slower; without `counts` it is only shown."""
    if not before_s or not after_s:
        return Row(what, "-", "-", "-", None)
    early_s, late_s = median(before_s), median(after_s)
    ratio = late_s / early_s if early_s else math.inf
    good = ratio <= MAX_RATIO if counts else None
    bar = f"<= {MAX_RATIO}" if counts else "-"
    return Row(f"{what}: ratio {ratio:.2f}", f"{early_s * 1e3:.1f} ms", f"{late_s * 1e3:.1f} ms",
               bar, good)  # fmt: skip


def counted(what: str, number: int, problems: Problems) -> Row:
    """Ask that among so many nothing went wrong."""
    wrong = problems.counts.total()
    return Row(what, str(number), f"{wrong} wrong", "0 wrong", wrong == 0)


def as_table(rows: Sequence[Row], title: str) -> Table:
    """Lay the rows out."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("what")
    for heading in ("before", "after", "bar"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for row in rows:
        cells = (row.what, row.before, row.after, row.bar, row.verdict)
        table.add_row(*cells, style="red" if row.good is False else None)
    return table


def as_json(rows: Sequence[Row], problems: Problems, about: dict[str, Any]) -> dict[str, Any]:
    """Give the rows and what went wrong as JSON values."""
    return {
        "about": about,
        "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
        "problems": dict(problems.counts),
        "examples": problems.examples,
    }
