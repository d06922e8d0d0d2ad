"""Files of the store: written whole or not at all, and removed whatever their modes are.

An ordinary user's store may hold files of his subordinate ids (`owned`, and what a RUN left in what
it was shown); these are removed by a child that has the ids.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.owned_space import remove_mapped

FOLDER_MODE = 0o700
FILE_MODE = 0o600
_TRIES = 100


def sync_folder(folder: Path) -> None:
    """Make what was renamed into or out of a folder outlast a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, data: bytes, staging: Staging, *, durable: bool = True) -> None:
    """Write or replace a file such that a reader, also after a crash, sees it old or new.

    One that is not `durable` may be old or empty after a loss of power.
    """
    draft = staging.path()
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(fd)
        os.replace(draft, path)
    except BaseException:  # also an interrupt: the draft goes
        draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder and all below it, also what its owner may not read or enter.

    Folders are moved to the top before they are emptied: so neither a path nor a stack grows
    with the depth of the tree. Raises PermissionError in the end if something had to be left.
    """
    numbers = itertools.count()
    # Not a name that the tree itself uses, since both lie in the same folder.
    prefix = secrets.token_hex(8)
    refused: list[PermissionError] = []
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        waiting = ["."]
        while waiting:
            name = waiting.pop()
            before = len(refused)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            try:
                moved = (f"{prefix}{number}" for number in numbers)
                waiting += _empty(fd, top, moved, refused)
            finally:
                os.close(fd)
            if name != "." and len(refused) == before:
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    if refused:
        raise refused[0]
    os.rmdir(path)


def _empty(fd: int, top: int, names: Iterator[str], refused: list[PermissionError]) -> list[str]:
    """Remove the files of a folder and move its folders to the top; give their new names."""
    moved: list[str] = []
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        try:
            if not is_folder:
                os.unlink(name, dir_fd=fd)
                continue
            # To be moved, a folder must be writable itself: its entry `..` changes.
            os.chmod(name, FOLDER_MODE, dir_fd=fd)
            new = next(names)
            os.rename(name, new, src_dir_fd=fd, dst_dir_fd=top)
            moved.append(new)
        except PermissionError as error:
            refused.append(error)
    return moved


def take_away(path: Path, staging: Staging) -> Path | None:
    """Move a file or folder to staging, for `remove`; None if it is missing."""
    gone = staging.path()
    try:
        os.rename(path, gone)
    except FileNotFoundError:
        return None
    return gone


def discard(path: Path, staging: Staging) -> None:
    """Take a file or folder away at once, and remove it then; nothing happens if it is missing.

    What cannot be removed now, see `remove`, waits in staging.
    """
    gone = take_away(path, staging)
    if gone is not None:
        with contextlib.suppress(ImageError):
            remove(gone)


def remove(path: Path) -> None:
    """Remove a file or a folder that nobody else uses.

    Raises ImageError where an ordinary user's holds files of other ids, and he cannot act for
    them any more: his ranges have changed, or newuidmap is gone. What else is in it is gone then.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    try:
        os.chmod(path, FOLDER_MODE)
        remove_tree(path)
    except PermissionError:
        if os.geteuid() == 0:
            raise
        remove_mapped(path)


class Staging:
    """A folder for what is not whole yet, of one process, on the store's own file system.

    It is locked as long as its process lives; `sweep` removes those whose process is gone.
    """

    def __init__(self, parent: Path) -> None:
        self._numbers = itertools.count()
        self.folder, self._fd = _locked_folder(parent)

    def path(self) -> Path:
        """Give a path that nothing else has."""
        return self.folder / str(next(self._numbers))

    def close(self) -> None:
        """Remove the folder with all in it; what cannot be removed now waits for a sweep."""
        if self._fd >= 0:
            with contextlib.suppress(ImageError):
                remove(self.folder)
            os.close(self._fd)
            self._fd = -1


def _locked_folder(parent: Path) -> tuple[Path, int]:
    for _ in range(_TRIES):
        folder = parent / secrets.token_hex(8)
        folder.mkdir(FOLDER_MODE)
        fd = _lock_folder(folder)
        if fd is not None:
            return folder, fd
    raise ImageError(f"no folder can be locked in {parent}")


def _lock_folder(folder: Path) -> int | None:
    """Lock a folder if nobody holds it and it is still there; give the descriptor."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A sweep may have removed it between the opening and the lock.
        if os.path.samestat(os.fstat(fd), os.stat(folder)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def sweep(parent: Path) -> int:
    """Remove the staging folders that nobody holds; give their number."""
    count = 0
    for name in os.listdir(parent):
        fd = _lock_folder(parent / name)
        if fd is None:
            continue
        try:
            remove(parent / name)
            count += 1
        except (OSError, ImageError):
            # What a killed process started may still write there; the next sweep takes it. Or it
            # holds files of other ids, see `remove`.
            continue
        finally:
            os.close(fd)
    return count
