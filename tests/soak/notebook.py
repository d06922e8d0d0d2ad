"""One notebook: a real kernel, the cells that are run in it, and whether each ended as it must."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tests.kernel.live import Live, Ran
from tests.soak.cells import SETUP, TICK, Kind
from tests.soak.findings import Problems

SLOW_S = 30.0
"""No cell of a soak takes so long, even on a machine that is busy."""


@dataclass
class Notebook:
    """A kernel and what its variable `n` must be."""

    live: Live
    problems: Problems
    n: int = 0
    cells: int = 0
    ticks_s: list[tuple[int, float]] = field(default_factory=list)
    """(number of the cell, seconds from sending to idle) of each `tick`."""

    def begin(self) -> None:
        """Set the variables up in a session that is new."""
        self.live.ok(SETUP)
        self.n = 0
        self.forget()

    def run(self, kind: Kind) -> None:
        """Run one cell, and note what is wrong with its end."""
        self.cells += 1
        began_s = time.perf_counter()
        ran = self.live.result(self.live.send(kind.text), SLOW_S)
        took_s = time.perf_counter() - began_s
        end = end_of(ran)
        if end not in kind.ends:
            self.problems.add(f"{kind.name}: ended as {end}", ran.said()[-500:])
        elif end == "ok":
            self.n += kind.adds
        if kind is TICK and end == "ok":
            self.ticks_s.append((self.cells, took_s))
            self._compare(ran)
        self.forget()

    def _compare(self, ran: Ran) -> None:
        if (said := ran.text().strip()) != str(self.n):
            self.problems.add("n is not what it was", f"{said!r} where {self.n} is due")
            self.n = int(said) if said.lstrip("-").isdecimal() else self.n

    def forget(self) -> None:
        """Let go of all messages: this process shall not grow either."""
        for messages in (self.live.order, self.live.sent, self.live.questions):
            messages.clear()
        self.live.iopub.clear()
        self.live.replies.clear()


def end_of(ran: Ran) -> str:
    """Give the name of a cell's end: `ok`, or that of its error."""
    return "ok" if ran.status == "ok" else str(ran.content.get("ename", ran.status))
