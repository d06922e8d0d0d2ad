"""The operating system's view of this process's threads: how many there are, and whose.

A native thread seldom has a name of its own, but the return addresses on its stack tell which
library runs it. That is worth a look, since some libraries' threads survive the loss by a fork
and others do not. Everything comes from /proc/self, and what cannot be read is "unknown".
"""

from __future__ import annotations

import bisect
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from sandbox_kernel.linux import libc

_TASKS = "/proc/self/task"
_STACK_BYTES = 4096
# Of these every stack has frames, so they say nothing about whose thread it is.
_RUNTIME = re.compile(r"(libc|libpthread|libgcc_s|libm|ld)[-.]|ld-linux|ld-musl")
_CPP_RUNTIME = re.compile(r"lib(std)?c\+\+")
_INTERPRETER = re.compile(r"(libpython3|python3?(\.\d+)?$)")
_OPENMP = re.compile(r"lib(gomp|omp|iomp5)\b")
_OPENBLAS = re.compile(r"lib\w*openblas")
INTERPRETER = "python"
"""The owner of a thread that runs Python code."""


class _Code(NamedTuple):
    """Executable file mappings, sorted: starts, ends and paths side by side."""

    starts: list[int]
    ends: list[int]
    paths: list[str]


class _Scan(NamedTuple):
    key: int
    code: _Code
    enders: list[Callable[[], object]]


class _Owners(NamedTuple):
    pid: int
    by_tid: dict[int, tuple[str, ...]]


_scan = _Scan(-1, _Code([], [], []), [])
_owners = _Owners(-1, {})


def count() -> int:
    """Give the number of threads, by one stat(2): a task directory has a link for each."""
    return os.stat(_TASKS).st_nlink - 2


def others() -> list[int]:
    """Give the ids of all threads but the main one."""
    main = os.getpid()
    return [int(name) for name in os.listdir(_TASKS) if int(name) != main]


def comm(tid: int) -> str:
    """Give the name the kernel has for a thread, 15 bytes at most; empty if it has ended."""
    try:
        with open(f"{_TASKS}/{tid}/comm", "rb") as file:
            return file.read().decode("utf-8", "replace").rstrip("\n")
    except OSError:
        return ""


def pool_enders() -> list[Callable[[], object]]:
    """Give calls that end the idle threads of every OpenMP and OpenBLAS that is loaded.

    A wheel brings its own copy of these libraries, so there may be many of each.
    """
    return _scanned().enders


def owners(tids: Iterable[int]) -> dict[int, tuple[str, ...]]:
    """Tell the paths of the libraries that may run each thread, likeliest first.

    Empty if it cannot be told, and INTERPRETER for a thread of the interpreter. Costs about
    0.1 ms for a thread not seen before, and nothing for others.
    """
    global _owners  # noqa: PLW0603 - a cache
    if _owners.pid != os.getpid():  # a fork of the process that filled it: its threads are gone
        _owners = _Owners(os.getpid(), {})
    known = _owners.by_tid
    wanted = list(tids)
    unseen = [tid for tid in wanted if tid not in known]
    if unseen:
        code = _scanned().code
        try:
            memory_fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # not dumpable, or /proc is masked
            return {tid: known.get(tid, ()) for tid in wanted}
        try:
            found = {tid: _owner(tid, memory_fd, code) for tid in unseen}
        finally:
            os.close(memory_fd)
        known.update((tid, paths) for tid, paths in found.items() if paths)
    return {tid: known.get(tid, ()) for tid in wanted}


def forget_scan() -> None:
    """Look at the loaded libraries anew next time: a thread runs one that is not known."""
    global _scan  # noqa: PLW0603 - a cache
    _scan = _scan._replace(key=-1)


def _scanned() -> _Scan:
    """Give what the memory map says; it is read again when a module was imported since.

    Nearly every library comes in by an import, and addresses are the same after a fork, so a
    session reads the map (3 ms in a large one) a few times only.
    """
    global _scan  # noqa: PLW0603 - a cache
    key = len(sys.modules)
    if _scan.key != key:
        code = _executable_mappings()
        _scan = _Scan(key, code, _find_enders(code.paths))
    return _scan


def _executable_mappings() -> _Code:
    code = _Code([], [], [])
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(None, 5)
            if len(fields) == 6 and "x" in fields[1] and fields[5].startswith("/"):
                start, end = fields[0].split("-")
                code.starts.append(int(start, 16))
                code.ends.append(int(end, 16))
                code.paths.append(fields[5].rstrip("\n"))
    return code


def _find_enders(paths: Iterable[str]) -> list[Callable[[], object]]:
    enders: list[Callable[[], object]] = []
    for path in sorted(set(paths)):
        name = os.path.basename(path)
        if _OPENMP.match(name):
            pause = libc.loaded_function(path, "omp_pause_resource_all")
            if pause is not None:  # OpenMP 5.0: 2 is omp_pause_hard, which frees the threads
                enders.append(lambda pause=pause: pause(2))  # type: ignore[misc]
        elif _OPENBLAS.match(name):
            shut_down = libc.loaded_function(path, "blas_thread_shutdown_")
            if shut_down is not None:  # the next parallel product starts them again
                enders.append(shut_down)
    return enders


def _owner(tid: int, memory_fd: int, code: _Code) -> tuple[str, ...]:
    try:
        with open(f"{_TASKS}/{tid}/syscall", "rb") as file:
            fields = file.read().split()
        # "running", or the call's number and arguments, stack pointer, program counter.
        stack = os.pread(memory_fd, _STACK_BYTES, int(fields[-2], 16)) if len(fields) > 2 else b""
    except (OSError, ValueError, OverflowError):  # it ended meanwhile
        return ()
    paths = _paths_on_stack(stack, code)
    if not paths or _CPP_RUNTIME.match(os.path.basename(paths[0])):
        # A std::thread: the C library, the C++ library, and whose it is below. Frames have
        # holes with words of the thread that had the stack before, so there may be several.
        return tuple(path for path in paths if not _CPP_RUNTIME.match(os.path.basename(path)))
    # Next to the C library's own frame there are no holes: the function that the thread runs.
    return (INTERPRETER,) if _INTERPRETER.match(os.path.basename(paths[0])) else (paths[0],)


def _paths_on_stack(stack: bytes, code: _Code) -> list[str]:
    """Give the files that addresses on a stack lie in, outermost frame first, each once."""
    paths: dict[str, None] = {}
    for (word,) in reversed(list(struct.iter_unpack("=Q", stack[: len(stack) & ~7]))):
        address = word & 0xFFFF_FFFF_FFFF  # arm64 signs return addresses in the bits above
        at = bisect.bisect_right(code.starts, address) - 1
        if at < 0 or address >= code.ends[at]:
            continue
        if not _RUNTIME.match(os.path.basename(code.paths[at])):
            paths.setdefault(code.paths[at])
    return list(paths)
