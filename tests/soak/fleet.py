"""Many sessions at once, in a process of their own that looks for its own leaks.

`python -m tests.soak.fleet WORKSPACE SESSIONS CELLS SEED`; a line of JSON for each round, and at
the end one that says what went wrong and what was left.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sandbox_kernel.config import parse_cell
from sandbox_kernel.errors import SandboxError
from sandbox_kernel.model import Outcome
from tests.integration import leaks
from tests.integration.driver import Driver, Ran, start, stop
from tests.soak.cells import SETUP, Kind, deck
from tests.soak.findings import Problems

STARTS_AT_ONCE = 4
"""Each takes a processor for a third of a second; all at once would only wait for each other."""
PATIENCE_S = 300.0
GRACE_S = 0.3
NAMES = {
    Outcome.MEMORY: "MemoryLimitExceeded",
    Outcome.WALL_TIME: "WallTimeLimitExceeded",
    Outcome.CPU_TIME: "CpuTimeLimitExceeded",
    Outcome.CRASHED: "CellCrashed",
    Outcome.EXITED: "CellExited",
}


@dataclass
class Fleet:
    """The sessions, and what they did."""

    workspace: Path
    problems: Problems = field(default_factory=Problems)
    drivers: list[Driver] = field(default_factory=list)
    done: int = 0

    async def run(self, sessions: int, cells: int, seed: int) -> None:
        """Start the sessions, run the cells in all of them at once, end them."""
        turn = asyncio.Semaphore(STARTS_AT_ONCE)
        await asyncio.gather(*(self._start(turn) for _ in range(sessions)))
        say(started=len(self.drivers))
        try:
            async with asyncio.TaskGroup() as group:
                for number, driver in enumerate(self.drivers):
                    group.create_task(self._work(driver, cells, deck(seed + number)))
        finally:
            for driver in self.drivers:
                await stop(driver)

    async def _start(self, turn: asyncio.Semaphore) -> None:
        async with turn:
            self.drivers.append(await start(self.workspace, grace_s=GRACE_S))

    async def _work(self, driver: Driver, cells: int, kinds: Iterator[Kind]) -> None:
        await driver.ok(SETUP, timeout_s=PATIENCE_S)
        n = 0
        for _ in range(cells):
            kind = next(kinds)
            try:
                ran = await self._cell(driver, kind)
            except SandboxError as error:
                self.problems.add(f"{kind.name}: {type(error).__name__}", str(error))
                return
            end = end_of(ran)
            if end not in kind.ends:
                self.problems.add(f"{kind.name}: ended as {end}", ran.said()[-500:])
            n += kind.adds if end == "ok" else 0
            self.done += 1
            say(done=self.done)
        if (found := await driver.value("n", timeout_s=PATIENCE_S)) != n:
            self.problems.add("n is not what it was", f"{found} where {n} is due")

    async def _cell(self, driver: Driver, kind: Kind) -> Ran:
        limits, code = parse_cell(kind.text, driver.limits, driver.limits)
        changed = {name: value for name, value in asdict(limits).items()
                   if value != getattr(driver.limits, name)}  # fmt: skip
        return await driver.run(code, timeout_s=PATIENCE_S, **changed)


def end_of(ran: Ran) -> str:
    """Give the name of a cell's end, as the kernel would show it."""
    if ran.outcome is Outcome.OK:
        return "ok"
    return NAMES.get(ran.outcome) or str(ran.result.reply.get("ename"))


def say(**facts: Any) -> None:
    """Tell the soak something."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def main(workspace: str, sessions: str, cells: str, seed: str) -> None:
    """Run a fleet and tell what is left of it."""
    fleet = Fleet(Path(workspace))
    before = leaks.Snapshot()
    asyncio.run(fleet.run(int(sessions), int(cells), int(seed)))
    leaks.until(lambda: not before.leaked())
    left = {name: str(value) for name, value in before.leaked().items()}
    for name, value in left.items():
        fleet.problems.add(f"sessions in parallel left {name}", value)
    say(counts=dict(fleet.problems.counts), examples=fleet.problems.examples)


if __name__ == "__main__":
    main(*sys.argv[1:5])
