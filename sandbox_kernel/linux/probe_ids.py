"""Where acts are tried: on the ground that this user's sessions stand on.

Root's session is a user namespace with a high range of ids, whose mounts come from the host's own
mount namespace. An ordinary user has a stage between the two, a user namespace in which he may
mount, and the session's is made inside of that. Both are set up here as the engine does it.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sandbox_kernel.linux import idclaim, idmap, libc, probe_acts, probe_child
from sandbox_kernel.linux.idmap import IdMap
from sandbox_kernel.model import CELL_UID

FIRST_ID = idclaim.FIRST_ID - idmap.ID_COUNT
"""Just below the ids of sessions, so that those tried here are nobody's."""


@dataclass(frozen=True)
class Ground:
    """A way to map ids, and the namespaces that stand on it."""

    ids: IdMap

    def beside(self, act: probe_child.Act) -> str:
        """Run an act where folders and devices are collected: on the host, or on the stage."""
        if self.ids.kind == "high":
            return probe_child.call(functools.partial(_in_own_mounts, act))
        begin = functools.partial(_on_stage, act)
        prepare = functools.partial(_write, self.ids)
        return probe_child.call(begin, flags=libc.CLONE_NEWUSER, prepare=prepare)

    def inside(
        self, act: probe_child.Act, *, flags: int = 0, first: probe_child.Act | None = None
    ) -> str:
        """Run an act as root of a session's user namespace, with what else `flags` makes new.

        `first` is run beside it, as in `beside`, and leaves its mounts and its folder.
        """
        high = self.ids.kind == "high"
        inner = self.ids if high else idmap.nested(self.ids)

        def begin() -> str:
            if first is not None:
                first()
            if not high:
                _become(inner.root)
            enter = functools.partial(_as, inner.root, act)
            prepare = functools.partial(_write, inner)
            return probe_child.call(enter, flags=libc.CLONE_NEWUSER | flags, prepare=prepare)

        return self.beside(begin)


def _on_stage(act: probe_child.Act) -> str:
    probe_acts.own_namespace()
    return _in_own_mounts(act)


def _in_own_mounts(act: probe_child.Act) -> str:
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("none", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    return act()


def _as(user: int, act: probe_child.Act) -> str:
    _become(user)
    return act()


def _become(user: int) -> None:
    """Take an id of the own user namespace, with the rights that its maker has in it."""
    if user != CELL_UID:  # else it is the only one, and setgroups is denied
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        # Or /proc/PID of children, which inherit it, would be out of reach for writing maps.
        libc.set_dumpable(True)


def _write(ids: IdMap, pid: int) -> None:
    with without_pids():
        idmap.write(pid, ids)


@contextmanager
def without_pids() -> Iterator[None]:
    """Have errors name /proc/PID for the process of the moment, as the next one has another."""
    try:
        yield
    except OSError as error:
        path = re.sub(r"^/proc/\d+/", "/proc/PID/", str(error.filename or ""))
        raise OSError(error.errno, error.strerror, path or None) from error
