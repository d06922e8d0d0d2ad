"""Locks of the store: one file each, held by an open descriptor, gone with the process.

`flock` belongs to the open file: two threads of a process exclude each other as two processes
do, and Linux lets go of it however its holder ends.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.store_files import FILE_MODE

INDEX = "index"
"""Held by whoever writes index.json."""
PRUNE = "prune"
"""Held alone by a prune; shared by whoever begins to use something."""
_KEPT = frozenset({INDEX, PRUNE})
_NAME = re.compile(r"[a-z0-9][a-z0-9:._-]{0,199}", re.ASCII)


class Locks:
    """The locks in one folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def held(
        self, name: str, *, shared: bool = False, on_wait: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Hold a lock; wait for it if another has it, and call `on_wait` before."""
        if _NAME.fullmatch(name) is None:
            raise ImageError(f"{name[:200]!r} is not the name of a lock")
        path = self._folder / name.replace(":", "-")
        fd = self._acquire(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, on_wait)
        try:
            yield
        finally:
            # While it is held alone, so that whoever waits for it sees that it is gone.
            if not shared and name not in _KEPT:
                path.unlink(missing_ok=True)
            os.close(fd)

    @staticmethod
    def _acquire(path: Path, how: int, on_wait: Callable[[], None] | None) -> int:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
            try:
                try:
                    fcntl.flock(fd, how | fcntl.LOCK_NB)
                except BlockingIOError:
                    if on_wait is not None:
                        on_wait()
                    fcntl.flock(fd, how)
                if os.fstat(fd).st_nlink:
                    return fd
            except BaseException:  # also an interrupt while it waits
                os.close(fd)
                raise
            os.close(fd)
