"""The builder: a process of init's that makes one container after the other and stays outside.

It unshares, builds and pivots, hands the namespaces to the kernel, and steps back into init's
own ones: forking a builder for every container would cost more than the container. The kernel
puts it into the cell's cgroup before, since a cgroup namespace shows as `/` where its maker was,
and takes it out again afterwards.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from typing import NoReturn

from sandbox_kernel.container import build, control
from sandbox_kernel.container.plan import RootSpec
from sandbox_kernel.errors import LaunchError
from sandbox_kernel.linux import libc


def start(kernel_fd: int, *, not_ours: tuple[int, ...] = ()) -> socket.socket:
    """Fork the builder; return init's end of the channel that brings it its work.

    `kernel_fd` is the builder's channel to the kernel, `not_ours` are descriptors of others.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if libc.fork() == 0:
        ours.close()
        for fd in not_ours:
            os.close(fd)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _serve(socket.socket(fileno=kernel_fd), theirs)
    theirs.close()
    return ours


def ask(channel: socket.socket, spec: RootSpec, hostname: str) -> None:
    """Have the builder make a container."""
    control.send(channel, {**spec.as_json(), "hostname": hostname})


def _serve(kernel: socket.socket, work: socket.socket) -> NoReturn:
    gc.freeze()
    libc.set_name("sandbox-builder")
    # The cgroup namespace so far is the host's, which nobody in here may return to.
    libc.unshare(libc.CLONE_NEWCGROUP)
    home = [os.open(f"/p/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in build.NAMESPACES]
    try:
        control.send(kernel, {"op": "here"})
        while (packet := control.receive(work)) is not None:
            hostname = packet.body.pop("hostname")
            _build(kernel, RootSpec.from_json(packet.body), hostname)
            for fd in home:
                libc.setns(fd)
    except OSError:
        os._exit(0)  # the kernel or init is gone
    os._exit(0)


def _build(kernel: socket.socket, spec: RootSpec, hostname: str) -> None:
    fds: list[int] = []
    try:
        fds = build.isolate(hostname)
        build.make_root(spec)
        control.send(kernel, {"op": "built"}, tuple(fds))
    except LaunchError as error:
        control.send(kernel, {"op": "failed", "step": error.step, "cause": error.cause})
    finally:
        for fd in fds:
            os.close(fd)
