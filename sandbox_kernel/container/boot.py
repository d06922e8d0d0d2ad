"""Start the first guest of a session: container 0, no privilege left, the filter, then exec.

The order is the design: what needs a capability comes first, the filter last, since it forbids
the calls above it; exec lets go of everything but the four ambient capabilities, which the guest
makes ineffective as its first act.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
from typing import Any, NoReturn

from sandbox_kernel.container import build, control
from sandbox_kernel.container.plan import RootSpec
from sandbox_kernel.errors import LaunchError
from sandbox_kernel.linux import libc
from sandbox_kernel.linux.idmap import IdMap
from sandbox_kernel.linux.seccomp import cell_policy, compile_policy
from sandbox_kernel.model import head_beside

GUEST_FD = 3
"""The fd on which a guest speaks with the kernel."""
RESERVED_FDS = 64
"""What a guest may open beyond the limit of cells, so that a full table does not lame it."""
KEPT = (libc.CAP_SYS_ADMIN, libc.CAP_SYS_CHROOT, libc.CAP_SETUID, libc.CAP_SETGID)
"""What a guest keeps in its permitted set, to enter containers; see `gate`."""

# python -c puts the working folder, which is the notebook's, first on the path.
_BOOT = (
    "import sys; sys.path.pop(0); sys.path.extend({packages!r}); "
    "from sandbox_kernel.guest.main import main; main({fd}, {cell}, {head})"
)


def start_guest(body: dict[str, Any], link_fd: int, spec: RootSpec) -> tuple[int, int]:
    """Fork and exec a pristine guest; return its pid and the filter's listener.

    `body` is the start message, `link_fd` the guest's end of its link. Raises LaunchError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = libc.fork()
    if pid == 0:
        _become_guest(theirs, body, link_fd, spec)
    theirs.close()
    with ours:
        answer = control.receive(ours)
        # Exec closes the other end; if it fails, that is said before.
        last = control.receive(ours) if answer is not None and answer.op == "filtered" else answer
    if answer is None:
        raise LaunchError("start the first guest", "it ended before it had a filter")
    if last is not None:
        answer.close()
        raise LaunchError(last.body["step"], last.body["cause"])
    return pid, answer.fds.pop()


def _become_guest(
    channel: socket.socket, body: dict[str, Any], link_fd: int, spec: RootSpec
) -> NoReturn:
    step = "root"
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        # What is ignored or blocked stays so over exec, for the guest and all that cells start.
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for fd in build.isolate(body["hostname"]):
            os.close(fd)
        build.make_root(spec)
        step = "descriptors"
        channel = _arrange_descriptors(channel, link_fd)
        step = "privileges"
        ids = IdMap.from_json(body["ids"])
        drop_privileges(body, is_alone=ids.is_alone)
        step = "system call filter"
        users = {body["cell_uid"], body["cell_gid"], head_beside(body["cell_uid"])}
        policy = cell_policy(tuple(sorted(users)), guards_signals=ids.is_alone)
        listener = libc.seccomp_load(compile_policy(policy), listener=True)
        if listener is None:
            raise LaunchError(step, "no listener")
        control.send(channel, {"op": "filtered"}, (listener,))
        os.close(listener)
        step = "exec"
        _exec(body, ids)
    except LaunchError as error:
        control.send(channel, {"op": "failed", "step": error.step, "cause": error.cause})
    except OSError as error:
        cause = f"{error.strerror} {error.filename or ''}".strip()
        control.send(
            channel, {"op": "failed", "step": f"{step} of the first guest", "cause": cause}
        )
    os._exit(127)


def _arrange_descriptors(channel: socket.socket, link_fd: int) -> socket.socket:
    """Leave 0, 1, 2 (null), 3 (the link) and the channel, which exec closes."""
    kept = fcntl.fcntl(channel.detach(), fcntl.F_DUPFD_CLOEXEC, GUEST_FD + 1)
    link = fcntl.fcntl(link_fd, fcntl.F_DUPFD_CLOEXEC, GUEST_FD + 1)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.dup2(link, GUEST_FD)
    os.closerange(GUEST_FD + 1, kept)
    os.closerange(kept + 1, 65536)
    return socket.socket(fileno=kept)


def drop_privileges(body: dict[str, Any], *, is_alone: bool) -> None:
    """Become the cell user with nothing but KEPT, none of it regainable by exec later on.

    `body` is the start message. `is_alone` tells that the user namespace has no other id, and
    allows no setgroups.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = body["open_files"] + RESERVED_FDS
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    libc.drop_bounding(KEPT)
    if not is_alone:
        os.setgroups([])
    libc.set_keep_capabilities(True)
    uid, gid = body["cell_uid"], body["cell_gid"]
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    mask = libc.cap_mask(KEPT)
    libc.capset(mask, mask, mask)
    for capability in KEPT:
        libc.raise_ambient(capability)
    libc.set_no_new_privs()


def _exec(body: dict[str, Any], ids: IdMap) -> NoReturn:
    os.chdir(body["cwd"])
    cell = (body["cell_uid"], body["cell_gid"])
    head = cell if ids.is_alone else (head_beside(cell[0]),) * 2
    program = _BOOT.format(packages=body["packages"], fd=GUEST_FD, cell=cell, head=head)
    argv = [*body["python"], "-c", program]
    env = {str(name): str(value) for name, value in body["env"]}
    os.execve(argv[0], argv, env)  # noqa: S606 - no shell, on purpose
