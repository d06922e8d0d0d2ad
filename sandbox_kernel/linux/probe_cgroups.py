"""What cgroups can do here, each thing tried in a group below this process' own.

Runs in a process of its own, which may be moved about.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import cgroup_v2, libc
from sandbox_kernel.linux.cgroup import ACCOUNTING, V1_HINT, CgroupTree, session_name
from sandbox_kernel.linux.cgroup_files import CgroupFiles
from sandbox_kernel.linux.cgroup_group import Cgroup, Node, Roles
from sandbox_kernel.linux.cgroup_io import MEMORY, grounds
from sandbox_kernel.linux.mountinfo import Hierarchy, find_hierarchies, parse_mounts, parse_own
from sandbox_kernel.linux.probe_remedy import NEEDS_OWN_CGROUP
from sandbox_kernel.linux.scope import delegation_remedy

NAMES = {"memory": "memory", "cpus": "cpus", "processes": "processes", "cpu_time": ACCOUNTING}
"""The limit as users name it, and as `CgroupTree.missing` does."""
OWN, KILL, FREEZE, SWAP, IO = "own_cgroup", "kill", "freeze", "swap", "io"
ALL = (OWN, *NAMES, KILL, FREEZE, SWAP, IO)

Reason = tuple[int, str, str]
"""An errno (or 0), why it does not work (empty: it does), and what to do if that is known."""
WORKS: Reason = (0, "", "")

_WITH_HINT = re.compile(r"(?P<why>.*?) \((?P<hint>.*)\)")


def reasons() -> str:
    """Give the object of all reasons by name, as JSON."""
    try:
        tree = CgroupTree.acquire()
    except HostError as error:
        reason = (0, "it needs a cgroup of the kernel's own, which cannot be had", NEEDS_OWN_CGROUP)
        return json.dumps(dict.fromkeys(ALL, reason) | {OWN: (0, error.message, error.hint)})
    missing = tree.missing(io=True)
    found = {name: _split(missing.get(key, "")) for name, key in {**NAMES, IO: IO}.items()}
    if found[IO] == WORKS:
        found[IO] = _disks()
    found |= _ending() | {OWN: WORKS}
    found[SWAP] = (0, _swap(), "")
    return json.dumps(found)


def _disks() -> Reason:
    """Say why the files of this Python, which every cell reads, are on no disk that is known."""
    for ground in grounds(("/usr", sys.prefix)):
        if not ground.disks and ground.fs_type not in MEMORY:
            why = f"{ground.path} is on a file system ({ground.fs_type}) that names no disk"
            return 0, why, "keep Python on a disk of this machine, for example with ext4 or xfs"
    return WORKS


def _split(reason: str) -> Reason:
    """Part a reason from the remedy that stands in brackets after it."""
    match = _WITH_HINT.fullmatch(reason)
    return (0, reason, "") if match is None else (0, match["why"], match["hint"])


def _hierarchies() -> list[Hierarchy]:
    mounts = parse_mounts(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
    own = parse_own(Path("/proc/self/cgroup").read_text(encoding="utf-8"))
    return find_hierarchies(mounts, own)


def _own(hierarchy: Hierarchy) -> str:
    """Give the directory of the own group, or the one above where a kernel has moved it down."""
    leaf = os.path.basename(hierarchy.own) == cgroup_v2.SUPERVISOR
    return os.path.dirname(hierarchy.own) if leaf and hierarchy.unified else hierarchy.own


def _ending() -> dict[str, Reason]:
    """Freeze and kill a process by its group, in the v2 tree or with the v1 freezer."""
    reason: Reason = (0, "neither a v2 tree nor the freezer controller is mounted", "")
    for hierarchy in _hierarchies():  # the v2 tree first
        if not hierarchy.unified and "freezer" not in hierarchy.controllers:
            continue
        try:
            return _freeze_and_kill(hierarchy)
        except OSError as error:
            reason = (error.errno or 0, f"{error.strerror} ({error.filename})", _hint(hierarchy))
        except HostError as error:
            reason = (0, error.message, error.hint)
    return {FREEZE: reason, KILL: reason}


def _hint(hierarchy: Hierarchy) -> str:
    """Say how an ordinary user comes to have groups there; root is told something else."""
    if os.geteuid() == 0:
        return ""
    return delegation_remedy(hierarchy.own) if hierarchy.unified else V1_HINT


def _freeze_and_kill(hierarchy: Hierarchy) -> dict[str, Reason]:
    files = CgroupFiles()
    name = session_name("probe")
    path = f"{_own(hierarchy)}/{name}"
    node = Node(path, files.make_dir(path), hierarchy.unified)
    first = 0 if hierarchy.unified else None
    freezer = 0 if not hierarchy.unified or files.has(node.fd, "cgroup.freeze") else None
    roles = Roles(unified=first, memory=None, cpu=None, pids=None, cpuacct=None, freezer=freezer)
    with Cgroup(files, name, (node,), roles) as group:
        pid = _sleeper()
        try:
            group.add(pid)
            found = {FREEZE: _tried(group.freeze)}
            group.thaw()
            found[KILL] = _tried(group.kill)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return found


def _sleeper() -> int:
    pid = libc.fork()
    if pid == 0:
        libc.set_parent_death_signal(signal.SIGKILL)
        signal.pause()
        os._exit(0)
    return pid


def _tried(act: Callable[[], None]) -> Reason:
    try:
        act()
    except HostError as error:
        return (0, error.message, "")
    return WORKS


def _swap() -> str:
    """Say why swap cannot be kept from a group; fine where this machine has no swap."""
    if len(Path("/proc/swaps").read_text(encoding="utf-8").splitlines()) < 2:
        return ""
    for hierarchy in _hierarchies():
        if "memory" in hierarchy.controllers:
            if os.path.exists(f"{hierarchy.own}/memory.memsw.limit_in_bytes"):
                return ""
            return f"{hierarchy.own} has no memory.memsw.limit_in_bytes"
    v2 = next((h for h in _hierarchies() if h.unified), None)
    if v2 is None:
        return "controller memory is mounted nowhere"
    # The root group has no such file, but those below it do.
    folders = [_own(v2), *(entry.path for entry in os.scandir(_own(v2)) if entry.is_dir())]
    if any(os.path.exists(f"{folder}/memory.swap.max") for folder in folders):
        return ""
    return f"{_own(v2)} has no memory.swap.max"
