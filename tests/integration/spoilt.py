"""A kernel in a process of its own on a host that a test has spoilt: one session, and what came of it.

`python -m tests.integration.spoilt WORKSPACE STEPS`; STEPS is a JSON list of objects:

    {"cell": CODE}                              run a cell
    {"cell": CODE, "limits": {"wall_time_s": 1}}  run a cell with other limits
    {"cell": CODE, "sh": SCRIPT}                run a cell, and the script when it prints "up"
    {"sh": SCRIPT}                              run a script between two cells

Prints one line of JSON, see `main`. What it leaves on the host is the caller's to look at.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import SandboxError
from sandbox_kernel.model import Event, Stream
from tests.integration import leaks
from tests.integration.driver import Driver, start, stop


def shell(script: str) -> None:
    """Run a script where the kernel is: in its mount namespace."""
    subprocess.run(["sh", "-ec", script], check=True)


def words(error: SandboxError) -> dict[str, str]:
    """Give what a user reads."""
    return {"error": type(error).__name__, "message": error.message, "hint": error.hint}


async def perform(driver: Driver, step: dict[str, Any]) -> dict[str, Any]:
    """Do one step, and say how it ended."""
    if "cell" not in step:
        shell(step["sh"])
        return {}

    def act(event: Event) -> None:
        if "sh" in step and isinstance(event, Stream) and "up" in event.text:
            shell(step["sh"])

    try:
        ran = await driver.run(step["cell"], on_event=act, timeout_s=20, **step.get("limits", {}))
    except SandboxError as error:
        return words(error)
    return {"outcome": ran.outcome.value, "text": ran.text(), "said": ran.said()}


async def main(workspace: str, steps: list[dict[str, Any]]) -> None:
    """Run the steps and print the facts: how each ended, or why there was no session."""
    facts: dict[str, Any] = {"pid": os.getpid(), "steps": []}
    before = leaks.Snapshot()
    began_s = time.monotonic()
    try:
        driver = await start(Path(workspace))
    except SandboxError as error:
        facts |= words(error)
    else:
        facts["ids"] = driver.session._pod.ids.kind
        try:
            facts["steps"] = [await perform(driver, step) for step in steps]
        finally:
            await stop(driver)
    facts["seconds"] = time.monotonic() - began_s
    leaks.until(lambda: not _left(before))
    facts["left"] = _left(before)
    sys.stdout.write(json.dumps(facts) + "\n")


def _left(before: leaks.Snapshot) -> dict[str, Any]:
    """Give what is still there of the session, of what this process can see."""
    children: list[str] = []
    for task in os.listdir("/proc/self/task"):
        children += Path(f"/proc/self/task/{task}/children").read_text(encoding="ascii").split()
    left = before.leaked()
    found = {"descriptors": left.get("descriptors"), "children": children}
    return {name: value for name, value in found.items() if value}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
