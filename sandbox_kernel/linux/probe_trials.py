"""What is tried: a list for root and one for ordinary users, whose sessions are made otherwise."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import idmap, libc, probe_acts, probe_child, probe_ids
from sandbox_kernel.linux.probe_ids import FIRST_ID, Ground
from sandbox_kernel.linux.probe_remedy import NEEDS_USER_NAMESPACE, WITHOUT, remedy
from sandbox_kernel.linux.shift import shift
from sandbox_kernel.model import CELL_UID


@dataclass(frozen=True)
class Finding:
    """One thing that was tried; names of limits are those of `config`."""

    name: str
    group: str
    """One of `probe.GROUPS`."""
    available: bool
    required: bool
    """Whether a kernel with its defaults cannot run without it."""
    why: str
    """What went wrong; empty where nothing did."""
    remedy: str
    """What to do about it; empty where nothing need be done."""
    without: str = ""
    """What is different without it; empty where it is there, or required."""


HERE, BESIDE, INSIDE = "here", "beside", "inside"
"""With the rights of this process; where folders are collected; as root of a user namespace."""


@dataclass(frozen=True)
class Trial:
    """One thing to try."""

    name: str
    group: str
    act: probe_child.Act
    flags: int = 0
    """What is new for the act beside a user namespace."""
    place: str = INSIDE
    first: probe_child.Act | None = None
    """What is done beside the user namespace before."""
    required: bool = True

    def run(self, ground: Ground | None) -> Finding:
        """Try it; without a ground nothing can be done in or beside a user namespace."""
        if self.place != HERE and ground is None:
            why = "it needs a user namespace, which cannot be had"
            return self.finding(why, advice=NEEDS_USER_NAMESPACE)
        try:
            self._try(ground)
        except OSError as error:
            return self.finding(error.strerror or str(error), error.errno or 0)
        except HostError as error:
            return self.finding(error.message, advice=error.hint)
        return self.finding("")

    def _try(self, ground: Ground | None) -> None:
        if ground is None or self.place == HERE:
            probe_child.call(self.act)
        elif self.place == BESIDE:
            ground.beside(self.act)
        else:
            ground.inside(self.act, flags=self.flags, first=self.first)

    def finding(self, why: str, number: int = 0, advice: str = "") -> Finding:
        """Give the finding; `why` is empty if all went well."""
        if why and not advice:
            advice = remedy(self.name, number)
        return found(self.name, self.group, why, advice, required=self.required)


def found(name: str, group: str, why: str, advice: str, *, required: bool) -> Finding:
    """Give a finding; `why` is empty if all went well."""
    without = WITHOUT.get(name, "") if why and not required else ""
    return Finding(name, group, not why, required, why, advice, without)


_MAPPED = probe_acts.own_namespace


def _on_high() -> str:
    return Ground(idmap.high(FIRST_ID)).inside(_MAPPED)


def _on_single() -> str:
    return Ground(idmap.single(os.geteuid(), os.getegid())).inside(_MAPPED)


def _on_subordinate() -> str:
    return Ground(idmap.find_subordinate(os.geteuid(), os.getegid())).inside(_MAPPED)


HIGH = Trial("id_range", "ids", _on_high, place=HERE)
SUBORDINATE = Trial("subordinate_ids", "ids", _on_subordinate, place=HERE, required=False)
SINGLE = Trial("user_namespace", "namespaces", _on_single, place=HERE)


def of_root(folder: str) -> tuple[Trial, ...]:
    """Give what only root's sessions are made of; `folder` is where notebooks are."""
    workspace = functools.partial(_idmapped_folder, folder)
    return (
        Trial("host_binds", "ids", _binds_of_root, place=HERE),
        Trial("idmapped_mount", "namespaces", workspace, place=HERE),
        Trial("idmapped_image", "namespaces", _idmapped_image, place=HERE, required=False),
    )


def of_user(folder: str) -> tuple[Trial, ...]:
    """Give what only the sessions of an ordinary user are made of."""
    collect = functools.partial(probe_acts.collect_folder, folder)
    new = libc.CLONE_NEWNS
    return (
        Trial("host_binds", "ids", probe_acts.host_binds, place=BESIDE),
        Trial("workspace", "namespaces", probe_acts.use_folder, first=collect, flags=new),
    )


def of_all() -> tuple[Trial, ...]:
    """Give what every session is made of."""
    new = probe_acts.in_new_namespace
    new_proc = libc.CLONE_NEWPID | libc.CLONE_NEWNS
    devices = probe_acts.collect_devices
    return (
        Trial("pid_namespace", "namespaces", lambda: "", flags=libc.CLONE_NEWPID),
        Trial("mount_namespace", "namespaces", new(libc.CLONE_NEWNS)),
        Trial("network_namespace", "namespaces", new(libc.CLONE_NEWNET)),
        Trial("ipc_namespace", "namespaces", new(libc.CLONE_NEWIPC)),
        Trial("uts_namespace", "namespaces", new(libc.CLONE_NEWUTS)),
        Trial("cgroup_namespace", "namespaces", new(libc.CLONE_NEWCGROUP)),
        Trial("proc", "namespaces", probe_acts.fresh_proc, flags=new_proc),
        Trial("devices", "namespaces", probe_acts.use_devices, first=devices),
        Trial("devpts", "namespaces", probe_acts.terminals),
        Trial("overlay", "overlay", probe_acts.overlay),
        Trial("overlay_volatile", "overlay", probe_acts.overlay_volatile),
        Trial("overlay_whiteout", "overlay", probe_acts.overlay_whiteout),
        Trial("overlay_opaque", "overlay", probe_acts.overlay_opaque, required=False),
        Trial("overlay_layers", "overlay", probe_acts.overlay_layers),
        Trial("no_new_privs", "seccomp", probe_acts.no_new_privileges, place=HERE),
        Trial("seccomp", "seccomp", probe_acts.asking_filter),
        Trial("disk", "limits", probe_acts.sized_tmpfs),
        Trial("open_files", "limits", probe_acts.open_files, place=HERE),
        Trial("pidfd", "limits", probe_acts.pidfd, place=HERE),
    )


def _binds_of_root() -> str:
    return Ground(idmap.high(FIRST_ID)).beside(probe_acts.host_binds)


def _idmapped_folder(folder: str) -> str:
    """Show `folder` with its owner as the cell's user, as a session shows the notebook's."""
    info, cell = os.stat(folder), FIRST_ID + CELL_UID
    return _shifted((info.st_uid, cell, 1), (info.st_gid, cell, 1), (folder,), below=False)


def _idmapped_image() -> str:
    """Show the system's programs and this Python with root's files as root's in a session."""
    root = (0, FIRST_ID, 1)
    folders = {"/usr", os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)}
    return _shifted(root, root, sorted(folders), below=True)


def _shifted(
    uids: idmap.Extent, gids: idmap.Extent, folders: tuple[str, ...] | list[str], *, below: bool
) -> str:
    libc.unshare(libc.CLONE_NEWNS)
    with probe_ids.without_pids(), shift((uids,), (gids,)) as userns_fd:
        for folder in folders:
            probe_acts.idmapped(folder, userns_fd, below=below)
    return ""
