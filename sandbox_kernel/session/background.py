"""Tasks that run behind the requests of a session, and are awaited when it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sandbox_kernel.errors import SandboxError

T = TypeVar("T")


async def aside(act: Callable[[], None]) -> None:
    """Do what may have to wait for the host in a thread, or at once where none can be started."""
    begun = False

    def once() -> None:
        nonlocal begun
        if not begun:  # it may be taken up by a thread later, all the same
            begun = True
            act()

    try:
        await asyncio.to_thread(once)
    except RuntimeError:  # the host lets no more processes start
        if begun:
            raise
        once()


class Background:
    """The tasks of one session."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work`; whoever awaits the task gets its failure, and nobody has to."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report what is handled later

    async def join(self) -> None:
        """Wait until all have ended; their failures are those of a session that ends."""
        while self._tasks:
            for task in tuple(self._tasks):
                with contextlib.suppress(SandboxError, asyncio.CancelledError, OSError):
                    await task
                self._tasks.discard(task)
