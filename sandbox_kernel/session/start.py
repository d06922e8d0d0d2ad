"""Start a session's processes: decide the start message, exec the monitor."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_kernel.container import control
from sandbox_kernel.errors import ConfigError
from sandbox_kernel.linux import idclaim
from sandbox_kernel.linux.cgroup import Cgroup
from sandbox_kernel.model import Bind, SessionSpec

PACKAGE_INSIDE = "/opt/sandbox-kernel"
"""Where a container shows this package, so that any Python inside can import the guest."""

_PROGRAM = (
    "import sys; sys.path.insert(0, {root!r}); "
    "from sandbox_kernel.container.monitor import main; main({fd})"
)


@dataclass(frozen=True)
class Started:
    """The processes of a session as they begin, and the kernel's ends of the links to them."""

    monitor: subprocess.Popen[bytes]
    control: socket.socket
    head: socket.socket
    builder: socket.socket


def start(spec: SessionSpec, cgroup: Cgroup, init_cgroup: Cgroup) -> Started:
    """Exec the monitor and tell it what to start; returns at once.

    Raises ConfigError when the notebook's folder cannot be shown, HostError where root has no
    ids for it.
    """
    body = start_message(spec, cgroup, init_cgroup)
    claims: list[int] = []
    ours, theirs = control.pair()
    builder, builder_theirs = control.pair()
    head, head_theirs = socket.socketpair()
    head.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    try:
        if os.geteuid() == 0:
            body["first_id"], claim_fd = idclaim.claim()
            claims.append(claim_fd)
        root = str(Path(__file__).resolve().parents[2])
        program = _PROGRAM.format(root=root, fd=theirs.fileno())
        monitor = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            pass_fds=(theirs.fileno(), *claims),  # the ids are the session's as long as it lives
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # A group of its own: Jupyter kills the kernel's whole group, and the monitor cleans up.
            start_new_session=True,
            env={"LANG": "C.UTF-8"},
        )
        control.send(ours, body, (head_theirs.fileno(), builder_theirs.fileno()))
    except BaseException:
        for end in (ours, head, builder):
            end.close()
        raise
    finally:
        for end in (theirs, head_theirs, builder_theirs):
            end.close()
        for fd in claims:
            os.close(fd)
    return Started(monitor, ours, head, builder)


def start_message(spec: SessionSpec, cgroup: Cgroup, init_cgroup: Cgroup) -> dict[str, Any]:
    """Give the message that tells the monitor, init and the first guest what to be."""
    image = spec.image
    package = str(Path(__file__).resolve().parents[1])
    binds = (*image.binds, Bind(package, f"{PACKAGE_INSIDE}/sandbox_kernel"))
    shows_workspace = spec.workspace_mode != "none"
    owner, group = _owner_of(spec.workspace) if shows_workspace else (0, 0)
    return {
        "binds": [[bind.source, bind.target, bind.read_only] for bind in binds],
        "bound": [bind.target for bind in binds],
        "targets": [[bind.target, os.path.isdir(bind.source)] for bind in binds],
        "folders": [list(folder) for folder in image.folders],
        "files": [list(file) for file in image.files],
        "links": [list(link) for link in image.links],
        "env": [list(pair) for pair in image.env],
        "python": list(image.python),
        "package": PACKAGE_INSIDE,
        "workspace": spec.workspace if shows_workspace else "",
        "workspace_mode": spec.workspace_mode,
        "workspace_owner": owner,
        "workspace_group": group,
        "cwd": "/workspace" if shows_workspace else image.home,
        "first_id": None,  # an ordinary user's session has the ids that its stage can get
        "disk_bytes": spec.limits.disk_bytes,
        "open_files": spec.ceiling.open_files,
        "hostname": spec.session_id[:12],
        "cgroups": list(cgroup.paths),
        "init_cgroups": list(init_cgroup.paths),
    }


def _owner_of(folder: str) -> tuple[int, int]:
    try:
        info = os.stat(folder)
    except OSError as error:
        raise ConfigError(
            f"the notebook's folder {folder!r} cannot be shown: {error.strerror}",
            hint="start the kernel in a folder that exists and that you can read",
        ) from error
    return info.st_uid, info.st_gid
