"""Fork a process that has other threads, which plain `libc.fork` may not do."""

from __future__ import annotations

import _imp
import operator

from sandbox_kernel.linux import libc


def fork_beside_threads() -> int:
    """Fork; CPython's after-fork work is done in the child before anything else.

    Fork and that work are one call of C, with no bytecode between: if another thread waits for
    the GIL at the moment of the fork, the first bytecode of the child would hand it over and
    wait for ever. Raises OSError.
    """
    call = operator.methodcaller("__call__")
    _imp.acquire_lock()  # the child's after-fork work releases it; since Python 3.13 it must
    pid: int = next(filter(None, map(call, (libc.raw_fork, libc.after_fork_child))), 0)
    if pid:
        _imp.release_lock()
    if pid == -1:
        raise OSError("fork: no process could be made")
    return pid
