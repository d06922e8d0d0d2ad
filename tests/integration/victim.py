"""A kernel in a process of its own, to be killed: it starts a session, tells what it is made of, runs a cell.

`python -m tests.integration.victim WORKSPACE CODE`; prints one line of JSON when the cell has begun.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from sandbox_kernel.model import Event, Stream
from tests.integration.driver import start


async def main(workspace: str, code: str) -> None:
    driver = await start(Path(workspace))
    pod = driver.session._pod

    def act(event: Event) -> None:
        if isinstance(event, Stream) and "up" in event.text:
            facts = {
                "pid": os.getpid(),
                "monitor": pod._started.monitor.pid,
                "init": sorted(driver.in_group("init")),
                "heads": sorted(driver.in_group("heads")),
                "processes": sorted(driver.processes()),
                "cgroups": list(driver.cgroups),
            }
            sys.stdout.write(json.dumps(facts) + "\n")
            sys.stdout.flush()

    await driver.ok("x = 1; open('/tmp/x', 'w').write('x')")
    await driver.run(code, on_event=act, timeout_s=60)
    await driver.session.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
