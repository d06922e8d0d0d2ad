"""Sort variables for the carrying by pickle: which pickle, which belong together, which hang.

All variables are pickled once into the void. That is done in a fork, since the pools of a library
may be dead here, and what then waits for them waits for ever: no signal ends it but SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from sandbox_kernel.guest import tasks
from sandbox_kernel.linux import libc

# So long nothing was computed and no variable finished; a machine under load computes a little.
_STILL_S = 3
_READ_BYTES = 1 << 16
# To share one of these is no bond: it is immutable, or found again by its name.
_UNBOUND = (str, bytes, int, float, complex, types.ModuleType, types.BuiltinFunctionType)

PicklerType = Callable[..., Any]


class Sorted(NamedTuple):
    """Groups of names whose variables share objects, and the reasons of those left out."""

    groups: list[list[str]]
    left_out: dict[str, str]


def sort_out(values: dict[str, Any], pickler_type: PicklerType) -> Sorted:
    """Tell which variables pickle and which of them must be in one pickle.

    `pickler_type` makes a pickler of a file and `buffer_callback`. Variables that hang cost 3 s
    each. In a process with threads it does not fork, and waits for ever as well.
    """
    if tasks.count() > 1:
        return _sort(values, pickler_type, lambda _: None)
    hanging: dict[str, str] = {}
    while rest := {name: value for name, value in values.items() if name not in hanging}:
        found = _sort_in_fork(rest, pickler_type)
        if isinstance(found, Sorted):
            found.left_out.update(hanging)
            return found
        name = found or next(iter(rest))
        hanging[name] = "it waits for threads that were lost"
    return Sorted([], hanging)


def reason(error: BaseException) -> str:
    """Give an exception in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _sort_in_fork(values: dict[str, Any], pickler_type: PicklerType) -> Sorted | str:
    """Sort in a fork; give the name of the variable at which it hung or died."""
    read_fd, write_fd = os.pipe()
    pid = libc.fork()
    if pid == 0:
        try:
            with open(write_fd, "w", encoding="utf-8") as file:

                def say(thing: Any) -> None:
                    file.write(json.dumps(thing) + "\n")
                    file.flush()

                say(list(_sort(values, pickler_type, say)))
        finally:
            os._exit(0)
    os.close(write_fd)
    try:
        said = _listen(read_fd, pid)
    finally:
        os.close(read_fd)
        # Where SIGCHLD is ignored it may be gone already, without a trace.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    last = json.loads(said[-1]) if said else ""
    return last if isinstance(last, str) else Sorted(*last)


def _listen(read_fd: int, pid: int) -> list[bytes]:
    """Give the lines that the fork wrote until it ended, or stood still."""
    data, still_s, used = bytearray(), 0, -1
    poll = select.poll()
    poll.register(read_fd, select.POLLIN)
    while still_s < _STILL_S:
        if poll.poll(1000):
            piece = os.read(read_fd, _READ_BYTES)
            if not piece:
                break
            data += piece
            still_s = 0
            continue
        before, used = used, _cpu_ticks(pid)
        still_s = 0 if used != before else still_s + 1
    return bytes(data).splitlines()


def _cpu_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[11]) + int(fields[12])  # user and system time; proc(5) counts from the pid


def _sort(
    values: dict[str, Any], pickler_type: PicklerType, begin: Callable[[str], None]
) -> Sorted:
    """Pickle each variable alone into the void; put those with a common object together."""
    left_out: dict[str, str] = {}
    leader = {name: name for name in values}
    owner: dict[int, str] = {}
    # Objects that only pickling made must live as long as their ids are compared.
    memos = []

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name] = leader[leader[name]]
        return name

    for name, value in values.items():
        begin(name)
        # Arrays go to the callback instead of being copied into the stream.
        pickler = pickler_type(_Void(), buffer_callback=lambda _: None)
        try:
            pickler.dump(value)
        except Exception as error:  # whatever a user's __reduce__ raises
            left_out[name] = reason(error)
            continue
        memo = pickler.memo.copy()
        memos.append(memo)
        for key, (_, thing) in memo.items():
            if not isinstance(thing, _UNBOUND) and _is_bond(thing):
                leader[find(name)] = find(owner.setdefault(key, name))
    groups: dict[str, list[str]] = {}
    for name in values:
        if name not in left_out:
            groups.setdefault(find(name), []).append(name)
    return Sorted(list(groups.values()), left_out)


def _is_bond(thing: Any) -> bool:
    from cloudpickle import cloudpickle

    kind = type(thing)
    if issubclass(kind, (type, types.FunctionType)):
        return not cloudpickle._should_pickle_by_reference(thing)
    # numpy has one object for each data type; all arrays would hang together by it.
    return not (kind.__module__ == "numpy.dtypes" or kind.__name__.startswith("dtype"))


class _Void:
    def write(self, data: Any) -> int:
        return memoryview(data).nbytes
