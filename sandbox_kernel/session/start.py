"""Start a session's processes: decide the start message, exec the monitor."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_kernel.container import control
from sandbox_kernel.container.begin import begin
from sandbox_kernel.container.boot import RESERVED_FDS
from sandbox_kernel.errors import ConfigError, HostError, ImageError
from sandbox_kernel.linux.cgroup import Cgroup
from sandbox_kernel.linux.idmap import ID_COUNT
from sandbox_kernel.model import Bind, Image, SessionSpec

PACKAGE_INSIDE = "/opt/sandbox-kernel"
"""Where a container shows this package, so that any Python inside can import the guest."""
KERNEL_FDS = 1024
"""What this process may need at most: some for each guest and container, and Jupyter's sockets."""


@dataclass(frozen=True)
class Started:
    """The processes of a session as they begin, and the kernel's ends of the links to them."""

    monitor: subprocess.Popen[bytes]
    control: socket.socket
    head: socket.socket
    builder: socket.socket


def allow_open_files(limit: int) -> None:
    """Let this process, and guests with `limit` files each, open as many files as they need.

    Raises HostError where the hard limit is below that.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and limit + RESERVED_FDS > hard:
        raise HostError(
            f"open_files={limit} is above this host's hard limit of {hard} less {RESERVED_FDS}",
            hint="lower open_files, or raise the limit of whoever starts Jupyter (ulimit -Hn)",
        )
    wanted = KERNEL_FDS if hard == unlimited else min(KERNEL_FDS, hard)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def start(spec: SessionSpec, cgroup: Cgroup, init_cgroup: Cgroup) -> Started:
    """Exec the monitor and tell it what to start; returns at once.

    Raises ConfigError when the notebook's folder cannot be shown, HostError where root has no
    ids for it, ImageError where the image was removed a moment ago.
    """
    body = start_message(spec, cgroup, init_cgroup)
    builder, builder_theirs = control.pair()
    head, head_theirs = socket.socketpair()
    head.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    try:
        with image_lease(spec.image) as lease:
            begun = begin(body, (head_theirs.fileno(), builder_theirs.fileno()), held=lease)
    except BaseException:
        head.close()
        builder.close()
        raise
    finally:
        head_theirs.close()
        builder_theirs.close()
    return Started(begun.monitor, begun.control, head, builder)


@contextmanager
def image_lease(image: Image) -> Iterator[tuple[int, ...]]:
    """Claim the layers of an image as long as a process has the descriptors that this gives.

    Raises ImageError where a prune was faster.
    """
    if image.layers is None or not image.leased:
        yield ()
        return
    from sandbox_kernel.image.store import Store  # noqa: PLC0415 - not for this machine's image

    with Store.open(image.store) as store:
        fd = store.lease(image.leased).hand_over()
    try:
        folders = [f"{image.layers.folder}/{name}" for name in image.layers.names]
        if not all(map(os.path.exists, (*folders, *(bind.source for bind in image.binds)))):
            raise ImageError(
                f"a layer of image {image.reference!r} is gone",
                hint="it was pruned a moment ago; restart the kernel",
            )
        yield (fd,)
    finally:
        os.close(fd)


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
        "tmpfs": [[path, spec.limits.disk_bytes] for path in image.tmpfs],
        "files": [list(file) for file in image.files],
        "links": [list(link) for link in image.links],
        "layers": list(image.layers.names) if image.layers else [],
        "layers_folder": image.layers.folder if image.layers else "",
        "cell_uid": image.uid,
        "cell_gid": image.gid,
        "id_count": ID_COUNT,
        "network": "none",
        "env": [list(pair) for pair in image.env],
        "python": list(image.python),
        "packages": [PACKAGE_INSIDE, *image.packages],
        "workspace": spec.workspace if shows_workspace else "",
        "workspace_mode": spec.workspace_mode,
        "workspace_owner": owner,
        "workspace_group": group,
        "cwd": image.working_dir or ("/workspace" if shows_workspace else image.home),
        "first_id": None,  # an ordinary user's session has the ids that its stage can get
        "disk_bytes": spec.limits.disk_bytes,
        "open_files": spec.ceiling.open_files,
        "hostname": spec.session_id[:12],
        "cgroups": list(cgroup.paths),
        "init_cgroups": list(init_cgroup.paths),
        "takes_other_users": cgroup.takes_other_users,
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
