"""The monitor: starts a session's init and, when that is gone, removes what is left on the host.

Podman's users know its like as conmon. It is exec'ed by the kernel, stays outside of the
session's cgroup and namespaces, and outlives both the kernel and init: whichever of them is
killed, init ends (its control channel closes, or it was the one), the kernel of Linux kills
everything in its PID namespace, and the monitor removes the cgroups. It then ends itself.

The start message (`start_message` in `session.start` makes it) comes over the control channel.
It holds the first of the ids that root gives the session, or none: then this is an ordinary user.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import NoReturn

from sandbox_kernel.container import control, stage
from sandbox_kernel.container.failure import failed
from sandbox_kernel.container.launch import launch, wanted
from sandbox_kernel.errors import HostError, LaunchError
from sandbox_kernel.linux import idmap, libc


def main(control_fd: int) -> NoReturn:
    """Start init, wait for its end, clean up, exit."""
    libc.set_name("sandbox-monitor")
    os.umask(0o022)  # whatever the user has: folders made here are what a container consists of
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the session's end is init's end, nothing else
    sock = socket.socket(fileno=control_fd)
    packet = control.receive(sock)
    if packet is None:
        sys.exit(0)
    try:
        pid = _start(sock, packet)
    except (OSError, HostError, LaunchError) as error:
        control.send(sock, failed(error, "set up the session"))
        _remove(packet.body["cgroups"])
        sys.exit(1)
    sock.close()
    packet.close()
    os.waitpid(pid, 0)
    _remove(packet.body["cgroups"])
    sys.exit(0)


def _start(sock: socket.socket, packet: control.Packet) -> int:
    """Start init, or the stage of an ordinary user that does; return the child's pid."""
    if "job" in packet.body:
        # Init can load nothing more: a file system of its own may cover where this package lies.
        from sandbox_kernel.container import job  # noqa: F401, PLC0415 - sessions do without
    first_id = packet.body["first_id"]
    if first_id is None:
        return stage.start(sock, packet)
    ids = idmap.high(first_id, wanted(packet.body))
    packet.body |= {"ids": ids.as_json(), "ids_why": ""}
    return launch(sock, packet, ids)


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
