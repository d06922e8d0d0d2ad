"""Sessions that the probes of a module share, by the guards that are off."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.escape.sessions import session
from tests.integration import leaks
from tests.integration.driver import Driver, stop

Open = Callable[..., Awaitable[Driver]]
RESULTS = Path(__file__).resolve().parents[2] / "build" / "probes.json"
_results: dict[str, Any] = {}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def boxes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Open]:
    """Give a session by the names of the guards it lacks; the same one again while it lives."""
    before = leaks.Snapshot()
    known: dict[tuple[str, ...], Driver] = {}

    async def open_(*guards: str) -> Driver:
        box = known.get(guards)
        if box is not None and (box.lost or box.broken):
            await stop(box)
            box = None
        if box is None:
            box = known[guards] = await session(tmp_path_factory.mktemp("box"), *guards)
        return box

    yield open_
    for box in known.values():
        await stop(box)
    before.assert_clean()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/security.md's table")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        _results[report.nodeid] = {"outcome": report.outcome, **({"why": reason} if reason else {})}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep what came of each test of this folder, beside what the table says of it."""
    ours = {name: found for name, found in _results.items() if "/escape/" in f"/{name}"}
    if ours:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(ours, indent=1, sort_keys=True) + "\n", "utf-8")
