"""The monitor: starts a session's init and, when that is gone, removes what is left on the host.

Podman's users know its like as conmon. It is exec'ed by the kernel, stays outside of the
session's cgroup and namespaces, and outlives both the kernel and init: whichever of them is
killed, init ends (its control channel closes, or it was the one), the kernel of Linux kills
everything in its PID namespace, and the monitor removes the cgroups. It then ends itself.

The start message (`start_message` in `session.start` makes it) comes over the control channel.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any, NoReturn

from sandbox_kernel.container import base, control, init
from sandbox_kernel.errors import LaunchError
from sandbox_kernel.linux import libc
from sandbox_kernel.model import CELL_UID

ID_COUNT = 1024
"""How many user ids a session has; 0, 1000 and 1001 are in use."""

_NAMESPACES = (
    libc.CLONE_NEWUSER
    | libc.CLONE_NEWPID
    | libc.CLONE_NEWNS
    | libc.CLONE_NEWIPC
    | libc.CLONE_NEWUTS
    | libc.CLONE_NEWNET
)


def main(control_fd: int) -> NoReturn:
    """Start init, wait for its end, clean up, exit."""
    libc.set_name("sandbox-monitor")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the session's end is init's end, nothing else
    sock = socket.socket(fileno=control_fd)
    packet = control.receive(sock)
    if packet is None:
        sys.exit(0)
    try:
        pid = _start(sock, packet)
    except (OSError, LaunchError) as error:
        control.send(sock, {"op": "failed", **_words(error)})
        _remove(packet.body["cgroups"])
        sys.exit(1)
    sock.close()
    packet.close()
    os.waitpid(pid, 0)
    _remove(packet.body["cgroups"])
    sys.exit(0)


def _words(error: OSError | LaunchError) -> dict[str, str]:
    if isinstance(error, LaunchError):
        return {"step": error.step, "cause": error.cause, "hint": error.hint}
    where = f" ({error.filename})" if error.filename else ""
    return {"step": "set up the session", "cause": f"{error.strerror}{where}"}


def _start(sock: socket.socket, packet: control.Packet) -> int:
    body = packet.body
    libc.unshare(libc.CLONE_NEWNS)
    idmap_fd = _idmap(body) if body["idmap"] else -1
    workspace = (body["workspace"], body["workspace_mode"] != "rw") if body["workspace"] else None
    base.attach_host_side([tuple(bind) for bind in body["binds"]], workspace, idmap_fd)
    if idmap_fd >= 0:
        os.close(idmap_fd)
    ready, go = os.pipe()
    pid = libc.clone(_NAMESPACES)
    if pid == 0:
        os.close(go)
        if os.read(ready, 1):
            init.main(sock, packet, ready)
        os._exit(1)
    os.close(ready)
    for kind in ("uid", "gid"):
        _map_ids(pid, kind, (0, body["first_id"], ID_COUNT))
    for path in body["init_cgroups"]:
        _write(f"{path}/cgroup.procs", str(pid))
    os.write(go, b"g")  # and never close it: its end tells init that we are dead
    return pid


def _idmap(body: dict[str, Any]) -> int:
    """Give a user namespace that shows files of the folder's owner as the cell user's."""
    cell_id = body["first_id"] + CELL_UID
    ready, go = os.pipe()
    pid = libc.clone(libc.CLONE_NEWUSER)
    if pid == 0:
        os.close(go)
        os.read(ready, 1)  # until the parent has taken the namespace, or died
        os._exit(0)
    os.close(ready)
    try:
        _map_ids(pid, "uid", (body["workspace_owner"], cell_id, 1))
        _map_ids(pid, "gid", (body["workspace_group"], cell_id, 1))
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(go)
        os.waitpid(pid, 0)


def _map_ids(pid: int, kind: str, extent: tuple[int, int, int]) -> None:
    """Map ids of a new user namespace once for all: (inside, outside, count)."""
    _write(f"/proc/{pid}/{kind}_map", " ".join(map(str, extent)))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(fd)


def _remove(cgroups: list[str]) -> None:
    """Remove the session's cgroups, children first; the kernel may have done it already."""
    for top in cgroups:
        for folder, _, _ in os.walk(top, topdown=False):
            _rmdir(folder)


def _rmdir(folder: str) -> None:
    # A child of init that was reaped a moment ago may still count for its cgroup.
    for _ in range(100):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            return
        except OSError:
            signal.sigtimedwait((), 0.01)
        else:
            return
