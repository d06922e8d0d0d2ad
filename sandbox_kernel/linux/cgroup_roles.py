"""The directories of one group, and which of them does what."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import cgroup_v1, cgroup_v2

LIMITS = {"memory": "memory", "cpus": "cpu", "processes": "pids"}
"""The controller behind each limit that every session has."""
IO = "io"
"""The limit that is only there if it is asked for, and its controller by v2's name."""
LIMIT_HINT = "run `sandbox-kernel doctor` to see what this host offers, or waive this limit"

_GONE = (
    "somebody else has removed it, or it is outside of what was delegated: restart the kernel, and "
    "see what cleans up cgroups here"
)
_REMEDIES = {
    errno.ENOENT: _GONE,
    errno.ENODEV: _GONE,
    errno.EAGAIN: "a group above allows no more groups inside: end other kernels, or raise its "
    "cgroup.max.descendants and cgroup.max.depth",
    errno.ENOSPC: "the host has no room for another cgroup: end other kernels or containers",
    errno.EROFS: "mount cgroups writable; inside of another container start that one with "
    "--privileged, or with a writable cgroup namespace of its own",
}
"""What to do about errors that mean the same whatever was tried. For mkdir and cgroup.procs the
kernel says EAGAIN and ENOSPC; a controller file has neither."""


class Reason(NamedTuple):
    """Why something cannot be done, and the remedy."""

    why: str
    hint: str

    def __str__(self) -> str:
        """Give the remedy in brackets behind the reason."""
        return f"{self.why} ({self.hint})" if self.hint else self.why


@dataclass(frozen=True)
class Node:
    """The directory of a group in one hierarchy; `fd` is owned by the `Cgroup`."""

    path: str
    fd: int
    unified: bool

    @property
    def driver(self) -> ModuleType:
        """The functions that speak the files of this hierarchy."""
        return cgroup_v2 if self.unified else cgroup_v1


@dataclass(frozen=True)
class Roles:
    """Which node does what, as indices; the same for a session and all groups below it."""

    unified: int | None
    memory: int | None
    cpu: int | None
    pids: int | None
    cpuacct: int | None
    freezer: int | None
    io: int | None = None
    v2_controllers: frozenset[str] = frozenset()
    """The controllers that children need to be given by their parent in the v2 tree."""
    reasons: Mapping[str, Reason] = field(default_factory=dict)
    """Why controllers are missing, by name."""


def remedy_for(error: OSError, otherwise: str) -> str:
    """Say what to do about an error of a cgroup file or directory, if the errno tells."""
    return _REMEDIES.get(error.errno or 0, otherwise)


def failure(action: str, node: Node, error: OSError, hint: str) -> HostError:
    """Word an OSError of a group; the hint is for errors that do not explain themselves."""
    text = f"cannot {action} cgroup {node.path}: {error.strerror}"
    return HostError(text, hint=remedy_for(error, hint))
