"""Build one container: new namespaces, then the steps of its plan.

Runs in a process that init forked for this one purpose, as root of the session's user namespace.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct

from sandbox_kernel.container.plan import RootSpec, root_plan
from sandbox_kernel.container.steps import Step
from sandbox_kernel.errors import LaunchError
from sandbox_kernel.linux import libc

NAMESPACES = ("mnt", "net", "ipc", "uts", "cgroup")
"""What is new in every container, by the names of /proc/self/ns; the order of the fds."""

_NEW = libc.CLONE_NEWNS | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS | libc.CLONE_NEWCGROUP
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
_IFF_RUNNING = 0x40


def isolate(hostname: str, *, network: bool = True) -> list[int]:
    """Enter new namespaces; return their fds in the order of NAMESPACES.

    Without `network` the network stays the one that the caller is in. The caller must be in the
    cell's cgroup already: a cgroup namespace shows as `/` where its maker was. Raises LaunchError.
    """
    try:
        libc.unshare(_NEW | (libc.CLONE_NEWNET if network else 0))
    except OSError as error:
        raise LaunchError("new namespaces", error.strerror or "") from error
    try:
        socket.sethostname(hostname)
        if network:
            _loopback_up()
    except OSError as error:
        raise LaunchError("host name and loopback", error.strerror or "") from error
    return [os.open(f"/p/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in NAMESPACES]


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_RUNNING)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, request)


def make_layer(layer: int, cell: tuple[int, int]) -> None:
    """Make the upper and work folders of a cell in the scratch file system.

    `cell` are the user and group that cells have.
    """
    top = f"/s/{layer}"
    try:
        os.mkdir(top, 0o700)
    except FileExistsError:  # of a builder that was killed; an overlay refuses its work folder
        shutil.rmtree(top)
        os.mkdir(top, 0o700)
    for name in ("u", "w", "x", "y"):
        os.mkdir(f"{top}/{name}", 0o755)
    # The root of an upper is the root of what is mounted: /workspace belongs to the cell.
    os.chown(f"{top}/x", *cell)


def make_root(spec: RootSpec) -> None:
    """Put the root together and pivot into it; raises LaunchError that names the step."""
    try:
        make_layer(spec.layer, spec.cell)
    except OSError as error:
        raise LaunchError("folders of the layer", error.strerror or "") from error
    for step in root_plan(spec):
        _run(step)


def _run(step: Step) -> None:
    try:
        step.run()
    except OSError as error:
        raise LaunchError(step.describe(), error.strerror or str(error)) from error


def graft(source_namespace: int, target_namespace: int) -> None:
    """Make the root of one mount namespace the root of another, for all processes in there.

    pivot_root(2) changes the root of every process of the namespace that had the old one, and
    the working folder of those that stood in it.
    """
    libc.setns(source_namespace, libc.CLONE_NEWNS)
    tree = libc.open_tree(
        "/", flags=libc.OPEN_TREE_CLONE | libc.OPEN_TREE_CLOEXEC | libc.AT_RECURSIVE
    )
    libc.setns(target_namespace, libc.CLONE_NEWNS)
    libc.move_mount(tree, "/")
    os.fchdir(tree)
    libc.pivot_root(".", ".")
    libc.umount2(".", libc.MNT_DETACH)
