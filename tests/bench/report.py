"""From samples to a verdict, a table and JSON; pure, so that it can be tested without a kernel."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STOCK, SUBJECT = "stock", "subject"
SIDES = (STOCK, SUBJECT)


@dataclass(frozen=True)
class Measure:
    """What is measured; `bar` bounds the ratio of the medians, subject to stock.

    `most` bounds the subject alone, in the measure's unit: 95 of 100 times it must hold.
    """

    key: str
    title: str
    unit: str
    bar: float | None = None
    more_is_better: bool = False
    most: float | None = None


@dataclass
class Series:
    """The samples of one measure on both kernels, in the measure's unit."""

    measure: Measure
    samples: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    load: tuple[float, float] = (0.0, 0.0)
    """The load average over one minute, when the measure began and when it ended."""
    notes: list[str] = field(default_factory=list)
    failed: bool = False

    def note(self, text: str) -> None:
        """Keep a remark, once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Summary:
    """What is said about a list of samples."""

    n: int
    min: float
    p50: float
    p95: float
    p99: float
    max: float
    mean: float


def percentile(samples: Sequence[float], percent: float) -> float:
    """Give a percentile by linear interpolation between the closest ranks.

    Raises ValueError if there are no samples, or the percentage is not one.
    """
    if not samples or not 0 <= percent <= 100:
        raise ValueError(f"no {percent} % of {len(samples)} samples")
    ranked = sorted(samples)
    position = (len(ranked) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (position - below)


def summarize(samples: Sequence[float]) -> Summary | None:
    """Describe samples; None if there are none."""
    if not samples:
        return None
    return Summary(
        n=len(samples),
        min=min(samples),
        p50=percentile(samples, 50),
        p95=percentile(samples, 95),
        p99=percentile(samples, 99),
        max=max(samples),
        mean=math.fsum(samples) / len(samples),
    )


def ratio(series: Series) -> float | None:
    """Divide the subject's median by stock's; None if one is missing."""
    stock, subject = (summarize(series.samples[side]) for side in SIDES)
    if stock is None or subject is None or stock.p50 == 0:
        return None
    return subject.p50 / stock.p50


def verdict(series: Series) -> str:
    """Judge a series: `pass`, `missed by N%`, `failed`, or `-` where there is no bar."""
    if series.failed:
        return "failed"
    bar, got = series.measure.bar, ratio(series)
    if (most := series.measure.most) is not None:
        summary = summarize(series.samples[SUBJECT])
        bar, got = most, summary.p95 if summary else None
    if bar is None or got is None:
        return "-"
    if (got >= bar) if series.measure.more_is_better else (got <= bar):
        return "pass"
    return f"missed by {abs(got - bar) / bar:.1%}"


def interleave(count: int, block: int) -> Iterator[tuple[str, int]]:
    """Share `count` executions per side out in blocks, in the order A B, B A, A B ...

    Whatever drifts during a run, the clock of the processor for one, meets both sides alike.
    """
    if count < 0 or block < 1:
        raise ValueError(f"cannot share {count} executions out in blocks of {block}")
    order = SIDES
    for done in range(0, count, block):
        for side in order:
            yield side, min(block, count - done)
        order = order[::-1]


def as_json(all_series: Sequence[Series], *, about: dict[str, Any]) -> dict[str, Any]:
    """Give everything that was measured, samples included, as JSON values."""
    return {"about": about, "measures": [_series_json(series) for series in all_series]}


def _series_json(series: Series) -> dict[str, Any]:
    sides = {}
    for side in SIDES:
        samples = series.samples[side]
        summary = summarize(samples)
        sides[side] = {**(asdict(summary) if summary else {"n": 0}), "samples": samples}
    return {
        **asdict(series.measure),
        **sides,
        "ratio": ratio(series),
        "verdict": verdict(series),
        "load": list(series.load),
        "notes": series.notes,
    }


def as_table(all_series: Sequence[Series], *, title: str, sides: dict[str, str]) -> Table:
    """Lay the results out; `sides` names the two kernels for the head of the table."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("measure")
    table.add_column("unit")
    for side in SIDES:
        table.add_column(f"{sides[side]}\np50", justify="right")
        table.add_column("\np95", justify="right")
    for heading in ("ratio", "bar"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    table.add_column("n", justify="right")
    table.add_column("load", justify="right")
    for series in all_series:
        table.add_row(*_cells(series), style="red" if _is_bad(series) else None)
    return table


def _is_bad(series: Series) -> bool:
    return verdict(series).startswith(("missed", "failed"))


def _cells(series: Series) -> Iterator[str]:
    yield series.measure.title
    yield series.measure.unit
    for side in SIDES:
        summary = summarize(series.samples[side])
        yield figure(summary.p50) if summary else "-"
        yield figure(summary.p95) if summary else "-"
    got = ratio(series)
    yield "-" if got is None else f"{got:.2f}"
    yield _bar(series.measure)
    yield verdict(series)
    yield "/".join(sorted({str(len(series.samples[side])) for side in SIDES}, key=int))
    yield f"{series.load[1]:.1f}"


def _bar(measure: Measure) -> str:
    if measure.most is not None:
        return f"p95 <= {figure(measure.most)}"
    sign = ">=" if measure.more_is_better else "<="
    return "-" if measure.bar is None else f"{sign} {measure.bar:.1f}"


def figure(value: float) -> str:
    """Write a number with three digits that count."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"
