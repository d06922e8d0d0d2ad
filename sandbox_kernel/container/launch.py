"""Launch init: put the host's side of its root together, clone it into the session's namespaces.

Runs with rights to mount: as root of the host, or of the user namespace of an ordinary user's
`stage`. Whoever called it is init's parent.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

from sandbox_kernel.container import base, control, init
from sandbox_kernel.linux import idmap, libc
from sandbox_kernel.linux.idmap import IdMap, Wanted
from sandbox_kernel.linux.shift import shift

_NAMESPACES = (
    libc.CLONE_NEWUSER
    | libc.CLONE_NEWPID
    | libc.CLONE_NEWNS
    | libc.CLONE_NEWIPC
    | libc.CLONE_NEWUTS
)


def launch(sock: socket.socket, packet: control.Packet, inner: IdMap) -> int:
    """Start init; return its pid. `inner` is the map of its user namespace inside this one.

    `packet` is the start message. Raises OSError with the path at fault, LaunchError.
    """
    libc.unshare(libc.CLONE_NEWNS)
    with _host_side(packet.body, inner) as side:
        if inner.kind == "nested":
            _become_root()
        base.attach(side, packet.body["layers"], owner=inner.outside_uid(inner.root))
    ready, go = os.pipe()
    network = 0 if packet.body["network"] == "host" else libc.CLONE_NEWNET
    pid = libc.clone(_NAMESPACES | network)
    if pid == 0:
        os.close(go)
        if os.read(ready, 1):
            init.main(sock, packet, ready)
        os._exit(1)
    os.close(ready)
    idmap.write(pid, inner)
    for path in packet.body["init_cgroups"]:
        enter_cgroup(path, pid)
    os.write(go, b"g")  # and never close it: its end tells init that we are dead
    return pid


def wanted(body: dict[str, Any]) -> Wanted:
    """Give which ids the session of this start message needs."""
    return Wanted(body["cell_uid"], body["cell_gid"], body["id_count"])


def enter_cgroup(path: str, pid: int) -> None:
    """Move a process into a cgroup; raises OSError with the path."""
    path = f"{path}/cgroup.procs"
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(pid).encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(fd)


def _become_root() -> None:
    """Become root of the stage, whose user is still the ordinary one.

    Not before the host's side is collected: with his id this process may read what is his
    alone, also where a group that is not mapped would keep the root of the stage out.
    """
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # Or /proc/PID of init, which inherits it, would be out of reach for writing its maps.
    libc.set_dumpable(True)


@contextlib.contextmanager
def _host_side(body: dict[str, Any], inner: IdMap) -> Iterator[base.HostSide]:
    """Collect the host's side of the root; where ids are shifted, shown through the shift."""
    binds = [(source, target, read_only) for source, target, read_only in body["binds"]]
    workspace = (body["workspace"], body["workspace_mode"] != "rw") if body["workspace"] else None
    with contextlib.ExitStack() as stack:
        shifts = base.Shifts()
        if inner.kind == "high":
            root = ((0, inner.outside_uid(0), 1),)
            # What a job is shown was made for it, and every id in there is meant.
            seen = (inner.uids, inner.gids) if "job" in body else (root, root)
            shifts.host = stack.enter_context(shift(*seen))
            if body["layers"]:
                shifts.layers = stack.enter_context(shift(inner.uids, inner.gids))
            if workspace is not None:
                uid = inner.outside_uid(body["cell_uid"])
                gid = inner.outside_gid(body["cell_gid"])
                uids, gids = (body["workspace_owner"], uid, 1), (body["workspace_group"], gid, 1)
                shifts.workspace = stack.enter_context(shift((uids,), (gids,)))
        yield base.collect(base.Shown(binds, body["layers_folder"], workspace), shifts)
