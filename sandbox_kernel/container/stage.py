"""The stage of an ordinary user's session: a user namespace in which he has root's part.

Linux gives whoever makes a user namespace all rights inside of it (user_namespaces(7)). In there
the session is launched as root would launch it on the host: mounts that are inherited into the
session's own user namespace, one further in, are locked there.

Which ids the stage has is found out by trying: the ranges of /etc/subuid by newuidmap and
newgidmap, else the user's own id alone.
"""

from __future__ import annotations

import os
import signal
import socket
from typing import NoReturn

from sandbox_kernel.container import control
from sandbox_kernel.container.failure import failed, hint_for
from sandbox_kernel.container.launch import enter_cgroup, launch, wanted
from sandbox_kernel.errors import HostError, LaunchError
from sandbox_kernel.linux import idmap, libc
from sandbox_kernel.linux.idmap import IdMap

V1_MOVES = "cgroup v1 lets only root move processes of other ids, subordinate ones too"


def start(sock: socket.socket, packet: control.Packet) -> int:
    """Start the stage, which launches init and waits for its end; return the stage's pid.

    Init is told its ids by the start message, and the kernel by init, why they are so few too.
    Raises OSError, LaunchError.
    """
    uid, gid = os.geteuid(), os.getegid()
    needed = wanted(packet.body)
    ids, why = idmap.choose(uid, gid, needed)
    if ids.kind != "single" and not packet.body["takes_other_users"]:
        ids, why = idmap.single(uid, gid, needed), V1_MOVES
    if ids.kind != "single":
        try:
            return _clone(sock, packet, ids, why)
        except HostError as error:
            ids, why = idmap.single(uid, gid, needed), str(error)
    return _clone(sock, packet, ids, why)


def _clone(sock: socket.socket, packet: control.Packet, ids: IdMap, why: str) -> int:
    packet.body |= {"ids": ids.as_json(), "ids_why": why}
    monitor = os.getpid()
    ready, go = os.pipe()
    try:
        pid = libc.clone(libc.CLONE_NEWUSER)
    except OSError as error:
        os.close(ready)
        os.close(go)
        cause = error.strerror or ""
        raise LaunchError("make a user namespace", cause, hint=hint_for(error)) from error
    if pid == 0:
        os.close(go)
        if os.read(ready, 1):
            _perform(sock, packet, ids, monitor)
        os._exit(1)
    os.close(ready)
    try:
        idmap.write(pid, ids)
        for path in packet.body["init_cgroups"]:
            enter_cgroup(path, pid)
        os.write(go, b"g")
    except BaseException:  # also an interrupt: the child waits for us
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(go)
    return pid


def _perform(sock: socket.socket, packet: control.Packet, ids: IdMap, monitor: int) -> NoReturn:
    libc.set_name("sandbox-stage")
    packet.body["init_cgroups"] = []  # init is born in them: this process was moved there
    try:
        pid = launch(sock, packet, idmap.nested(ids))
    except (OSError, HostError, LaunchError) as error:
        control.send(sock, failed(error, "set up the session"))
        os._exit(1)
    sock.close()
    packet.close()
    # The monitor's death must end us, and our end init; a change of user has cleared it before.
    libc.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != monitor:  # it died before; who adopts us may be the user's systemd
        os._exit(1)
    os.waitpid(pid, 0)
    os._exit(0)
