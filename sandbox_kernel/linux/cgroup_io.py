"""Find the disks behind files, as the numbers by which cgroups limit their traffic."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.linux.mountinfo import Mount, mount_of, parse_mounts

Device = tuple[int, int]
"""Major and minor number of a block device."""
MEMORY = frozenset({"tmpfs", "ramfs"})
"""File systems whose files are in memory, so that no disk is read or written."""
WRITEBACK = frozenset({"ext2", "ext4", "btrfs", "f2fs", "xfs"})
"""File systems that tell whose data it is that they write back from the page cache.

All other data counts for the root group (cgroup-v2.rst, "Writeback").
"""


@dataclass(frozen=True)
class Ground:
    """What the files of one folder lie on."""

    path: str
    fs_type: str
    disks: tuple[Device, ...]
    """Whole disks; empty where the file system is on none, or does not say on which."""


def block_devices(
    paths: Iterable[str | Path], *, sys: Path = Path("/sys"), proc: Path = Path("/proc")
) -> tuple[Device, ...]:
    """Give the disks that hold these files, each once; a partition counts as its whole disk.

    What is in memory, an overlay or on a network has none, and adds nothing. Raises OSError for
    a path that is not there.
    """
    return disks_of(grounds(paths, sys=sys, proc=proc))


def disks_of(found: Iterable[Ground]) -> tuple[Device, ...]:
    """Give the disks of all these, each once."""
    return tuple(sorted({disk for ground in found for disk in ground.disks}))


def grounds(
    paths: Iterable[str | Path],
    *,
    inside: bool = False,
    sys: Path = Path("/sys"),
    proc: Path = Path("/proc"),
) -> list[Ground]:
    """Tell what each path lies on, and each mount `inside` of it; raises OSError without a path."""
    mounts = parse_mounts((proc / "self/mountinfo").read_text(encoding="utf-8"))
    found = []
    for path in map(str, paths):
        real = os.path.realpath(path)
        found.append(_ground(path, os.stat(real).st_dev, mount_of(real, mounts), sys))
        for mount in mounts if inside else ():
            if not mount.mount_point.startswith(real.rstrip("/") + "/"):
                continue
            try:
                number = os.stat(mount.mount_point).st_dev
            except OSError:
                continue  # covered by another mount, or out of this user's reach: a cell's too
            found.append(_ground(mount.mount_point, number, mount, sys))
    return found


def _ground(path: str, number: int, mount: Mount | None, sys: Path) -> Ground:
    device = (os.major(number), os.minor(number))
    if mount is not None and not (sys / "dev/block" / _text(device)).exists():
        # btrfs shows a number of its own for each subvolume; the mount names the device.
        device = _named(mount.source) or device
    members = _pool(device, sys) or {device}
    disks = {disk for member in members if (disk := _whole_disk(member, sys)) is not None}
    return Ground(path, "" if mount is None else mount.fs_type, tuple(sorted(disks)))


def _text(device: Device) -> str:
    return f"{device[0]}:{device[1]}"


def _number(file: Path) -> Device:
    major, _, minor = file.read_text(encoding="ascii").strip().partition(":")
    return int(major), int(minor)


def _named(source: str) -> Device | None:
    """Give the number of a mount's source, if that is a device file."""
    if not source.startswith("/dev/"):
        return None
    try:
        number = os.stat(source).st_rdev
    except OSError:
        return None  # a container does not see the device of its mounts
    return os.major(number), os.minor(number)


def _pool(device: Device, sys: Path) -> set[Device]:
    """Give all devices of the btrfs that this one is a part of; a mount names only one."""
    for folder in (sys / "fs/btrfs").glob("*/devices"):
        members = {_number(entry / "dev") for entry in folder.iterdir()}
        if device in members:
            return members
    return set()


def _whole_disk(device: Device, sys: Path) -> Device | None:
    """Give the disk that a block device is, or is a part of; None for another number."""
    # The link leads to the device's folder; that of a partition is in the disk's.
    folder = Path(os.path.realpath(sys / "dev/block" / _text(device)))
    if not (folder / "dev").is_file():
        return None
    return _number(folder.parent / "dev") if (folder / "partition").exists() else device
