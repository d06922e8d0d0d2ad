"""Find this process' own cgroups, and make the groups of sessions below them.

Three layouts: `v2` (one tree), `v1` (a hierarchy per controller), `hybrid` (limits on v1, and a
v2 tree for kill, freeze and events). Nothing is ever made outside of the own groups; on v2 the
own group may be a scope that systemd made when it was asked (`CgroupTree.acquire`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import cgroup_v1, cgroup_v2
from sandbox_kernel.linux.cgroup_files import CgroupFiles
from sandbox_kernel.linux.cgroup_group import Cgroup, CgroupUsage
from sandbox_kernel.linux.cgroup_io import block_devices
from sandbox_kernel.linux.cgroup_names import checked_name, is_left_over, session_name
from sandbox_kernel.linux.cgroup_own import OwnGroup
from sandbox_kernel.linux.cgroup_roles import IO, LIMITS, Node, Reason, Roles, remedy_for
from sandbox_kernel.linux.mountinfo import Hierarchy, find_hierarchies, parse_mounts, parse_own
from sandbox_kernel.linux.scope import delegation_remedy, enter_scope

__all__ = ["Cgroup", "CgroupTree", "CgroupUsage", "block_devices", "session_name"]

ACCOUNTING = "cpu accounting"
V1_HINT = (
    "ordinary users cannot write cgroup v1: run as root, "
    "or boot with systemd.unified_cgroup_hierarchy=1"
)
MOUNT_HINT = (
    "mount a v2 tree: mount -t cgroup2 none /sys/fs/cgroup; inside of another container start that "
    "one with a cgroup namespace of its own"
)
_UNSEEN = "mounted nowhere, or not so that the own group can be seen"
_V1_NAMES = {"blkio": "io"}
"""What v1 calls otherwise."""
_SYSTEMD = "run/systemd/system"
"""The folder that is there where systemd is PID 1."""


class CgroupTree:
    """The hierarchies of this host, each at the own group; makes and sweeps session groups."""

    def __init__(self, hierarchies: list[Hierarchy], *, files: CgroupFiles, proc: Path) -> None:
        self._v1 = [h for h in hierarchies if not h.unified]
        self._v2 = next((h for h in hierarchies if h.unified), None)
        self.own = None if self._v2 is None else OwnGroup(self._v2, files=files, proc=proc)
        self._files = files
        self._proc = proc
        self._tried: set[str] = set()
        self._on_v2: set[str] = set()
        self._reasons: dict[str, Reason] = {}
        self.scope = ""
        """The systemd unit that `acquire` asked for; empty where none was needed."""
        self.remark = ""
        """Why root goes on in its own group, though systemd may not know of it; mostly empty."""

    @classmethod
    def detect(
        cls,
        *,
        proc: Path = Path("/proc"),
        root: Path = Path("/"),
        files: CgroupFiles | None = None,
    ) -> CgroupTree:
        """Read the layout of this host, and change nothing; `root` is before every mount point."""
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
            found.append(replace(hierarchy, own=path, mount_point=prefix + hierarchy.mount_point))
        return cls(found, files=files or CgroupFiles(), proc=proc)

    @classmethod
    def acquire(
        cls,
        *,
        proc: Path = Path("/proc"),
        root: Path = Path("/"),
        files: CgroupFiles | None = None,
        ask: Callable[[], str] = enter_scope,
    ) -> CgroupTree:
        """Give a tree below whose own group sessions may be made; asks systemd where needed.

        On v2 this process may be in another cgroup afterwards: call it once, before any other
        process is started. The own group is kept where groups can be made in it and systemd has
        delegated it or is not there. Raises HostError where an ordinary user gets none; root
        goes on in place.
        """
        tree = cls.detect(proc=proc, root=root, files=files)
        if tree.layout != "v2" or tree.own is None:
            return tree  # v1 is root's, and has no rule about who may hold processes
        is_root, has_systemd = os.geteuid() == 0, (root / _SYSTEMD).is_dir()
        own = tree.own
        why = own.refusal()
        if not why and has_systemd and not own.is_delegated():
            why = f"{own.path} is not delegated"
        if not why or (is_root and not has_systemd):
            return tree
        try:
            scope = ask()
            tree = cls.detect(proc=proc, root=root, files=files)
            refusal = tree.own.refusal() if tree.own else "the v2 tree is gone"
            if refusal:
                raise HostError(f"{scope} cannot be used: {refusal}", hint=delegation_remedy())
        except HostError as error:
            if not is_root:
                raise HostError(
                    f"no cgroup for this kernel: its own cannot be used, {why}; "
                    f"and systemd gives none, {error.message}",
                    hint=f"{error.hint}; or {delegation_remedy(own.path)}",
                ) from error
            tree.remark = f"{why}; {error.message}"
        else:
            tree.scope = scope
        return tree

    @property
    def layout(self) -> str:
        """Say which: `v2`, `v1`, `hybrid`, or `none` where no hierarchy is mounted."""
        limiting = any(h.controllers & set(LIMITS.values()) for h in self._v1)
        if limiting:
            return "v1" if self._v2 is None else "hybrid"
        return "none" if self._v2 is None else "v2"

    def session(self, name: str, *, io: bool = False) -> Cgroup:
        """Make the group of a session below the own one, in every hierarchy that allows it.

        A limit whose hierarchy does not is refused by `Cgroup.limit`, which says why; limits of
        disk traffic need `io`. Raises HostError where no hierarchy does, or the group exists.
        """
        checked_name(name)
        wanted = {*LIMITS.values(), *([IO] if io else [])}
        self._prepare(wanted)
        nodes: list[Node] = []
        try:
            for hierarchy in self._ordered():
                if self._needed(hierarchy, wanted, nodes):
                    self._make(hierarchy, name, nodes)
        except OSError as error:
            for node in nodes:
                os.close(node.fd)
                self._files.remove_dir(node.path)
            raise HostError(f"cannot make cgroup {name}: {error.strerror}") from error
        if not nodes:
            raise self._none_made()
        return Cgroup(self._files, name, tuple(nodes), self._roles(nodes, wanted))

    def _none_made(self) -> HostError:
        """Word the error for a session that no hierarchy takes."""
        reasons = set(self._reasons.values())
        why = "; ".join(sorted({r.why for r in reasons})) or "none is mounted"
        hint = "; ".join(sorted({r.hint for r in reasons if r.hint}))
        return HostError(f"no cgroup can be made on this host: {why}", hint=hint)

    def _ordered(self) -> list[Hierarchy]:
        """Put the v2 tree first, and the freezer last: it is needed by what the others lack."""
        first = [self._v2] if self._v2 is not None else []
        return first + sorted(self._v1, key=lambda h: ("freezer" in h.controllers, h.own))

    def _needed(self, hierarchy: Hierarchy, wanted: set[str], made: list[Node]) -> bool:
        """Tell whether a session needs a directory there; each costs every cell 20-40 us."""
        if hierarchy.unified or _names(hierarchy) & wanted:
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
            hint = delegation_remedy(path) if hierarchy.unified else V1_HINT
            reason = Reason(f"{path}: {error.strerror}", remedy_for(error, hint))
            lost = {*self._on_v2, "v2 tree"} if hierarchy.unified else _names(hierarchy)
            self._reasons |= dict.fromkeys(lost, reason)
            return
        nodes.append(Node(path, fd, hierarchy.unified))
        if "memory" in hierarchy.controllers:
            cgroup_v1.count_below(self._files, fd)

    def _roles(self, nodes: list[Node], wanted: set[str]) -> Roles:
        """Tell which of the directories does what; the v2 tree only what this session wants."""
        index: dict[str, int] = {}
        unified = next((i for i, node in enumerate(nodes) if node.unified), None)
        names_of = {h.own: _names(h) for h in self._v1}
        for i, node in enumerate(nodes):
            if not node.unified:
                index |= dict.fromkeys(names_of[os.path.dirname(node.path)], i)
        on_v2 = frozenset(self._on_v2 & wanted) if unified is not None else frozenset()
        if unified is not None:
            index |= dict.fromkeys([*on_v2, "cpuacct"], unified)
            if self._files.has(nodes[unified].fd, "cgroup.freeze"):
                index["freezer"] = unified
        return Roles(
            unified=unified,
            memory=index.get("memory"),
            cpu=index.get("cpu"),
            pids=index.get("pids"),
            io=index.get("io"),
            cpuacct=index.get("cpuacct"),
            freezer=index.get("freezer"),
            v2_controllers=on_v2,
            reasons={c: reason for c, reason in self._reasons.items() if c in wanted},
        )

    def _prepare(self, wanted: set[str]) -> None:
        """Enable on v2, for groups below the own one, the controllers that no v1 hierarchy has.

        Note which are, and the reason for each other.
        """
        todo = wanted.difference(self._tried, *map(_names, self._v1))
        self._tried |= todo
        if not todo:
            return
        if self.own is None:
            reasons = {c: Reason(f"controller {c} is {_UNSEEN}", MOUNT_HINT) for c in todo}
        else:
            reasons = self.own.enable(todo)
            self._on_v2 |= todo - reasons.keys()
        self._reasons |= reasons

    def missing(self, *, io: bool = False) -> dict[str, str]:
        """Say which of `memory`, `cpus`, `processes` and `cpu accounting` do not work, and why.

        Tries each in a probe group; with `io` that too. On v2 this process may have to leave its
        group for that; it is put back unless `session` was called before.
        """
        was_prepared = bool(self._tried)
        limits = {limit: c for limit, c in _ALL.items() if io or c != IO}
        try:
            probe = self.session(session_name("probe"), io=io)
        except HostError as error:
            return {limit: str(self._reasons.get(c, error)) for limit, c in limits.items()}
        try:
            with probe:
                return {k: v for k, v in self._try_limits(probe).items() if k in limits}
        finally:
            if not was_prepared and self.own is not None:
                self.own.restore()
                self._tried, self._on_v2 = set(), set()

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
                    missing[limit] = str(self._reasons.get(LIMITS[limit], error))
            if not cell.can("io"):
                missing[IO] = str(self._reasons.get(IO, "it was not asked for"))
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
        return [name for name in names if is_left_over(name, self._proc)]

    def _sweep_one(self, name: str, nodes: list[Node]) -> bool:
        """Kill and remove one left-over; tell whether it is gone."""
        roles = self._roles(nodes, set())  # it gets no limits any more
        group = Cgroup(self._files, name, tuple(nodes), roles)
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


def _names(hierarchy: Hierarchy) -> set[str]:
    """Give the controllers of a v1 hierarchy as v2 calls them."""
    return {_V1_NAMES.get(name, name) for name in hierarchy.controllers}


_ALL = {**LIMITS, IO: IO, ACCOUNTING: "cpuacct"}
_TRIALS: dict[str, tuple[int | None, float | None, int | None]] = {
    "memory": (64 * 1024**2, None, None),
    "cpus": (None, 0.02, None),  # v1 refuses more than a group above has
    "processes": (None, None, 64),
}
