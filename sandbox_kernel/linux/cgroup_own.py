"""The v2 group that this process was started in: may it be used, and making it ready for that.

A group that gives controllers to others inside may hold no process (a rule of v2). So whoever is
in it moves into a leaf first, and sessions are made beside that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import cgroup_v2
from sandbox_kernel.linux.cgroup_files import CgroupFiles
from sandbox_kernel.linux.cgroup_names import session_name
from sandbox_kernel.linux.cgroup_roles import Reason
from sandbox_kernel.linux.mountinfo import Hierarchy
from sandbox_kernel.linux.scope import UNIT_NAME, delegation_remedy

SCOPE_HINT = "start Jupyter in a scope of its own: systemd-run --scope -p Delegate=yes jupyter lab"
_UNITS = (".scope", ".service", ".slice")


class OwnGroup:
    """The group in the v2 tree below which everything of this process is made."""

    def __init__(self, hierarchy: Hierarchy, *, files: CgroupFiles, proc: Path) -> None:
        self.path = hierarchy.own
        self._mount_point = hierarchy.mount_point
        self._files = files
        self._proc = proc
        self._vacated = False
        self._enabled: set[str] = set()

    def refusal(self) -> str:
        """Try to make a group inside; say why this process cannot use its own group, or nothing.

        Changes nothing that stays.
        """
        try:
            fd = self._files.open_dir(self.path)
            try:
                return self._refusal(fd)
            finally:
                os.close(fd)
        except OSError as error:
            return f"{self.path}: {error.strerror}"

    def _refusal(self, fd: int) -> str:
        for name in ("cgroup.procs", "cgroup.subtree_control"):
            try:
                self._files.open_for_writing(fd, name)
            except OSError as error:
                return f"{self.path}/{name}: {error.strerror}"
        if not cgroup_v2.is_root(self._files, fd) and (foreign := self._foreign(fd)):
            return f"{self.path} holds processes of other users or namespaces: {foreign}"
        trial = f"{self.path}/{session_name('trial')}"
        os.close(self._files.make_dir(trial))
        self._files.remove_dir(trial)
        return ""

    def is_delegated(self) -> bool:
        """Tell whether systemd leaves this group alone, so that groups may be made inside.

        systemd marks what it has delegated by an extended attribute; where that is missing, or
        cannot be read, a unit that was given to this user tells by its owner.
        """
        unit = self._unit()
        if not unit:
            # Outside of every unit: a cgroup namespace, whose root is all ours; or the root of
            # the whole tree, which is systemd's.
            fd = self._files.open_dir(self.path)
            try:
                return not cgroup_v2.is_root(self._files, fd)
            finally:
                os.close(fd)
        if UNIT_NAME.fullmatch(os.path.basename(unit)) or self._files.is_marked_delegated(unit):
            return True
        # The groups of a user's own manager are all the user's, delegated or not; only where the
        # one above is another's was this one handed over.
        uid = os.geteuid()
        above = os.path.dirname(unit)
        return uid != 0 and self._files.owner(unit) == uid != self._files.owner(above)

    def _unit(self) -> str:
        """Give the directory of the unit that this process is in; empty outside of all."""
        path = self.path
        while path.startswith(self._mount_point) and path != self._mount_point:
            if path.endswith(_UNITS):
                return path
            path = os.path.dirname(path)
        return ""

    def enable(self, wanted: Iterable[str]) -> dict[str, Reason]:
        """Give the controllers to groups inside; return the reason for each that cannot be."""
        wanted = set(wanted)
        hint = delegation_remedy(self.path)
        try:
            fd = self._files.open_dir(self.path)
        except OSError as error:
            return dict.fromkeys(wanted, Reason(f"{self.path}: {error.strerror}", hint))
        try:
            offered = wanted & cgroup_v2.offered(self._files, fd)
            failed = {
                controller: Reason(f"controller {controller} is not delegated to {self.path}", hint)
                for controller in wanted - offered
            }
            for controller, (why, advice) in self._give(fd, offered).items():
                what = f"cannot enable controller {controller} in {self.path}: {why}"
                failed[controller] = Reason(what, advice or hint)
            return failed
        finally:
            os.close(fd)

    def _give(self, fd: int, controllers: set[str]) -> dict[str, Reason]:
        """Enable controllers, after this group's processes have moved out of the way."""
        todo = controllers - cgroup_v2.enabled(self._files, fd)
        try:
            if todo and not cgroup_v2.is_root(self._files, fd):
                self._vacate(fd)
        except OSError as error:
            return dict.fromkeys(todo, Reason(str(error.strerror), ""))
        except HostError as error:
            return dict.fromkeys(todo, Reason(error.message, error.hint))
        failed = cgroup_v2.enable(self._files, fd, todo)
        self._enabled |= todo - failed.keys()
        return {controller: Reason(str(error.strerror), "") for controller, error in failed.items()}

    def _vacate(self, fd: int) -> None:
        """Move the processes of the own group, this one among them, into a leaf below it."""
        if foreign := self._foreign(fd):
            raise HostError(
                f"it holds processes of other users or namespaces: {foreign}", hint=SCOPE_HINT
            )
        if not cgroup_v2.members(self._files, fd):
            return
        leaf = f"{self.path}/{cgroup_v2.SUPERVISOR}"
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

    def _foreign(self, fd: int) -> list[int]:
        """List the processes here that are not this user's."""
        return [pid for pid in cgroup_v2.members(self._files, fd) if not self._is_ours(pid)]

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

    def restore(self) -> None:
        """Undo `enable`, after a probe by a process that needs no session."""
        if not self._vacated:
            return
        leaf = f"{self.path}/{cgroup_v2.SUPERVISOR}"
        fd, leaf_fd = self._files.open_dir(self.path), self._files.open_dir(leaf)
        try:
            for controller in self._enabled:
                self._files.write(fd, "cgroup.subtree_control", f"-{controller}")
            cgroup_v2.move_all(self._files, leaf_fd, fd)
            self._files.remove_dir(leaf)
        except OSError:
            # A kernel that started meanwhile has groups there and lives in the leaf: let it.
            pass
        finally:
            os.close(fd)
            os.close(leaf_fd)
        self._enabled, self._vacated = set(), False
