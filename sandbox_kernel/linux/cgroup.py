"""Find this process' own cgroups, and make the groups of sessions below them.

Three layouts: `v2` (one tree), `v1` (a hierarchy per controller), `hybrid` (limits on v1, and a
v2 tree for kill, freeze and events). Nothing is ever made outside of the own groups. Out of
scope: asking systemd for a delegated scope, which whoever starts Jupyter does.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import cgroup_v1, cgroup_v2
from sandbox_kernel.linux.cgroup_files import CgroupFiles
from sandbox_kernel.linux.cgroup_group import (
    LIMITS,
    Cgroup,
    CgroupUsage,
    Node,
    Roles,
    checked_name,
)
from sandbox_kernel.linux.mountinfo import Hierarchy, find_hierarchies, parse_mounts, parse_own

__all__ = ["Cgroup", "CgroupTree", "CgroupUsage", "session_name"]

ACCOUNTING = "cpu accounting"
DELEGATE_HINT = (
    "start Jupyter in a delegated scope: systemd-run --user --scope -p Delegate=yes jupyter lab; "
    "for cpu limits root first adds 'Delegate=cpu memory pids' to user@.service"
)
V1_HINT = (
    "ordinary users cannot write cgroup v1: run as root, "
    "or boot with systemd.unified_cgroup_hierarchy=1"
)
_SESSION = re.compile(r"sandbox-kernel-(\d+)-(\d+)-.+")


def session_name(session_id: str) -> str:
    """Name a session's group after its owner, this process, so that `sweep` can tell the dead.

    Pid and start time (in clock ticks since boot) are as /proc shows them.
    """
    text = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    pid = text.partition(" ")[0]
    return checked_name(f"sandbox-kernel-{pid}-{_start_time(text)}-{session_id}")


def _start_time(stat: str) -> int:
    """Give field 22 of /proc/PID/stat; the command name in field 2 may hold anything."""
    return int(stat.rpartition(")")[2].split()[19])


class CgroupTree:
    """The hierarchies of this host, each at the own group; makes and sweeps session groups."""

    def __init__(self, hierarchies: list[Hierarchy], *, files: CgroupFiles, proc: Path) -> None:
        self._v1 = [h for h in hierarchies if not h.unified]
        self._v2 = next((h for h in hierarchies if h.unified), None)
        self._files = files
        self._proc = proc
        self._on_v2: frozenset[str] | None = None
        self._vacated = False
        self._reasons: dict[str, str] = {}

    @classmethod
    def detect(
        cls,
        *,
        proc: Path = Path("/proc"),
        root: Path = Path("/"),
        files: CgroupFiles | None = None,
    ) -> CgroupTree:
        """Read the layout of this host; `root` is put before every mount point."""
        mounts = parse_mounts((proc / "self/mountinfo").read_text(encoding="utf-8"))
        own = parse_own((proc / "self/cgroup").read_text(encoding="utf-8"))
        prefix = str(root).rstrip("/")
        found = []
        for hierarchy in find_hierarchies(mounts, own):
            path = prefix + hierarchy.own
            # A kernel started earlier moved all processes of the own group, Jupyter's too,
            # into this leaf; the group that was delegated is the one above.
            if hierarchy.unified and os.path.basename(path) == cgroup_v2.SUPERVISOR:
                path = os.path.dirname(path)
            found.append(replace(hierarchy, own=path))
        return cls(found, files=files or CgroupFiles(), proc=proc)

    @property
    def layout(self) -> str:
        """Say which: `v2`, `v1`, `hybrid`, or `none` where no hierarchy is mounted."""
        limiting = any(h.controllers & set(LIMITS.values()) for h in self._v1)
        if limiting:
            return "v1" if self._v2 is None else "hybrid"
        return "none" if self._v2 is None else "v2"

    def session(self, name: str) -> Cgroup:
        """Make the group of a session below the own one, in every hierarchy that allows it.

        A limit whose hierarchy does not is refused by `Cgroup.limit`; `missing` says why.
        Raises HostError where no hierarchy does, or where the group exists.
        """
        checked_name(name)
        if self._on_v2 is None:
            self._on_v2 = self._prepare_v2()
        nodes: list[Node] = []
        try:
            for hierarchy in self._ordered():
                if self._needed(hierarchy, nodes):
                    self._make(hierarchy, name, nodes)
        except OSError as error:
            for node in nodes:
                os.close(node.fd)
                self._files.remove_dir(node.path)
            raise HostError(f"cannot make cgroup {name}: {error.strerror}") from error
        if not nodes:
            why = "; ".join(sorted(set(self._reasons.values()))) or "none is mounted"
            raise HostError(f"no cgroup can be made on this host: {why}", hint=DELEGATE_HINT)
        return Cgroup(self._files, name, tuple(nodes), self._roles(nodes), depth=0)

    def _ordered(self) -> list[Hierarchy]:
        """Put the v2 tree first, and the freezer last: it is needed by what the others lack."""
        first = [self._v2] if self._v2 is not None else []
        return first + sorted(self._v1, key=lambda h: ("freezer" in h.controllers, h.own))

    def _needed(self, hierarchy: Hierarchy, made: list[Node]) -> bool:
        """Tell whether a session needs a directory there; each costs every cell 20-40 us."""
        if hierarchy.unified or hierarchy.controllers & set(LIMITS.values()):
            return True
        unified = next((n for n in made if n.unified), None)
        if "cpuacct" in hierarchy.controllers:
            return unified is None  # v2 counts cpu time in every group
        return "freezer" in hierarchy.controllers and (
            unified is None or not self._files.has(unified.fd, "cgroup.freeze")  # before 5.2
        )

    def _make(self, hierarchy: Hierarchy, name: str, nodes: list[Node]) -> None:
        """Make a directory; note why not, unless it exists."""
        path = f"{hierarchy.own}/{name}"
        try:
            fd = self._files.make_dir(path)
        except FileExistsError:
            raise
        except OSError as error:
            hint = DELEGATE_HINT if hierarchy.unified else V1_HINT
            here = self._on_v2 or frozenset() if hierarchy.unified else hierarchy.controllers
            for controller in here:
                self._reasons[controller] = f"{path}: {error.strerror} ({hint})"
            return
        nodes.append(Node(path, fd, hierarchy.unified))
        if "memory" in hierarchy.controllers:
            cgroup_v1.count_below(self._files, fd)

    def _roles(self, nodes: list[Node]) -> Roles:
        """Tell which of the directories does what."""
        index: dict[str, int] = {}
        unified = next((i for i, node in enumerate(nodes) if node.unified), None)
        controllers_of = {h.own: h.controllers for h in self._v1}
        for i, node in enumerate(nodes):
            if not node.unified:
                for controller in controllers_of[os.path.dirname(node.path)]:
                    index[controller] = i
        on_v2 = self._on_v2 or frozenset()
        if unified is not None:
            index |= dict.fromkeys([*on_v2, "cpuacct"], unified)
            if self._files.has(nodes[unified].fd, "cgroup.freeze"):
                index["freezer"] = unified
        return Roles(
            unified=unified,
            memory=index.get("memory"),
            cpu=index.get("cpu"),
            pids=index.get("pids"),
            cpuacct=index.get("cpuacct"),
            freezer=index.get("freezer"),
            v2_controllers=on_v2 if unified is not None else frozenset(),
        )

    def _prepare_v2(self) -> frozenset[str]:
        """Enable, for groups below the own one, the controllers that no v1 hierarchy has.

        Return those that are; note the reason for each other.
        """
        wanted = set(LIMITS.values()).difference(*(h.controllers for h in self._v1))
        if not wanted or self._v2 is None:
            self._reasons |= {c: f"controller {c} is mounted nowhere" for c in wanted}
            return frozenset()
        own = self._v2.own
        try:
            fd = self._files.open_dir(own)
        except OSError as error:
            self._reasons |= dict.fromkeys(wanted, f"{own}: {error.strerror} ({DELEGATE_HINT})")
            return frozenset()
        try:
            offered = wanted & cgroup_v2.offered(self._files, fd)
            for controller in wanted - offered:
                reason = f"controller {controller} is not delegated to {own} ({DELEGATE_HINT})"
                self._reasons[controller] = reason
            return frozenset(self._enable(fd, own, offered))
        finally:
            os.close(fd)

    def _enable(self, fd: int, own: str, offered: set[str]) -> set[str]:
        """Enable controllers in the own group, which may not hold processes for that."""
        todo = offered - cgroup_v2.enabled(self._files, fd)
        failed: dict[str, str] = {}
        try:
            if todo and not cgroup_v2.is_root(self._files, fd):
                self._vacate(fd, own)
        except (OSError, HostError) as error:
            failed = {c: f"cannot enable controller {c} in {own}: {error}" for c in todo}
        else:
            for controller, refusal in cgroup_v2.enable(self._files, fd, todo).items():
                failed[controller] = f"cannot enable controller {controller} in {own}: {refusal}"
        for controller, text in failed.items():
            self._reasons[controller] = f"{text} ({DELEGATE_HINT})"
        return offered - failed.keys()

    def _vacate(self, fd: int, own: str) -> None:
        """Move the processes of the own group, this one among them, into a leaf below it."""
        pids = cgroup_v2.members(self._files, fd)
        foreign = [pid for pid in pids if not self._is_ours(pid)]
        if foreign:
            raise HostError(f"it holds processes of other users or namespaces: {foreign}")
        if not pids:
            return
        leaf = f"{own}/{cgroup_v2.SUPERVISOR}"
        try:
            leaf_fd = self._files.make_dir(leaf)
        except FileExistsError:
            leaf_fd = self._files.open_dir(leaf)  # of another kernel in the same group
        else:
            self._vacated = True
        try:
            cgroup_v2.move_all(self._files, fd, leaf_fd)
        finally:
            os.close(leaf_fd)

    def _is_ours(self, pid: int) -> bool:
        """Tell whether a process has the own user, or has just ended."""
        if pid == 0:  # outside of the own PID namespace
            return False
        try:
            status = (self._proc / str(pid) / "status").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return True
        # Not the owner of /proc/PID: that is root where the process is not dumpable.
        line = next(line for line in status.splitlines() if line.startswith("Uid:"))
        return int(line.split()[1]) == os.getuid()

    def _return(self) -> None:
        """Undo `_vacate` and `_enable`, after a probe by a process that needs no session."""
        if self._v2 is None or not self._vacated:
            return
        leaf = f"{self._v2.own}/{cgroup_v2.SUPERVISOR}"
        fd, leaf_fd = self._files.open_dir(self._v2.own), self._files.open_dir(leaf)
        try:
            for controller in self._on_v2 or ():
                self._files.write(fd, "cgroup.subtree_control", f"-{controller}")
            cgroup_v2.move_all(self._files, leaf_fd, fd)
            self._files.remove_dir(leaf)
        except OSError:
            # A kernel that started meanwhile has groups there and lives in the leaf: let it.
            pass
        finally:
            os.close(fd)
            os.close(leaf_fd)
        self._on_v2, self._vacated = None, False

    def missing(self) -> dict[str, str]:
        """Say which of `memory`, `cpus`, `processes` and `cpu accounting` do not work, and why.

        Tries each in a probe group. On v2 this process may have to leave its group for that;
        it is put back unless `session` was called before.
        """
        was_prepared = self._on_v2 is not None
        try:
            probe = self.session(session_name("probe"))
        except HostError as error:
            return {limit: self._reasons.get(c, str(error)) for limit, c in _ALL.items()}
        try:
            with probe:
                return self._try_limits(probe)
        finally:
            if not was_prepared:
                self._return()

    def _try_limits(self, probe: Cgroup) -> dict[str, str]:
        """Set each limit on a group as a cell has it."""
        try:
            cell = probe.child("cell")
        except HostError as error:
            return dict.fromkeys(_ALL, str(error))
        missing = {}
        with cell:
            for limit, values in _TRIALS.items():
                try:
                    cell.limit(memory_bytes=values[0], cpus=values[1], processes=values[2])
                except HostError as error:
                    missing[limit] = self._reasons.get(LIMITS[limit], str(error))
            if not cell.counts_cpu:
                missing[ACCOUNTING] = f"neither a v2 tree nor cpuacct can be written ({V1_HINT})"
        return missing

    def sweep(self) -> list[str]:
        """Remove the groups of kernels that are dead, and kill what is left inside.

        Return the names. Called when a kernel starts; a group that resists is left for later.
        """
        found: dict[str, list[Node]] = {}
        for hierarchy in self._ordered():
            for name in self._session_dirs(hierarchy.own):
                path = f"{hierarchy.own}/{name}"
                try:
                    node = Node(path, self._files.open_dir(path), hierarchy.unified)
                except FileNotFoundError:
                    continue
                found.setdefault(name, []).append(node)
        return [name for name, nodes in found.items() if self._sweep_one(name, nodes)]

    def _session_dirs(self, own: str) -> list[str]:
        """Name the groups below the own one whose owner is dead."""
        try:
            fd = self._files.open_dir(own)
        except OSError:
            return []  # nothing of ours where nothing can be opened
        try:
            names = self._files.subdirs(fd)
        finally:
            os.close(fd)
        return [n for n in names if (m := _SESSION.fullmatch(n)) and not self._alive(m[1], m[2])]

    def _alive(self, pid: str, start_time: str) -> bool:
        """Tell whether the process that was started then is still there."""
        try:
            stat = (self._proc / pid / "stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return False
        state = stat.rpartition(")")[2].split()[0]
        # A zombie is dead, though its client has not waited for it yet.
        return state not in "ZX" and _start_time(stat) == int(start_time)

    def _sweep_one(self, name: str, nodes: list[Node]) -> bool:
        """Kill and remove one left-over; tell whether it is gone."""
        group = Cgroup(self._files, name, tuple(nodes), self._roles(nodes), depth=0)
        try:
            pids = group.processes()
            # A kernel in another PID namespace has another idea of its pid: whoever shows as 0,
            # or is there but not shown, is not ours to judge.
            if 0 in pids or (not pids and group.populated()):
                return False
            group.kill()
            group.remove()
        except (HostError, OSError):
            return False  # as the docstring says: it must not keep this kernel from starting
        finally:
            group.close()
        return True


_ALL = LIMITS | {ACCOUNTING: "cpuacct"}
_TRIALS: dict[str, tuple[int | None, float | None, int | None]] = {
    "memory": (64 * 1024**2, None, None),
    "cpus": (None, 0.02, None),  # v1 refuses more than a group above has
    "processes": (None, None, 64),
}
