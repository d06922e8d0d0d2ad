"""Sessions for tests, with a look at what is left of them at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.integration import leaks
from tests.integration.driver import Driver, Shared, assert_quiet, start, stop

if TYPE_CHECKING:
    from tests.integration.builds import Workshop


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shared]:
    """Keep one session for a module, and look for leaks when it has ended."""
    keeper = Shared(tmp_path_factory.mktemp("workspace"))
    yield keeper
    await keeper.end()


@pytest_asyncio.fixture(loop_scope="module")
async def box(shared: Shared) -> AsyncIterator[Driver]:
    """Give the module's session; after the test nothing of its cells may be left."""
    driver = await shared.get()
    yield driver
    if not driver.broken and not driver.lost:
        await assert_quiet(driver)


@pytest_asyncio.fixture(loop_scope="module")
async def fresh(shared: Shared, tmp_path: Path) -> AsyncIterator[Driver]:
    """Give a session for one test alone: no other is there that could look like a leak."""
    await shared.end()
    before = leaks.Snapshot()
    driver = await start(tmp_path)
    yield driver
    if not driver.broken and not driver.lost:
        await assert_quiet(driver)
    await stop(driver)
    before.assert_clean()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    """Give a store with a small base in it, to build on; nothing may be left of the builds."""
    from tests.integration.builds import Workshop  # most tests here build nothing

    before = leaks.Snapshot()
    shop = Workshop(tmp_path)
    shop.add_base()
    yield shop
    shop.close()
    before.assert_clean()
