"""Threads at the two sides of a fork: end what can be ended before, mend what is lost after.

A fork keeps the calling thread only. Idle native pools are ended beforehand and start again
when they are next used; Python's own pools get fresh workers afterwards. What is left is named,
so that the session keeps the process itself, threads and all, for the next cell.
"""

from __future__ import annotations

import os
import re
import select
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from sandbox_kernel.guest import executors, tasks
from sandbox_kernel.linux.forks import fork_beside_threads

_WAIT_S = 0.25
# Libraries whose threads a fork may lose: each notices, or has a pthread_atfork handler, or lets
# the calling thread do the work. Tried in chains of 40 forks, each generation working first.
_SURVIVES = re.compile(r"/libarrow[^/]*\.so|/_?duckdb[^/]*\.so|/numexpr/")
# jemalloc's purging thread restarts after a fork; polars' spill cleaner is idle until it is used.
_SURVIVES_BY_NAME = re.compile(r"jemalloc_bg_thd$|polars-ooc-clea")
# Pools that wait for ever for the threads a fork took from them.
_HANGS = re.compile(
    r"polars|rayon|tokio-rt-worker|async-executor|libgomp|libomp|libiomp5|libtorch|pt_autograd|libtbb"
    r"|cuda|nvidia"
)
_HANGS_IN_CPP = re.compile(r"libtorch|libtbb|cuda|nvidia")


def quiesce() -> list[str]:
    """End idle native pools and name the threads that a fork would lose all the same.

    Call it on the main thread at the end of a cell. A name is `python:` and the thread's, or
    `native:`, the kernel's name for it and the library that runs it in brackets. Threads whose
    library is known to bear a fork are not named. Costs 3 us when there is one thread.
    Waits for threads that are about to end: about 1 ms on an idle machine, 0.25 s at most, and
    for one that stays only once.
    """
    if tasks.count() == 1:
        return []
    executors.drop_idle_loky()
    if not _python_threads():
        # Only then: to end a pool that another thread computes with would break its computation.
        _end_pools()
    return _name_lost()


def unforkable(names: Iterable[str]) -> list[str]:
    """Select, of names that `quiesce` gave, the native pools that hang in a forked process.

    A state that had one of them and was forked must be carried into a fresh interpreter.
    """
    return [name for name in names if name.startswith("native:") and _HANGS.search(name)]


def fork() -> int:
    """Copy this process though it has other threads, and mend the child; give its pid, 0 in it.

    At-fork hooks for the child run, the user's too, as they are what libraries mend themselves
    with; `random` keeps its state. Pools of threads work again, pools of processes start anew,
    work that was under way is marked broken.
    """
    frames = sys._current_frames()
    dead = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    lost = executors.collect(dead, frames.values())
    frames.clear()
    random = sys.modules.get("random")
    state = random.getstate() if random is not None else None
    hook, sys.unraisablehook = sys.unraisablehook, _ignore_unreleased
    try:
        pid = fork_beside_threads()
    finally:
        sys.unraisablehook = hook
    if pid == 0:
        if random is not None:
            random.setstate(state)  # CPython's own hook has seeded it anew
        executors.mend(lost)
    return pid


def _ignore_unreleased(problem: Any) -> None:
    """Drop the complaints of hooks that release what their `before` hook would have taken."""
    if not isinstance(problem.exc_value, (RuntimeError, AssertionError)):
        sys.__unraisablehook__(problem)


def _python_threads() -> dict[int, str]:
    """Give the names of Python's threads but the main one, by their kernel ids."""
    main = threading.main_thread()
    return {
        thread.native_id: thread.name
        for thread in threading.enumerate()
        if thread is not main and thread.native_id is not None
    }


def _end_pools() -> None:
    """End OpenMP's and OpenBLAS's threads and wait until the kernel has let go of them."""
    left = _unknown()
    if not left:
        return
    for end in tasks.pool_enders():
        end()
    # There is no event for the end of a thread that is not one's own to join (a pidfd for
    # threads came with Linux 6.9), so look again, first at once, then each half millisecond.
    deadline_s = time.monotonic() + _WAIT_S
    yields = 20
    while (left := _unknown()) and not left <= _stubborn.tids:
        if time.monotonic() > deadline_s:
            _stubborn.tids = left  # not to be waited for again
            tasks.forget_scan()
            return
        if yields:
            yields -= 1
            os.sched_yield()
        else:
            select.select([], [], [], 0.0005)


class _Stubborn:
    """Threads that did not end when they were waited for."""

    tids: set[int] = set()  # replaced, never changed


_stubborn = _Stubborn()


def _unknown() -> set[int]:
    """Give the threads that are not known to bear a fork."""
    return {tid for tid, paths in tasks.owners(tasks.others()).items() if not _survives(tid, paths)}


def _survives(tid: int, paths: tuple[str, ...]) -> bool:
    if any(_SURVIVES.search(path) for path in paths):
        # There are several for a std::thread only, which no OpenMP runtime uses.
        return not any(_HANGS_IN_CPP.search(os.path.basename(path)) for path in paths)
    return paths != (tasks.INTERPRETER,) and bool(_SURVIVES_BY_NAME.match(tasks.comm(tid)))


def _name_lost() -> list[str]:
    python = _python_threads()
    names = []
    for tid, paths in sorted(tasks.owners(tasks.others()).items()):
        comm = tasks.comm(tid)
        if tid in python:
            names.append(f"python:{python[tid]}")
        elif not comm or _survives(tid, paths):
            continue
        elif paths == (tasks.INTERPRETER,):
            names.append(f"python:{comm}")
        else:
            library = os.path.basename(paths[0]) if paths else "unknown"
            names.append(f"native:{comm} [{library}]")
    return names
