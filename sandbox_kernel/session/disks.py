"""The disks that a session's cells can reach, if their traffic is to be limited.

A cell reads the image and the notebook's folder; what it writes is in memory, unless it is shown
the folder itself (`rw`). Whatever could be read or written past the limit is an error here.
"""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux.cgroup import Cgroup
from sandbox_kernel.linux.cgroup_io import MEMORY, WRITEBACK, Device, disks_of, grounds
from sandbox_kernel.model import Limits, SessionSpec

PACKAGE = str(Path(__file__).resolve().parents[1])
_WAIVE = "or do without the limit: --waive io"


def limits_io(spec: SessionSpec) -> bool:
    """Tell whether disk traffic is to be limited."""
    return spec.limits.io_bytes_per_s is not None and "io" not in spec.waived


class DiskTraffic:
    """The limits of what a session reads from disks and writes to them.

    Raises HostError where they cannot be enforced, or would not hold for everything.
    """

    def __init__(self, spec: SessionSpec, session: Cgroup) -> None:
        self._spec = spec
        self._session = session
        self._disks = _reached(spec, session) if limits_io(spec) else ()

    def limit(self, cgroup: Cgroup, limits: Limits) -> None:
        """Limit the traffic of a group inside the session's."""
        if "io" not in self._spec.waived:
            cgroup.limit(io_bytes_per_s=limits.io_bytes_per_s, devices=self._disks)

    def limit_remains(self) -> None:
        """Limit what cells that have ended left in the page cache, once the session is up.

        It is written back for the group above theirs, so the ceiling holds for the session.
        """
        if limits_io(self._spec) and _writes_to_disk(self._spec):
            self.limit(self._session, self._spec.ceiling)


def _writes_to_disk(spec: SessionSpec) -> bool:
    """Tell whether cells can write elsewhere than into memory."""
    return spec.workspace_mode == "rw"


def _reached(spec: SessionSpec, cgroup: Cgroup) -> tuple[Device, ...]:
    """Give the disks behind all that a cell can read or write.

    Empty where there is no controller: `Cgroup.limit` says why then.
    """
    if not cgroup.can("io"):
        return ()
    shown = [spec.workspace] if spec.workspace_mode != "none" else []
    try:
        # The notebook's folder is shown without the mounts in it, the image's with them.
        found = grounds(_of_image(spec), inside=True) + (folder := grounds(shown))
    except OSError as error:
        raise HostError(
            f"cannot limit io: {error.filename} cannot be looked at: {error.strerror}", hint=_WAIVE
        ) from error
    for ground in found:
        if not ground.disks and ground.fs_type not in MEMORY:
            raise HostError(
                f"cannot limit io: {ground.path} is on a file system ({ground.fs_type}) that names "
                "no disk of this machine",
                hint=f"keep it on a disk, for example with ext4, xfs or btrfs, {_WAIVE}",
            )
    if _writes_to_disk(spec):
        _check_writing(cgroup, [g.fs_type for g in folder if g.fs_type not in MEMORY])
    return disks_of(found)


def _of_image(spec: SessionSpec) -> list[str]:
    image = spec.image
    # Files are copied into memory when the session begins.
    folders = [bind.source for bind in image.binds if os.path.isdir(bind.source)]
    return [*folders, *([image.layers.folder] if image.layers else []), PACKAGE]


def _check_writing(cgroup: Cgroup, fs_types: list[str]) -> None:
    """Raise HostError if what is written back from the page cache would not count."""
    if not fs_types:
        return
    if not cgroup.counts_writeback:
        raise HostError(
            "cannot limit io with workspace=rw: without the controllers io and memory in one v2 "
            "tree nobody can tell who wrote what is in the page cache",
            hint="use another workspace mode, or boot with systemd.unified_cgroup_hierarchy=1 and "
            f"delegate both controllers, {_WAIVE}",
        )
    for fs_type in fs_types:
        if fs_type not in WRITEBACK:
            raise HostError(
                f"cannot limit io with workspace=rw: {fs_type} does not tell who wrote what it "
                "writes back from the page cache",
                hint=f"keep the notebook's folder on {', '.join(sorted(WRITEBACK))}, or use "
                f"another workspace mode, {_WAIVE}",
            )
