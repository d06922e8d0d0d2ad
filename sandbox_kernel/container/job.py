"""Run one program to its end in a container, as a step of a build does, and hand its files over.

The container is one as a session has, with init as PID 1. The program starts as the user it names,
root with the capabilities of Docker's containers, within the session's user namespace, and under a
filter without mounts and namespaces. What it wrote is packed by init when nothing else lives.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from sandbox_kernel.container import build, control, layers
from sandbox_kernel.container.plan import RootSpec
from sandbox_kernel.errors import LaunchError, SandboxError
from sandbox_kernel.linux import libc
from sandbox_kernel.linux.idmap import IdMap
from sandbox_kernel.linux.seccomp import compile_policy, job_policy
from sandbox_kernel.linux.tree_tar import Packing, pack

# What Docker's containers have (moby, oci/caps/defaults.go), without CAP_NET_RAW.
CAPABILITIES = (
    libc.CAP_CHOWN,
    libc.CAP_DAC_OVERRIDE,
    libc.CAP_FOWNER,
    libc.CAP_FSETID,
    libc.CAP_KILL,
    libc.CAP_SETGID,
    libc.CAP_SETUID,
    libc.CAP_SETPCAP,
    libc.CAP_NET_BIND_SERVICE,
    libc.CAP_SYS_CHROOT,
    libc.CAP_MKNOD,
    libc.CAP_AUDIT_WRITE,
    libc.CAP_SETFCAP,
)
NOT_STARTED = 127
_BECOME = "become the user"


@dataclass(frozen=True)
class Program:
    """What runs in the container."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    cwd: str
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    epoch_s: int | None = None
    """Pack what it wrote, with no file newer than this; None for a program whose files go."""

    def as_json(self) -> dict[str, Any]:
        """Give an object for the start message."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Program:
        """Make one of such an object."""
        env = tuple((str(name), str(value)) for name, value in body["env"])
        lists = {name: tuple(body[name]) for name in ("argv", "groups")}
        return cls(**{**body, **lists, "env": env})


def perform(sock: socket.socket, packet: control.Packet, monitor_fd: int) -> NoReturn:
    """Run the job of a start message and exit; init calls it in the place of serving a session.

    The descriptors of the packet are the program's stdout and stderr, its channel to the caller,
    and where the tar goes.
    """
    program = Program.from_json(packet.body["job"])
    stdout, stderr, caller_fd, tar_fd = packet.take_fds()
    wake, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    pid = libc.fork()
    if pid == 0:
        spec = layers.Layers(packet.body).next_root(0)
        _become(socket.socket(fileno=caller_fd), packet.body, spec, (stdout, stderr))
    for fd in (stdout, stderr, caller_fd):
        os.close(fd)
    body = _wait_for(pid, wake, (sock.fileno(), monitor_fd))
    control.send(sock, {"op": "ended", **body})
    if control.receive(sock) is None:  # the caller has read what it used
        os._exit(1)
    if program.epoch_s is not None and body == {"code": 0}:
        _pack(sock, tar_fd, program.epoch_s)
    os._exit(0)


def _wait_for(pid: int, wake: int, ends: tuple[int, ...]) -> dict[str, int]:
    """Reap until the program has ended, then end what it left; exit when one of `ends` closes."""
    poll = select.poll()
    for fd in (wake, *ends):
        poll.register(fd, select.POLLIN)
    while True:
        if any(fd != wake for fd, _ in poll.poll()):  # nobody waits for it any more
            os._exit(1)
        os.read(wake, 4096)
        while (info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)) is not None:
            if info.si_pid == pid:
                _end_all()
                exited = info.si_code == os.CLD_EXITED
                return {"code": info.si_status} if exited else {"signal": info.si_status}


def _end_all() -> None:
    """Kill and reap whatever else lives in this PID namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitid(os.P_ALL, 0, os.WEXITED)


def _pack(sock: socket.socket, tar_fd: int, epoch_s: int) -> None:
    try:
        with open(tar_fd, "wb") as out:
            packed = pack("/s/0/u", out, Packing(epoch_s))
    except (OSError, SandboxError) as error:
        control.send(sock, {"op": "failed", "step": "pack the layer", "cause": str(error)})
        return
    control.send(sock, {"op": "packed", "entries": packed.entries, "bytes": packed.bytes})


def _become(
    caller: socket.socket, body: dict[str, Any], spec: RootSpec, streams: tuple[int, int]
) -> NoReturn:
    step = "start"
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        control.send(caller, {"op": "here"})
        if control.receive(caller) is None:  # until we are in our cgroup
            os._exit(NOT_STARTED)
        for fd in build.isolate(body["hostname"], network=body["network"] != "host"):
            os.close(fd)
        build.make_root(spec)
        program = Program.from_json(body["job"])
        step = "descriptors"
        caller = _arrange_descriptors(caller, streams)
        step = f"the working folder {program.cwd}"
        os.chdir(program.cwd)
        step = f"{_BECOME} {program.uid}:{program.gid}"
        _drop_privileges(program, IdMap.from_json(body["ids"]))
        libc.seccomp_load(compile_policy(job_policy()))
        step = f"exec {program.argv[0]!r}"
        os.execvpe(program.argv[0], program.argv, dict(program.env))  # noqa: S606 - no shell here
    except LaunchError as error:
        control.send(caller, {"op": "failed", "step": error.step, "cause": error.cause})
    except OSError as error:
        hint = body["ids_why"] if step.startswith(_BECOME) else ""
        cause = error.strerror or str(error)
        control.send(caller, {"op": "failed", "step": step, "cause": cause, "hint": hint})
    os._exit(NOT_STARTED)


def _arrange_descriptors(caller: socket.socket, streams: tuple[int, int]) -> socket.socket:
    """Leave stdin (null), stdout, stderr, and the channel, which exec closes."""
    kept = os.dup2(caller.detach(), 1000, inheritable=False)
    out, err = (os.dup2(fd, 1001 + at, inheritable=False) for at, fd in enumerate(streams))
    os.dup2(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.closerange(3, 1000)
    os.closerange(1001, 65536)
    return socket.socket(fileno=kept)


def _drop_privileges(program: Program, ids: IdMap) -> None:
    libc.drop_bounding(CAPABILITIES)
    if not ids.is_alone:
        os.setgroups(program.groups)
    libc.set_keep_capabilities(True)
    os.setresgid(program.gid, program.gid, program.gid)
    os.setresuid(program.uid, program.uid, program.uid)
    mask = libc.cap_mask(CAPABILITIES)
    # Exec gives root what is in the bounding set, and takes all from any other user.
    libc.capset(mask, mask, 0)
    libc.set_no_new_privs()
