"""Run cells in a session of the user who runs this: code in, what came of it out, as JSON lines."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.integration.driver import DEFAULTS, Driver, start, stop

MEMORY_BYTES = 192 << 20


def say(**facts: Any) -> None:
    """Tell the test one thing."""
    print(json.dumps(facts), flush=True)


def where(driver: Driver) -> dict[str, Any]:
    """Give where the session's processes are."""
    return {"cgroups": driver.cgroups, "pids": sorted(driver.processes())}


async def main() -> None:
    """Keep one session until there is no more code to run."""
    with tempfile.TemporaryDirectory() as workspace:
        driver = await start(Path(workspace), replace(DEFAULTS, memory_bytes=MEMORY_BYTES))
        try:
            say(**where(driver))
            while line := await asyncio.to_thread(sys.stdin.readline):
                ran = await driver.run(json.loads(line))
                say(outcome=ran.outcome.value, text=ran.text(), said=ran.said(), **where(driver))
        finally:
            await stop(driver)


if __name__ == "__main__":
    asyncio.run(main())
