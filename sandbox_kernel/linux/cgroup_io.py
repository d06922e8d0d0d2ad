"""Find the disks behind files, as the numbers by which cgroups limit their traffic."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sandbox_kernel.linux.mountinfo import mount_of, parse_mounts

Device = tuple[int, int]
"""Major and minor number of a block device."""


def block_devices(
    paths: Iterable[str | Path], *, sys: Path = Path("/sys"), proc: Path = Path("/proc")
) -> tuple[Device, ...]:
    """Give the disks that hold these files, each once; a partition counts as its whole disk.

    What is in memory, an overlay or on a network has none, and adds nothing. Raises OSError for
    a path that is not there.
    """
    mounts = parse_mounts((proc / "self/mountinfo").read_text(encoding="utf-8"))
    found = set()
    for path in paths:
        number = os.stat(path).st_dev
        device = _whole_disk((os.major(number), os.minor(number)), sys)
        if device is None:
            # btrfs shows a number of its own for each subvolume; the mount names the device.
            mount = mount_of(os.path.realpath(path), mounts)
            device = None if mount is None else _named(mount.source, sys)
        if device is not None:
            found.add(device)
    return tuple(sorted(found))


def _named(source: str, sys: Path) -> Device | None:
    """Give the disk of a mount whose source is a device file."""
    if not source.startswith("/dev/"):
        return None
    try:
        number = os.stat(source).st_rdev
    except OSError:
        return None  # a container does not see the device of its mounts
    return _whole_disk((os.major(number), os.minor(number)), sys)


def _whole_disk(device: Device, sys: Path) -> Device | None:
    """Give the disk that a block device is, or is a part of; None for another number."""
    # The link leads to the device's folder; that of a partition is in the disk's.
    folder = Path(os.path.realpath(sys / "dev/block" / f"{device[0]}:{device[1]}"))
    if not (folder / "dev").is_file():
        return None
    if not (folder / "partition").exists():
        return device
    major, _, minor = (folder.parent / "dev").read_text(encoding="ascii").strip().partition(":")
    return int(major), int(minor)
