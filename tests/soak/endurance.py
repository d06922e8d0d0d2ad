"""Many cells in one session, with other sessions in parallel for some of the time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.cells import FILE, TICK, Kind, deck, warm_up
from tests.soak.census import Census, Host, Vitals, settled
from tests.soak.findings import Problems, Row, counted, memory, none_left, pace, same, slab
from tests.soak.home import ROOT
from tests.soak.notebook import Notebook

Advance = Callable[[str, int, int], None]
"""Told the title of the phase, how much is done, and how much there is."""

SAMPLES = 100
"""How often the kernel's memory is looked at."""
DUEL_TICKS = 200
"""Cells of the old session and of a fresh one that are compared in the end."""
DUEL_BLOCK = 10


@dataclass(frozen=True)
class Plan:
    """How long a soak is."""

    cells: int
    sessions: int
    fleet_cells: int
    seed: int
    counts_pace: bool = True
    """Whether a slow cell counts: not where nobody knows what else the machine does."""

    @property
    def duel_ticks(self) -> int:
        """How many cells of either session are compared."""
        return min(DUEL_TICKS, self.cells // 10)


@dataclass
class Endurance:
    """One session that runs for a long time; `rows` tell what came of it."""

    plan: Plan
    host: Host
    advance: Advance
    problems: Problems = field(default_factory=Problems)
    memory: list[tuple[float, float]] = field(default_factory=list)
    fresh_s: list[float] = field(default_factory=list)
    old_s: list[float] = field(default_factory=list)
    _fleet: subprocess.Popen[str] | None = None
    _fleet_range: tuple[int, int] = (0, 0)

    def run(self) -> Iterator[Row]:
        """Run all cells in a real kernel; give what is asked for and whether it was so."""
        before = self.host.look()
        notebook = self._notebook()
        try:
            notebook.begin()
            for kind in warm_up():
                notebook.run(kind)
            young = settled(notebook.live.pid)
            self._cells(notebook)
            old = settled(notebook.live.pid, like=young)
            self._duel(notebook)
        finally:
            notebook.live.end()
            self._end_fleet()
        for what, number in (old.open - young.open).items():
            self.problems.add(f"the kernel has more open: {what}", str(number))
        yield counted("cells in one session", self.plan.cells, self.problems)
        yield from self._rows(notebook, young, old)
        yield from rows_of_host(self.host, before, self.plan.cells, self.problems)

    def _notebook(self) -> Notebook:
        live = self.host.home.start()
        self.host.kernels.add(live.pid)
        return Notebook(live, self.problems)

    def _cells(self, notebook: Notebook) -> None:
        plan, kinds = self.plan, deck(self.plan.seed)
        every = max(plan.cells // SAMPLES, 1)
        for number in range(plan.cells):
            if number == plan.cells * 2 // 5 and plan.sessions:
                self._begin_fleet(notebook)
            if number % every == 0:
                self.advance(self._title(), number, plan.cells)
                vitals = Vitals.of(notebook.live.pid)
                self.memory.append((number, vitals.memory_bytes))
            notebook.run(next(kinds))
            self._look_after_fleet(notebook)
        # The last word of the others may be late, and no figure of theirs shall be lost.
        self._end_fleet(notebook)

    def _title(self) -> str:
        return "cells, sessions in parallel" if self._fleet else "cells"

    # ---- the sessions in parallel

    def _begin_fleet(self, notebook: Notebook) -> None:
        plan, home = self.plan, self.host.home
        words = (home.workspace, plan.sessions, plan.fleet_cells, plan.seed)
        with (
            (home.folder / "fleet.out").open("w") as out,
            (home.folder / "fleet.err").open("w") as err,
        ):
            self._fleet = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.fleet", *map(str, words)],
                stdout=out,
                stderr=err,
                cwd=ROOT,
                text=True,
            )
        self.host.kernels.add(self._fleet.pid)
        self._fleet_range = (notebook.cells, notebook.cells)

    def _look_after_fleet(self, notebook: Notebook) -> None:
        if self._fleet is not None:
            self._fleet_range = (self._fleet_range[0], notebook.cells)
            if self._fleet.poll() is not None:
                self._end_fleet(notebook)

    def _end_fleet(self, notebook: Notebook | None = None) -> None:
        fleet, self._fleet = self._fleet, None
        if fleet is None:
            return
        if notebook is None:  # something went wrong
            fleet.kill()
        status = fleet.wait()
        facts = _last_line(self.host.home.folder / "fleet.out")
        if status or "counts" not in facts:
            error = (self.host.home.folder / "fleet.err").read_text("utf-8", "replace")
            self.problems.add(f"sessions in parallel ended with {status}", error[-2000:])
        self.problems.merge(facts.get("counts", {}), facts.get("examples", {}))

    # ---- what came of it

    def _duel(self, old: Notebook) -> None:
        """Compare the old session with one that is new, in turns: the machine may be busy."""
        fresh = self._notebook()
        try:
            fresh.begin()
            for kind in warm_up():
                fresh.run(kind)
            for number in range(0, self.plan.duel_ticks, DUEL_BLOCK):
                self.advance("old session and new, in turns", number, self.plan.duel_ticks)
                pair = [(old, self.old_s), (fresh, self.fresh_s)]
                for notebook, taken_s in pair if number // DUEL_BLOCK % 2 == 0 else pair[::-1]:
                    notebook.run(FILE)  # both go through as many layers, up to the next squash
                    taken_s += ticks(notebook, DUEL_BLOCK)
        finally:
            fresh.live.end()

    def _rows(self, notebook: Notebook, young: Vitals, old: Vitals) -> Iterator[Row]:
        plan = self.plan
        tenth = max(plan.cells // 10, 1)
        first, last = self._fleet_range
        alone = [(cell, s) for cell, s in notebook.ticks_s if not first <= cell <= last]
        early = [s for cell, s in alone if cell <= tenth]
        late = [s for cell, s in alone if plan.cells - tenth < cell <= plan.cells]
        yield memory(self.memory[SAMPLES // 10 :])
        left = sorted((old.open - young.open).elements())
        yield none_left("descriptors of the kernel", young.open.total(), left)
        for what, count in young.sizes.items():
            yield same(what, count, old.sizes[what])
        yield pace("tick, first and last tenth", early, late, counts=False)
        yield pace("tick, new session and old", self.fresh_s, self.old_s, counts=plan.counts_pace)


def ticks(notebook: Notebook, count: int, kind: Kind = TICK) -> list[float]:
    """Run so many cells of one kind; give how long each took."""
    for _ in range(count):
        notebook.run(kind)
    return [taken_s for _, taken_s in notebook.ticks_s[-count:]]


def rows_of_host(host: Host, before: Census, cells: int, problems: Problems) -> Iterator[Row]:
    """Say what is left on the host, once all that was started has ended."""
    for what, left in host.leaked(before).items():
        for name in left:
            problems.add(f"left on the host: {what}", name)
        yield none_left(f"{what} on the host", len(getattr(before, what)), left)
    after = host.look()
    for name, count in before.slabs.items():
        yield slab(name, count, after.slabs.get(name, count), cells)


def _last_line(path: Path) -> dict[str, dict[str, object]]:
    lines = path.read_text("utf-8", "replace").splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
