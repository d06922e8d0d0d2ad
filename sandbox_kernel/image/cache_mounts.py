"""What `RUN --mount=type=cache` keeps from build to build: folders, locked while a step has one.

The lock is a file beside the folder, which a step may close to its own user: shared by steps that
share it, held alone by a step that asked for a private one, and by who takes it away.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.image.store_files import FILE_MODE, FOLDER_MODE, Staging, take_away


@dataclass(frozen=True)
class CacheMount:
    """One of these folders; `used_s` is when a step last began with it, in seconds since 1970.

    `size_bytes` is what can be seen of it: a step of an ordinary user may have closed folders with
    another id.
    """

    path: Path
    used_s: float
    size_bytes: int


@dataclass(frozen=True)
class Look:
    """How a new folder looks to the step."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0


class CacheMounts:
    """The folders below one folder."""

    def __init__(self, folder: Path, staging: Staging) -> None:
        self._folder = folder
        self._staging = staging

    @contextlib.contextmanager
    def used(self, name: str, look: Look, *, alone: bool = False) -> Iterator[Path]:
        """Give a folder to a step; `alone` gives another one where others have it."""
        self._folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        names = (f"{name}.{number}" for number in itertools.count()) if alone else [name]
        for one in names:
            path = self._folder / one
            with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH) as fd:
                if fd is not None:
                    os.utime(fd)
                    _make(path, look)
                    yield path
                    return

    def all(self) -> tuple[CacheMount, ...]:
        """Give all, the one used last first."""
        found = []
        for path in _folders(self._folder):
            with contextlib.suppress(FileNotFoundError):
                used_s = _lock_of(path).stat().st_mtime
                found.append(CacheMount(path, used_s, _size_bytes(path)))
        return tuple(sorted(found, key=lambda one: (-one.used_s, one.path)))

    def take_away(self, mount: CacheMount) -> Path | None:
        """Move one to staging, for removal; None if a step has it, or it is gone."""
        with _locked(mount.path, fcntl.LOCK_EX | fcntl.LOCK_NB) as fd:
            return take_away(mount.path, self._staging) if fd is not None else None


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[int | None]:
    """Lock the file beside a folder, which is never removed; give None where another has it."""
    fd = os.open(_lock_of(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        try:
            fcntl.flock(fd, how)
        except BlockingIOError:
            yield None
        else:
            yield fd
    finally:
        os.close(fd)


def _make(path: Path, look: Look) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir()
        path.chmod(look.mode)
        if os.geteuid() == 0:
            os.chown(path, look.uid, look.gid)


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(one.path) for one in entries if one.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _size_bytes(path: Path) -> int:
    """Add up the files; what goes while this looks, or cannot be seen, does not count."""
    size_bytes = 0
    for above, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                size_bytes += os.lstat(os.path.join(above, name)).st_size
    return size_bytes
