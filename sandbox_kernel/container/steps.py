"""The steps that build a container's root: values that can say themselves and run themselves.

A step decides nothing. `plan` puts steps in order, `build` runs them, and an OSError of a step
becomes a LaunchError that quotes `describe()`. Paths are paths of the builder, which sits in
init's small root (see `base`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sandbox_kernel.linux import libc

ROOT_FLAGS = libc.MS_NOSUID | libc.MS_NODEV


@dataclass(frozen=True)
class Overlay:
    """Mount lowers, newest first, and one upper at `target`.

    The names of lowers, upper and work are relative to `folder`: mount(2) takes one page of
    options, and short names let hundreds of layers fit in it.
    """

    folder: str
    lowers: tuple[str, ...]
    upper: str
    work: str
    target: str

    def describe(self) -> str:
        """Say it in one line."""
        return f"overlay of {len(self.lowers)} layers at {self.target}"

    def run(self) -> None:
        """Mount it; the upper is thrown away or kept as a whole, so it need not be synced."""
        options = (
            f"lowerdir={':'.join(self.lowers)},upperdir={self.upper},workdir={self.work},"
            "userxattr,volatile"
        )
        before = os.open(".", os.O_PATH | os.O_CLOEXEC)
        try:
            os.chdir(self.folder)
            libc.mount("overlay", self.target, fstype="overlay", flags=ROOT_FLAGS, data=options)
        finally:
            os.fchdir(before)
            os.close(before)


@dataclass(frozen=True)
class BindMount:
    """Show `source` and what is mounted below it at `target`, which must exist."""

    source: str
    target: str

    def describe(self) -> str:
        """Say it in one line."""
        return f"bind {self.source} at {self.target}"

    def run(self) -> None:
        """Bind it; a clone keeps the read-only flag of its source."""
        libc.mount(self.source, self.target, flags=libc.MS_BIND | libc.MS_REC)


@dataclass(frozen=True)
class ReadOnlyBind:
    """Bind a path onto itself, read-only."""

    target: str

    def describe(self) -> str:
        """Say it in one line."""
        return f"read-only {self.target}"

    def run(self) -> None:
        """Bind, then set the flag: mount(2) ignores MS_RDONLY on the bind itself."""
        libc.mount(self.target, self.target, flags=libc.MS_BIND | libc.MS_REC)
        libc.mount_setattr(self.target, attr_set=libc.MOUNT_ATTR_RDONLY, flags=libc.AT_RECURSIVE)


@dataclass(frozen=True)
class FileSystem:
    """Mount a new instance of a file system of the kernel, proc for one."""

    fstype: str
    target: str
    options: str = ""
    flags: int = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC

    def describe(self) -> str:
        """Say it in one line."""
        return f"{self.fstype} at {self.target}"

    def run(self) -> None:
        """Mount it."""
        libc.mount(
            self.fstype, self.target, fstype=self.fstype, flags=self.flags, data=self.options
        )


@dataclass(frozen=True)
class MakeFolder:
    """Make a folder with exactly this mode."""

    path: str
    mode: int = 0o755

    def describe(self) -> str:
        """Say it in one line."""
        return f"folder {self.path}"

    def run(self) -> None:
        """Make it; one that is there keeps its content and gets the mode."""
        os.makedirs(self.path, exist_ok=True)
        os.chmod(self.path, self.mode)


@dataclass(frozen=True)
class Pivot:
    """Make `root` the root of this mount namespace and let go of the old one."""

    root: str

    def describe(self) -> str:
        """Say it in one line."""
        return f"pivot into {self.root}"

    def run(self) -> None:
        """Pivot by stacking (pivot_root(2), NOTES): no folder for the old root is needed."""
        os.chdir(self.root)
        libc.pivot_root(".", ".")
        libc.umount2(".", libc.MNT_DETACH)
        os.chdir("/")


Step = Overlay | BindMount | ReadOnlyBind | FileSystem | MakeFolder | Pivot
