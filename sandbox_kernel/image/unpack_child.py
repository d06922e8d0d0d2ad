"""The process that unpacks: it shuts itself into the folder, then reads the tar from fd 0.

Nothing in `unpack_tree` leaves the folder; this is the second wall. Where it is root's process
that wall is a must. An ordinary user has it where Linux lets him make a user namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from dataclasses import asdict
from typing import Any

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.unpack_attributes import Attributes
from sandbox_kernel.image.unpack_headers import TarReader
from sandbox_kernel.image.unpack_lowers import Lowers
from sandbox_kernel.image.unpack_rules import Bounds, Owners
from sandbox_kernel.image.unpack_tree import Tree
from sandbox_kernel.linux import libc

_KEPT = libc.cap_mask(
    (libc.CAP_CHOWN, libc.CAP_DAC_OVERRIDE, libc.CAP_FOWNER, libc.CAP_FSETID, libc.CAP_SETFCAP)
)


def main() -> None:
    """Unpack as the JSON object in `argv[1]` says, and answer with one on fd 1."""
    order = json.loads(sys.argv[1])
    try:
        answer = _unpack(order)
    except ImageError as error:
        answer = {"error": error.message, "hint": error.hint}
    except MemoryError:
        answer = {"error": "the layer has too many names to unpack it", "hint": ""}
    data = json.dumps(answer).encode()
    while data:
        data = data[os.write(1, data) :]


def _unpack(order: dict[str, Any]) -> dict[str, Any]:
    bounds = Bounds(**order["bounds"])
    _limit(bounds)
    _shut_in(order["target_fd"])
    tree = Tree(
        order["target_fd"],
        Attributes(Owners(order["owners"])),
        bounds=bounds,
        lowers=Lowers(order["lower_fds"]),
        skip_devices=order["skip_devices"],
    )
    return asdict(tree.fill(TarReader(_read_stdin, bounds)))


def _read_stdin(buffer: memoryview) -> int:
    return os.readv(0, [buffer])


def _limit(bounds: Bounds) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = bounds.memory_bytes
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _shut_in(target_fd: int) -> None:
    """Make the folder this process's root, and drop the rights that could undo it."""
    os.umask(0)
    os.fchdir(target_fd)
    is_root = os.geteuid() == 0
    try:
        if not is_root:
            _become_root_of_own_namespace()
        os.chroot(".")
    except OSError as error:
        if is_root:
            raise ImageError(
                f"root must not unpack without chroot(2): {error.strerror}",
                hint="give this process CAP_SYS_CHROOT, or start it as an ordinary user",
            ) from error
        # As himself he can lose nothing but what is his; the descriptors hold all the same.
    else:
        libc.capset(*(libc.capget().permitted & _KEPT,) * 2, 0)
    libc.set_no_new_privs()


def _become_root_of_own_namespace() -> None:
    """Get the capability for chroot(2) in a user namespace where the user keeps his ids."""
    uid, gid = os.geteuid(), os.getegid()
    libc.unshare(libc.CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with contextlib.suppress(FileNotFoundError):  # setgroups came with Linux 3.19
            fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
