"""Leases: what a living process uses of the store, so that a prune does not take it.

A lease is a file that names digests, and a lock on it that ends with its process. It names
blobs, layers by DiffID or ChainID, or the manifest of an image for all that belongs to it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from pathlib import Path
from types import TracebackType

from sandbox_kernel.image.media import check_digest
from sandbox_kernel.image.store_files import FILE_MODE
from sandbox_kernel.image.store_locks import PRUNE, Locks


class Lease:
    """A claim on digests that lasts until `close`, or as long as the process."""

    def __init__(self, folder: Path, locks: Locks) -> None:
        self._locks = locks
        self._named: set[str] = set()
        self._mutex = threading.Lock()
        self._path = folder / secrets.token_hex(8)
        # A prune, which removes files that nobody has locked, must not see it without its lock.
        with locks.held(PRUNE, shared=True):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, FILE_MODE)
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def add(self, *digests: str) -> None:
        """Claim more digests; waits for a prune that is at work.

        What is there afterwards stays there: look again if you looked before.
        """
        with self._mutex:
            new = [one for one in map(check_digest, digests) if one not in self._named]
            if not new:
                return
            with self._locks.held(PRUNE, shared=True):
                os.write(self._fd, "".join(f"{one}\n" for one in new).encode())
            self._named.update(new)

    def close(self) -> None:
        """Give back what was claimed."""
        with self._mutex:
            if self._fd >= 0:
                self._path.unlink(missing_ok=True)
                # Named, since a forked child may hold the same open file.
                fcntl.flock(self._fd, fcntl.LOCK_UN)
                os.close(self._fd)
                self._fd = -1

    def hand_over(self) -> int:
        """Give the descriptor away: the lease lasts as long as any process has it open."""
        with self._mutex:
            fd, self._fd = self._fd, -1
        return fd

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def leased(folder: Path) -> set[str]:
    """Give all that living processes claim, and remove the leases of the others.

    Call it only while PRUNE is held alone.
    """
    found: set[str] = set()
    for name in os.listdir(folder):
        path = folder / name
        try:
            file = path.open("rb")
        except FileNotFoundError:
            # Its process closed it just now.
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.update(file.read().decode("ascii").split())
            else:
                path.unlink(missing_ok=True)
    return found
