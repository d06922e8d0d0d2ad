"""The same work on several items by several threads, which end together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

JOIN_TIMEOUT_S = 10.0
"""How long failed work waits for threads that wait for another process' lock."""


class Stopped(Exception):  # noqa: N818 - no mistake
    """The work that this is a part of has ended."""


def each(
    items: Sequence[T],
    work: Callable[[T], None],
    parallel: int,
    stop: threading.Event,
    abort: Callable[[], None],
) -> None:
    """Work on all items, `parallel` at once; the first failure is raised, and stops the others.

    They are stopped by `stop`, on which `work` raises Stopped, and by `abort`, which wakes them.
    """
    _Crew(items, work, stop, abort).run(parallel)


class _Crew(Generic[T]):
    """The threads of one such work."""

    def __init__(
        self,
        items: Sequence[T],
        work: Callable[[T], None],
        stop: threading.Event,
        abort: Callable[[], None],
    ) -> None:
        self._work = work
        self._stop = stop
        self._abort = abort
        self._count = len(items)
        self._failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self._waiting: queue.SimpleQueue[T] = queue.SimpleQueue()
        for item in items:
            self._waiting.put(item)

    def run(self, parallel: int) -> None:
        # Daemons: one that waits for another process' lock must not keep this one alive.
        threads = [
            threading.Thread(target=self._serve, daemon=True)
            for _ in range(min(max(1, parallel), self._count))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                self._wait_for(thread)
        except BaseException:  # also an interrupt: no thread works on
            self._end()
            for thread in threads:
                if thread.ident is not None:
                    thread.join(JOIN_TIMEOUT_S)
            raise
        if not self._failures.empty():
            raise self._failures.get()

    def _serve(self) -> None:
        try:
            while not self._stop.is_set():
                self._work(self._waiting.get_nowait())
        except (queue.Empty, Stopped):
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by who waits for the thread
            self._failures.put(error)
            self._end()

    def _wait_for(self, thread: threading.Thread) -> None:
        while thread.is_alive() and not self._stop.is_set():
            thread.join(JOIN_TIMEOUT_S)
        thread.join(JOIN_TIMEOUT_S)

    def _end(self) -> None:
        self._stop.set()
        self._abort()
