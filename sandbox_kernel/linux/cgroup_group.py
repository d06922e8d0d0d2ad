"""One cgroup in every hierarchy in use: limit it, watch it, kill it, remove it.

Made by `cgroup.CgroupTree.session` and `Cgroup.child` only. Out of scope: where groups may be
made, and what this host offers (`cgroup`).
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from types import TracebackType

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import cgroup_end, cgroup_v2
from sandbox_kernel.linux.cgroup_files import CgroupFiles, keyed
from sandbox_kernel.linux.cgroup_io import Device
from sandbox_kernel.linux.cgroup_limits import GroupLimits
from sandbox_kernel.linux.cgroup_names import checked_name
from sandbox_kernel.linux.cgroup_roles import LIMIT_HINT, Node, Roles, failure

__all__ = ["Cgroup", "CgroupUsage", "Node", "Roles"]

FREEZE_TIMEOUT_S = 2.0
REMOVE_TIMEOUT_S = 5.0
_GONE = (errno.ENOENT, errno.ENODEV)
"""A removed group: its directory has no files any more, and open ones read as no device."""


@dataclass(frozen=True)
class CgroupUsage:
    """What a group used; None where the host does not count it, 0 for a missing controller.

    `oom_kills` counts processes of this very group that the kernel killed for memory, whether
    its own limit or one above was hit (where v2 kills the whole group, the first one counts
    twice); `oom_events` how often its own limit was (v1 counts the
    kills instead); `fork_denials` the forks that the process limit refused.
    """

    cpu_s: float
    memory_bytes: int
    peak_memory_bytes: int | None
    peak_processes: int | None
    oom_kills: int
    oom_events: int
    fork_denials: int


class Cgroup:
    """A cgroup of a session or of a cell; leaving its context kills what is inside.

    Only leaves hold processes (a rule of v2, kept in every layout): a group that has children
    refuses `add`, one that holds processes refuses `child`. OSError is translated to HostError.
    """

    def __init__(
        self,
        files: CgroupFiles,
        name: str,
        nodes: tuple[Node, ...],
        roles: Roles,
        *,
        above: GroupLimits | None = None,
    ) -> None:
        self.name = name
        self._files = files
        self._nodes = nodes
        self._roles = roles
        self._limits = GroupLimits(files, nodes, roles, above=above)
        self._is_session = above is None
        self._holds_processes = False
        self._has_children = False
        self._open = True

    def __enter__(self) -> Cgroup:
        """Return itself."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kill what is inside, remove the directories and close the fds."""
        try:
            self.kill()
            self.remove()
        finally:
            self.close()

    def __repr__(self) -> str:
        """Show the name and where it is."""
        return f"Cgroup({self.name!r}, {', '.join(self.paths)})"

    @property
    def paths(self) -> tuple[str, ...]:
        """The directories, for whoever has to remove them after this process' death."""
        return tuple(node.path for node in self._nodes)

    def can(self, controller: str) -> bool:
        """Tell whether a controller (`memory`, `cpu`, `pids`, `io`) limits this group."""
        return getattr(self._roles, controller) is not None

    @property
    def counts_cpu(self) -> bool:
        """Tell whether `usage` knows the cpu time."""
        return self._roles.cpuacct is not None

    @property
    def counts_writeback(self) -> bool:
        """Tell whether a limit of `io` holds for what is written back from the page cache too."""
        # v2 finds the group by the one whose memory the page is; v1 takes the root group for all.
        roles = self._roles
        return roles.io is not None and roles.io == roles.memory == roles.unified

    @property
    def takes_other_users(self) -> bool:
        """Tell whether an ordinary user may move processes of other ids of his between groups.

        v1 lets nobody but root move what is not his own (cgroup1_procs_write_permission).
        """
        return all(node.unified for node in self._nodes)

    def close(self) -> None:
        """Close the fds; the group itself stays."""
        if self._open:
            self._open = False
            self._limits.retire()
            for node in self._nodes:
                os.close(node.fd)

    def child(self, name: str) -> Cgroup:
        """Make a group inside, in every hierarchy in use; raise HostError if one refuses."""
        checked_name(name)
        if not self._has_children:
            self._become_inner()
        nodes: list[Node] = []
        for node in self._nodes:
            try:
                fd = self._files.make_dir(name, dir_fd=node.fd)
            except OSError as error:
                self._undo(nodes)
                hint = "choose another name" if error.errno == errno.EEXIST else LIMIT_HINT
                raise failure(f"make group {name} in", node, error, hint) from error
            nodes.append(Node(f"{node.path}/{name}", fd, node.unified))
        return Cgroup(self._files, name, tuple(nodes), self._roles, above=self._limits)

    def _undo(self, nodes: list[Node]) -> None:
        """Remove the directories of a group that could not be made in every hierarchy."""
        for node in nodes:
            os.close(node.fd)
            self._files.remove_dir(node.path)

    def _become_inner(self) -> None:
        """Prepare for children: give them the controllers, hold no process any more."""
        if self._holds_processes and self.processes():
            raise HostError(
                f"cgroup {self.name} holds processes, so it cannot have groups inside",
                hint="put processes into groups without children",
            )
        if self._roles.v2_controllers and self._roles.unified is not None:
            node = self._nodes[self._roles.unified]
            wanted = set(self._roles.v2_controllers)
            for controller, error in cgroup_v2.enable(self._files, node.fd, wanted).items():
                action = f"enable controller {controller} in"
                raise failure(action, node, error, LIMIT_HINT) from error
        self._has_children = True

    def add(self, pid: int) -> None:
        """Move a process with all its threads here; `pid` is as this process sees it.

        Raises ProcessLookupError when there is no such process.
        """
        if self._has_children:
            raise HostError(
                f"cgroup {self.name} has groups inside, so it cannot hold process {pid}",
                hint="add it to one of the groups inside",
            )
        self._holds_processes = True
        text = str(pid)
        for node in self._nodes:
            try:
                self._files.write(node.fd, "cgroup.procs", text)
            except ProcessLookupError:
                raise
            except OSError as error:
                raise failure(f"move process {pid} to", node, error, LIMIT_HINT) from error

    def limit(
        self,
        *,
        memory_bytes: int | None = None,
        cpus: float | None = None,
        processes: int | None = None,
        io_bytes_per_s: int | None = None,
        devices: tuple[Device, ...] = (),
    ) -> None:
        """Set the limits that are given; swap is always 0, `io` is for each of the `devices`.

        Raises ConfigError for a value that cannot be, HostError where it cannot be enforced.
        """
        if memory_bytes is not None:
            # Never on a session: a kill for the total would take the heads with the cell.
            self._limits.memory(memory_bytes, oom_group=not self._is_session)
        if cpus is not None:
            self._limits.cpus(cpus)
        if processes is not None:
            self._limits.processes(processes)
        if io_bytes_per_s is not None:
            self._limits.io(io_bytes_per_s, devices)

    def processes(self) -> list[int]:
        """List the processes in the group and below; empty for a removed group.

        0 stands for a process outside of the own PID namespace (v2 only; v1 leaves it out).
        """
        return self._processes_below(self._nodes[0].fd)

    def _processes_below(self, fd: int) -> list[int]:
        """List the processes of a directory and of those inside."""
        try:
            pids = cgroup_v2.members(self._files, fd)
            names = self._files.subdirs(fd)
        except OSError as error:
            if error.errno in _GONE:
                return []
            raise
        for name in names:
            try:
                sub_fd = self._files.open_dir(name, dir_fd=fd)
            except FileNotFoundError:
                continue
            try:
                pids += self._processes_below(sub_fd)
            finally:
                os.close(sub_fd)
        return pids

    def exists(self) -> bool:
        """Tell whether nobody has removed it, in any hierarchy in use."""
        return self._open and all(self._files.has(node.fd, "cgroup.procs") for node in self._nodes)

    def holds(self, pid: int) -> bool:
        """Tell whether a process is in this very group, in every hierarchy in use.

        Who has the rights may move it elsewhere at any time, out of all limits.
        """
        try:
            return self._open and all(
                pid in cgroup_v2.members(self._files, node.fd) for node in self._nodes
            )
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise failure("list the processes of", self._nodes[0], error, LIMIT_HINT) from error

    def usage(self) -> CgroupUsage:
        """Read the counters; raise HostError when the group is gone."""
        files, nodes, roles = self._files, self._nodes, self._roles
        memory: tuple[int, int | None, int, int] = (0, None, 0, 0)
        cpu_s, peak_processes, denials = 0.0, None, 0
        node = nodes[0]
        try:
            if roles.memory is not None:
                node = nodes[roles.memory]
                memory = node.driver.memory_usage(files, node.fd)
            if roles.pids is not None:
                node = nodes[roles.pids]
                denials = keyed(files.read(node.fd, "pids.events"), "max")
                peak = files.read_optional(node.fd, "pids.peak")  # since 6.1
                peak_processes = None if peak is None else int(peak)
            if roles.cpuacct is not None:
                node = nodes[roles.cpuacct]
                cpu_s = node.driver.cpu_s(files, node.fd)
        except OSError as error:
            raise failure("read the usage of", node, error, LIMIT_HINT) from error
        current, peak_bytes, kills, events = memory
        return CgroupUsage(cpu_s, current, peak_bytes, peak_processes, kills, events, denials)

    def kill(self) -> None:
        """Send SIGKILL to everything inside and below; a removed group is fine.

        Where there is cgroup.kill (a v2 tree, since 5.14) it returns at once, else when all died.
        Raises HostError when something survives.
        """
        self._limits.hurry()
        if self._roles.unified is not None:
            try:
                cgroup_v2.kill(self._files, self._nodes[self._roles.unified].fd)
            except OSError as error:
                # No such file: the kernel is older, or the group is gone, and so its members.
                # Not to be written: the tree was made read-only, which keeps no signal off.
                if error.errno not in (*_GONE, errno.EROFS):
                    raise failure("kill", self._nodes[0], error, LIMIT_HINT) from error
            else:
                return
        cgroup_end.kill_members(self.name, self.processes, self._frozen_within, self.thaw)

    def freeze(self) -> None:
        """Stop everything inside; raise HostError if it does not stand still in time.

        What it reads and writes is not limited any more: it is frozen to be killed.
        """
        self._limits.hurry()
        if not self._frozen_within(FREEZE_TIMEOUT_S):
            raise HostError(
                f"cgroup {self.name} cannot be frozen within {FREEZE_TIMEOUT_S} s",
                hint="a process hangs in the kernel, or the host has neither a v2 tree nor freezer",
            )

    def _frozen_within(self, timeout_s: float) -> bool:
        """Freeze where the host can; tell whether everything stands still."""
        if self._roles.freezer is None:
            return False
        node = self._nodes[self._roles.freezer]
        try:
            return bool(node.driver.freeze(self._files, node.fd, timeout_s))
        except OSError as error:
            if error.errno in _GONE:
                return True
            raise failure("freeze", node, error, LIMIT_HINT) from error

    def thaw(self) -> None:
        """Let everything inside go on; a removed group is fine."""
        if self._roles.freezer is None:
            return
        node = self._nodes[self._roles.freezer]
        try:
            node.driver.thaw(self._files, node.fd)
        except OSError as error:
            if error.errno not in _GONE:
                raise failure("thaw", node, error, LIMIT_HINT) from error

    def empty_fd(self) -> int | None:
        """Open cgroup.events of the v2 tree, None without one; the caller closes it.

        Poll it for POLLPRI only (cgroup files are always readable), then `os.pread` it: that
        arms it for the next change. Look at `populated` once after the call: what changed
        before is no event.
        """
        if self._roles.unified is None:
            return None
        node = self._nodes[self._roles.unified]
        try:
            return cgroup_v2.open_events(self._files, node.fd)
        except OSError as error:
            raise failure("watch", node, error, LIMIT_HINT) from error

    def populated(self) -> bool:
        """Tell whether a process is inside or below."""
        if self._roles.unified is None:
            return bool(self.processes())
        try:
            return cgroup_v2.populated(self._files, self._nodes[self._roles.unified].fd)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise

    def remove(self) -> None:
        """Remove the directories in every hierarchy, those inside first.

        Waits for processes that are just leaving. Raises HostError when one stays.
        """
        deadline_s = time.monotonic() + REMOVE_TIMEOUT_S
        # The v2 directory is first in the list: it has an event for the last process that
        # leaves, and who left it left the others too.
        for node in self._nodes:
            try:
                cgroup_end.remove_dir(
                    self._files, node.path, unified=node.unified, deadline_s=deadline_s
                )
            except OSError as error:
                hint = f"processes {self.processes()} are inside: kill the group first"
                raise failure("remove", node, error, hint) from error
