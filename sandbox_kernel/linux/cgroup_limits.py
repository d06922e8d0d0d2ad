"""Set the limits of one group, and say which one cannot be set, why, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence

from sandbox_kernel.errors import ConfigError, HostError
from sandbox_kernel.linux import cgroup_v1, cgroup_v2
from sandbox_kernel.linux.cgroup_files import CgroupFiles
from sandbox_kernel.linux.cgroup_io import Device
from sandbox_kernel.linux.cgroup_roles import IO, LIMIT_HINT, LIMITS, Node, Reason, Roles, failure

MIN_CPUS = 0.01
_NO_DEVICE_HINT = (
    "file systems in memory, overlays and network file systems have no disk that could be slowed "
    "down: leave this limit out, or keep the files on a disk of this machine"
)


class GroupLimits:
    """The limits of a group; every method raises ConfigError for a value that cannot be.

    Each raises HostError where the limit cannot be enforced.
    """

    def __init__(
        self,
        files: CgroupFiles,
        nodes: Sequence[Node],
        roles: Roles,
        *,
        above: GroupLimits | None = None,
    ) -> None:
        self._files = files
        self._nodes = nodes
        self._roles = roles
        self._above = above
        self._io: tuple[int, tuple[Device, ...]] | None = None
        self._hurried: set[GroupLimits] = set()
        """Those inside that are about to end."""
        self._retired = False

    def memory(self, limit_bytes: int, *, oom_group: bool) -> None:
        """Limit memory, with no swap beyond; with `oom_group` an OOM takes all processes (v2)."""
        node = self._node("memory", limit_bytes, at_least=1)
        try:
            if node.unified:
                cgroup_v2.set_memory(self._files, node.fd, limit_bytes, oom_group=oom_group)
            else:
                cgroup_v1.set_memory(self._files, node.fd, limit_bytes)
        except OSError as error:
            action = f"limit memory to {limit_bytes} bytes in"
            raise failure(action, node, error, LIMIT_HINT) from error

    def cpus(self, cpus: float) -> None:
        """Limit processor time to `cpus` seconds a second."""
        node = self._node("cpus", cpus, at_least=MIN_CPUS)
        try:
            node.driver.set_cpus(self._files, node.fd, cpus)
        except OSError as error:
            smaller = error.errno == errno.EINVAL
            hint = "a group above may have a smaller share" if smaller else LIMIT_HINT
            raise failure(f"limit cpus to {cpus} in", node, error, hint) from error

    def processes(self, processes: int) -> None:
        """Limit the number of processes and threads."""
        node = self._node("processes", processes, at_least=1)
        try:
            self._files.write(node.fd, "pids.max", str(processes))
        except OSError as error:
            raise failure(f"limit processes to {processes} in", node, error, LIMIT_HINT) from error

    def io(self, bytes_per_s: int, devices: Sequence[Device]) -> None:
        """Limit reading and writing of each device to so much.

        A device that takes no limit is passed over, unless it is the last.
        """
        node = self._node(IO, bytes_per_s, at_least=1)
        refusals: list[OSError] = []
        for device in devices:
            try:
                node.driver.set_io(self._files, node.fd, device, bytes_per_s)
            except OSError as error:
                refusals.append(error)
        if not devices:
            raise HostError("cannot limit io: no disk is behind the files", hint=_NO_DEVICE_HINT)
        if len(refusals) == len(devices):
            names = ", ".join(f"{major}:{minor}" for major, minor in devices)
            action = f"limit io of device {names} to {bytes_per_s} bytes/s in"
            first = refusals[0]
            if first.errno == errno.ENODEV:  # of the device; a removed group has no such file
                why = f"cannot {action} cgroup {node.path}: {first.strerror}"
                raise HostError(why, hint=_NO_DEVICE_HINT) from first
            raise failure(action, node, first, LIMIT_HINT) from first
        self._io = bytes_per_s, tuple(devices)

    def hurry(self) -> None:
        """Let the group's disk traffic go, since it is about to end; that above until `retire`.

        Neither SIGKILL nor the freezer gets past a direct read or write that is under way.
        """
        if self._roles.io is None:
            return
        node = self._nodes[self._roles.io]
        self._lift(node, node.fd, inside=True)
        if self._above is not None:
            self._above.make_way(self)

    def make_way(self, inner: GroupLimits) -> None:
        """Lift the limit of disk traffic, for a group inside that is about to end."""
        self._hurried.add(inner)
        if self._roles.io is not None and not self._retired:
            node = self._nodes[self._roles.io]
            self._lift(node, node.fd, inside=False)

    def retire(self) -> None:
        """Write nothing any more, since descriptors are closed; the group above is slow again."""
        self._retired = True
        if self._above is not None:
            self._above.close_up(self)

    def close_up(self, inner: GroupLimits) -> None:
        """Set the limit of disk traffic again if no group inside is about to end any more."""
        if inner not in self._hurried:
            return
        self._hurried.discard(inner)
        if self._io is not None and not self._hurried and not self._retired:
            # Removed, or made read-only: then the next limit that is set fails, and says so.
            with contextlib.suppress(HostError):
                self.io(*self._io)

    def _lift(self, node: Node, fd: int, *, inside: bool) -> None:
        """Lift the limits of one directory, and of those `inside`."""
        try:
            node.driver.lift_io(self._files, fd)
            names = self._files.subdirs(fd) if inside else []
        except OSError:
            return  # removed, or made read-only: whoever is about to end ends later
        for name in names:
            try:
                sub_fd = self._files.open_dir(name, dir_fd=fd)
            except FileNotFoundError:
                continue
            try:
                self._lift(node, sub_fd, inside=True)
            finally:
                os.close(sub_fd)

    def _node(self, limit: str, value: float, *, at_least: float) -> Node:
        """Give the node where a limit is set, after a look at its value."""
        if value < at_least:
            raise ConfigError(f"limit {limit} is {value}", hint=f"give {at_least} or more")
        controller = LIMITS.get(limit, limit)
        index: int | None = getattr(self._roles, controller)
        if index is None:
            unknown = Reason("the session's group was made without it", LIMIT_HINT)
            why, hint = self._roles.reasons.get(controller, unknown)
            raise HostError(f"cannot limit {limit}: {why}", hint=hint or LIMIT_HINT)
        return self._nodes[index]
