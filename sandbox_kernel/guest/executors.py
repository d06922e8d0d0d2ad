"""Python's pools of threads and processes in a forked process: find them, and mend them.

Only pools whose modules are loaded are looked for; nothing is imported for it. The attributes
used are private ones of the standard library and of loky, so a version that lacks one is no
error: that pool is then left as it is.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, InvalidStateError
from types import FrameType
from typing import Any, NamedTuple

_LOKY = ("loky.reusable_executor", "joblib.externals.loky.reusable_executor")
_REASON = "its workers ended with an earlier cell"


class Lost(NamedTuple):
    """Pools that had threads in the process this one was forked from, and what those ran."""

    thread_pools: list[Any]
    process_pools: list[Any]
    task_pools: list[Any]
    running: list[Any]
    """Futures that a thread was computing: nobody will ever set them."""


def drop_idle_loky() -> None:
    """End loky's shared executor if it has nothing to do; its next user gets a new one.

    Its workers would be killed with the cell anyway. Takes about 15 ms when there is one.
    """
    for module in _loaded(_LOKY):
        executor = getattr(module, "_executor", None)
        if executor is None or getattr(executor, "_pending_work_items", True):
            continue
        feeder = getattr(getattr(executor, "_call_queue", None), "_thread", None)
        executor.shutdown(wait=True, kill_workers=True)
        if feeder is not None:  # told to end, but nobody waited for it
            feeder.join(timeout=0.25)
        module._executor = None


def collect(dead: Iterable[threading.Thread], frames: Iterable[FrameType]) -> Lost:
    """Find the pools that dead threads served; call it while the threads' frames exist."""
    lost = Lost([], [], [], [])
    served: set[int] = {id(None)}
    has_task_pool = False
    for thread in dead:
        args: Any = getattr(thread, "_args", ())  # there until the thread's function returns
        # A manager thread of processes has the reference as an attribute, a worker as argument.
        reference = getattr(thread, "executor_reference", None)
        pools = lost.process_pools if reference is not None else lost.thread_pools
        if reference is None and _is_thread_worker(thread):
            reference = args[0]
        executor = reference() if callable(reference) else None
        if id(executor) not in served:
            served.add(id(executor))
            pools.append(executor)
        target = getattr(getattr(thread, "_target", None), "__qualname__", "")
        has_task_pool = has_task_pool or target.startswith("Pool._handle_")
    lost.running.extend(_running(frames))
    pool_module = sys.modules.get("multiprocessing.pool")
    if has_task_pool and pool_module is not None:
        # Its threads do not refer to it. type(), as isinstance() would call into users' proxies.
        lost.task_pools.extend(o for o in gc.get_objects() if issubclass(type(o), pool_module.Pool))
    return lost


def mend(lost: Lost) -> None:
    """Make the pools usable in this process, and break what they were to compute."""
    thread_module = sys.modules.get("concurrent.futures.thread")
    if thread_module is not None:
        thread_module._threads_queues.clear()  # joined at exit otherwise
    process_module = sys.modules.get("concurrent.futures.process")
    if process_module is not None:
        process_module._threads_wakeups.clear()  # the same
    for executor in lost.thread_pools:
        _attempt(_renew_threads, executor)
    for executor in lost.process_pools:
        _attempt(_renew_processes, executor)
    for pool in lost.task_pools:
        _attempt(_close_task_pool, pool)
    for future in lost.running:
        _break(future)
    for module in _loaded(_LOKY):
        module._executor = module._executor_kwargs = None
        module._executor_lock = threading.RLock()
    children = sys.modules.get("multiprocessing.process")
    if children is not None:
        children._children.clear()  # they are its parent's


def _loaded(names: Iterable[str]) -> Iterator[Any]:
    return (sys.modules[name] for name in names if name in sys.modules)


def _is_thread_worker(thread: threading.Thread) -> bool:
    target = getattr(thread, "_target", None)
    return getattr(target, "__module__", "") == "concurrent.futures.thread"


def _running(frames: Iterable[FrameType]) -> Iterator[Any]:
    """Give the futures of the work items that the frames are in the midst of."""
    module = sys.modules.get("concurrent.futures.thread")
    if module is None:
        return
    for frame in frames:
        at: FrameType | None = frame
        while at is not None:
            item = at.f_locals.get("work_item") if at.f_code.co_name == "_worker" else None
            if isinstance(item, module._WorkItem):
                yield item.future
            at = at.f_back


def _attempt(mend_one: Callable[[Any], None], pool: Any) -> None:
    try:
        mend_one(pool)
    except Exception as error:  # an unknown version, or a user's subclass: theirs to see
        sys.stderr.write(f"{type(pool).__name__} could not be restarted: {error}\n")


def _renew_threads(executor: Any) -> None:
    """Give a ThreadPoolExecutor an empty set of workers; the next submit starts the first.

    None is started here, since this process may be about to park. So what is queued is broken
    too: nobody would compute it, and its waiters wait for ever.
    """
    with contextlib.suppress(queue.Empty):
        while True:
            item = executor._work_queue.get_nowait()
            if item is not None:
                _break(item.future)
    executor._work_queue = queue.SimpleQueue()
    executor._threads = set()
    executor._idle_semaphore = threading.Semaphore(0)
    executor._shutdown_lock = threading.Lock()


def _renew_processes(executor: Any) -> None:
    """Make a ProcessPoolExecutor as new; what was submitted is marked broken."""
    process: Any = sys.modules["concurrent.futures.process"]
    pending = list((executor._pending_work_items or {}).values())
    for item in pending:
        _break(item.future)
    # The manager thread's farewell, when it is collected, takes this lock.
    executor._shutdown_lock._at_fork_reinit()
    if type(executor) is not process.ProcessPoolExecutor:
        if hasattr(executor, "_broken"):
            executor._broken = _REASON
        flags = getattr(executor, "_flags", None)
        if flags is not None:  # loky's
            flags.shutdown_lock = threading.Lock()
            flags.broken = process.BrokenProcessPool(_REASON)
        return
    if executor._shutdown_thread:  # the user has closed it
        return
    options = {"max_tasks_per_child": getattr(executor, "_max_tasks_per_child", None)}
    process.ProcessPoolExecutor.__init__(
        executor,
        executor._max_workers,
        executor._mp_context,
        executor._initializer,
        executor._initargs,
        **{name: value for name, value in options.items() if value is not None},
    )


def _close_task_pool(pool: Any) -> None:
    """Close a multiprocessing.Pool: its methods raise ValueError instead of waiting for ever."""
    pool._state = "TERMINATE"
    for result in list(pool._cache.values()):
        with contextlib.suppress(AttributeError, TypeError):
            result._success, result._value = False, RuntimeError(_REASON)
            result._event.set()


def _break(future: Any) -> None:
    future._condition = threading.Condition()  # a dead thread may hold the old one
    with contextlib.suppress(InvalidStateError):
        future.set_exception(BrokenExecutor(_REASON))
