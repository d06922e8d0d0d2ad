"""Change of user and place of a guest: a child enters its container, a head parks.

Four capabilities of the session's user namespace stay in the permitted set for this. `capset` and
`setns` are answered by init's gate, so outside of the announced moment all of this is EPERM.

Where the session has one id only, cells and heads share it: then init guards their signals.
"""

from __future__ import annotations

import os

from sandbox_kernel.linux import libc

_KEPT = libc.cap_mask((libc.CAP_SYS_ADMIN, libc.CAP_SYS_CHROOT, libc.CAP_SETUID, libc.CAP_SETGID))


def drop_at_boot() -> None:
    """Make the capabilities that came through exec ineffective, and mortal at the next exec."""
    libc.clear_ambient()
    libc.capset(0, _KEPT, 0)


def enter(namespace_fds: list[int], uid: int, gid: int) -> None:
    """Join the namespaces of a container and become the cell's user."""
    libc.capset(_KEPT, _KEPT, 0)
    for fd in namespace_fds:
        libc.setns(fd)
    _become(uid, gid)
    libc.capset(0, _KEPT, 0)
    for fd in namespace_fds:
        os.close(fd)
    # A change of user makes a process undumpable, and /proc/self belongs to root then.
    libc.set_dumpable(True)


def park(uid: int, gid: int) -> None:
    """Become the head's user, out of reach of every cell: kill, ptrace and /proc are EPERM."""
    libc.capset(_KEPT, _KEPT, 0)
    _become(uid, gid)
    libc.capset(0, _KEPT, 0)
    libc.set_dumpable(False)


def _become(uid: int, gid: int) -> None:
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def new_session() -> None:
    """Lead a process group of one's own, so that an interrupt reaches a cell's subprocesses too.

    And a session of one's own: within a session a cell could join the group of a head, and have
    Linux send it SIGHUP, whoever its user is, by leaving a stopped job there (setpgid(2)).
    """
    os.setsid()


def adopt(fd: int, number: int) -> None:
    """Put `fd` at the descriptor `number`, inheritable only where it is a standard stream."""
    os.dup2(fd, number, inheritable=number <= 2)
    os.close(fd)
