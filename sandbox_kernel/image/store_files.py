"""Files of the store: written whole or not at all, and removed whatever their modes are."""

from __future__ import annotations

import fcntl
import itertools
import os
import secrets
from pathlib import Path

from sandbox_kernel.errors import ImageError

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
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder and all below it, also what its owner may not read or enter.

    Folders are moved to the top before they are emptied: so neither a path nor a stack grows
    with the depth of the tree.
    """
    numbers = itertools.count()
    # Not a name that the tree itself uses, since both lie in the same folder.
    prefix = secrets.token_hex(8)
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        waiting = ["."]
        while waiting:
            name = waiting.pop()
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            try:
                waiting += _empty(fd, top, prefix, numbers)
            finally:
                os.close(fd)
            if name != ".":
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(path)


def _empty(fd: int, top: int, prefix: str, numbers: itertools.count[int]) -> list[str]:
    """Remove the files of a folder and move its folders to the top; give their new names."""
    moved = []
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=fd)
            continue
        if os.path.samestat(os.fstat(fd), os.fstat(top)) and name.startswith(prefix):
            continue
        # To be moved, a folder must be writable itself: its entry `..` changes.
        os.chmod(name, FOLDER_MODE, dir_fd=fd)
        new = f"{prefix}{next(numbers)}"
        os.rename(name, new, src_dir_fd=fd, dst_dir_fd=top)
        moved.append(new)
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
    """Take a file or folder away at once, and remove it then; nothing happens if it is missing."""
    gone = take_away(path, staging)
    if gone is not None:
        remove(gone)


def remove(path: Path) -> None:
    """Remove a file or a folder that nobody else uses."""
    if path.is_dir() and not path.is_symlink():
        os.chmod(path, FOLDER_MODE)
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


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
        """Remove the folder with all in it."""
        if self._fd >= 0:
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
        except OSError:
            # What a killed process started may still write there; the next sweep takes it.
            continue
        finally:
            os.close(fd)
    return count
