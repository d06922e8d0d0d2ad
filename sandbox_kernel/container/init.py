"""PID 1 of a session: builds containers, guards the gate, keeps the layers, reaps.

Single-threaded, standard library only, root of the session's user namespace and nobody outside.
It serves the kernel over the control channel; when that closes, it exits, and Linux ends every
process of the PID namespace with it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import socket
from collections.abc import Callable
from typing import Any, NoReturn

from sandbox_kernel.container import base, boot, build, builder, control, layers
from sandbox_kernel.container.failure import failed
from sandbox_kernel.container.gate import GATED, Gate
from sandbox_kernel.container.signals import Signals
from sandbox_kernel.errors import LaunchError
from sandbox_kernel.linux import libc
from sandbox_kernel.linux.idmap import IdMap
from sandbox_kernel.linux.notify import notify_receive, notify_respond, notify_valid


def main(sock: socket.socket, packet: control.Packet, monitor_fd: int) -> NoReturn:
    """Set the session up and serve; `packet` is the start message.

    `monitor_fd` is a pipe whose other end the monitor holds: closed, the monitor is dead.
    """
    libc.set_name("sandbox-init")
    gc.disable()  # nothing here makes cycles, and a collection would dirty pages of all forks
    try:
        if not IdMap.from_json(packet.body["ids"]).is_alone:
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        # Cells may have this user too; /proc/PID/mem of init is not for them (ptrace(2)).
        libc.set_dumpable(False)
        os.umask(0o022)
        job = _job() if "job" in packet.body else None
        base.settle(packet.body)
        if job is not None:
            job(sock, packet, monitor_fd)
        init = Init(sock, packet, monitor_fd)
    except (OSError, LaunchError) as error:
        control.send(sock, failed(error, "set up the session's root"))
        os._exit(1)
    try:
        init.serve()
    except OSError as error:
        control.send(sock, failed(error, "serve the session"))
    finally:  # this stack is the monitor's, which has other things to do at its end
        os._exit(1)


def _job() -> Callable[[socket.socket, control.Packet, int], NoReturn]:
    """Give what runs a job; no module can be loaded once the session's root is in place."""
    from sandbox_kernel.container import job  # noqa: PLC0415 - sessions do without

    return job.perform


class Init:
    """The state of PID 1 and the verbs that the kernel may use."""

    def __init__(self, sock: socket.socket, packet: control.Packet, monitor_fd: int) -> None:
        self._sock = sock
        self._monitor_fd = monitor_fd
        self._watched: set[int] = set()
        self._squashing: dict[int, tuple[int, layers.Chains]] = {}
        self._layers = layers.Layers(packet.body)
        self._wake, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._start_message = packet.body
        self._gate = Gate(proc="/p")
        self._signals = Signals(proc="/p")
        self._poll = select.poll()
        for fd in (self._sock.fileno(), self._wake, monitor_fd):
            self._poll.register(fd, select.POLLIN)
        link_fd, kernel_fd = packet.fds
        # Held open by the builder, the link would not tell that the guest is gone.
        self._builder = builder.start(kernel_fd, not_ours=(link_fd,))
        self._start_guest(link_fd, 0)
        packet.close()
        self._verbs: dict[str, Callable[[control.Packet], None]] = {
            "boot": self._boot,
            "builder": self._start_builder,
            "build": self._build,
            "graft": self._graft,
            "gate": self._announce,
            "commit": self._commit,
            "discard": self._discard,
            "resize": self._resize,
            "squash": self._squash,
            "watch": self._watch,
        }

    def serve(self) -> NoReturn:
        """Serve until the kernel is gone."""
        self._sock.setblocking(False)
        while True:
            ready = dict(self._poll.poll())
            if self._monitor_fd in ready:  # nobody would clean up after us: end it now
                os._exit(1)
            self._read_control()
            if ready.pop(self._wake, 0):
                self._reap()
            ready.pop(self._sock.fileno(), 0)
            for listener_fd, events in ready.items():
                if events & select.POLLIN:
                    self._answer(listener_fd)
                else:  # POLLHUP: no process is under this filter any more
                    self._poll.unregister(listener_fd)
                    os.close(listener_fd)

    def _answer(self, listener_fd: int) -> None:
        """Answer a system call that the filter holds."""
        call = notify_receive(listener_fd)
        if call is None:
            return
        if call.number in GATED:
            verdict = self._gate.judge(call)
        else:
            verdict = self._signals.judge(call, lambda: notify_valid(listener_fd, call.id))
        notify_respond(listener_fd, call.id, error=verdict.error, proceed=verdict.proceed)
        verdict.then()

    def _start_guest(self, link_fd: int, layer: int) -> None:
        pid, listener_fd = boot.start_guest(
            self._start_message, link_fd, self._layers.next_root(layer)
        )
        self._poll.register(listener_fd, select.POLLIN)
        self._gate.announce(pid, "boot")
        self._watched.add(pid)
        about = {name: self._start_message[name] for name in ("ids", "ids_why")}
        about["keeps_attributes"] = base.keeps_attributes()
        self._reply({"op": "started", "layer": layer, **about})

    def _boot(self, packet: control.Packet) -> None:
        try:
            self._start_guest(packet.fds[0], packet.body["layer"])
        except (OSError, LaunchError) as error:
            why = failed(error, "start another first guest")
            self._reply({"op": "started", "layer": packet.body["layer"], "failed": why})

    def _read_control(self) -> None:
        # All of it, before a notification is answered: what the kernel announced counts then.
        while True:
            try:
                packet = control.receive(self._sock)
            except BlockingIOError:
                return
            if packet is None:
                os._exit(0)
            try:
                self._verbs[packet.op](packet)
            finally:
                packet.close()

    def _reap(self) -> None:
        try:
            os.read(self._wake, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                return
            if info is None:
                return
            pid = info.si_pid
            if pid in self._squashing:
                exited = info.si_code == os.CLD_EXITED
                self._squashed(pid, succeeded=exited and info.si_status == 0)
            if pid in self._watched:
                self._watched.discard(pid)
                code, status = info.si_code, info.si_status
                self._reply({"op": "reaped", "pid": pid, "code": code, "status": status})

    def _reply(self, body: dict[str, Any]) -> None:
        try:
            control.send(self._sock, body)
        except BlockingIOError:  # the kernel does not read: it is as good as gone
            os._exit(1)
        except OSError:
            os._exit(0)

    def _start_builder(self, packet: control.Packet) -> None:
        """Start a new builder: the one before was killed with the cell that it built for."""
        self._builder.close()
        # Without a process for it the kernel's channel ends with the packet, which tells it.
        with contextlib.suppress(OSError):
            self._builder = builder.start(packet.fds[0])

    def _build(self, packet: control.Packet) -> None:
        spec = self._layers.next_root(packet.body["layer"])
        try:
            builder.ask(self._builder, spec, packet.body["hostname"])
        except OSError:
            return  # it is dead, which the kernel learns by the end of its channel

    def _graft(self, packet: control.Packet) -> None:
        """Move the root of one mount namespace into another one, whose processes go on in it."""
        source, target = packet.fds
        layer = packet.body["layer"]
        pid = _fork()
        if pid == 0:
            try:
                build.graft(source, target)
            except OSError as error:
                os._exit(error.errno or 1)
            os._exit(0)
        code = errno.EAGAIN
        if pid is not None:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        why = {"error": os.strerror(code) if code > 0 else "killed"} if code else {}
        self._reply({"op": "grafted", "layer": layer, **why})

    def _announce(self, packet: control.Packet) -> None:
        self._gate.announce(packet.body["pid"], packet.body["kind"])

    def _commit(self, packet: control.Packet) -> None:
        layer = packet.body["layer"]
        changed = self._layers.commit(layer)
        if changed:
            base.keep_inodes()
        self._reply(
            {
                "op": "committed",
                "layer": layer,
                "changed": changed,
                "depth": self._layers.depth,
                "disk_bytes": self._layers.used_bytes(),
            }
        )

    def _squash(self, packet: control.Packet) -> None:
        """Merge all layers into one, in a process of its own; cells go on meanwhile."""
        layer, chains = packet.body["layer"], self._layers.chains()
        pid = _fork()
        if pid is None:  # the chain stays as it is
            self._reply({"op": "squashed", "layer": layer, "obsolete": []})
            return
        if pid == 0:
            try:
                self._layers.merge(layer, chains)
            except OSError:  # no space for it, say: the chain stays as it is
                os._exit(1)
            os._exit(0)
        self._squashing[pid] = (layer, chains)

    def _squashed(self, pid: int, *, succeeded: bool) -> None:
        layer, chains = self._squashing.pop(pid)
        obsolete = self._layers.replace(layer, chains) if succeeded else [layer]
        self._reply({"op": "squashed", "layer": layer, "obsolete": obsolete})

    def _discard(self, packet: control.Packet) -> None:
        for layer in packet.body["layers"]:
            self._layers.forget(layer)
        left = [layer for layer in packet.body["layers"] if not self._layers.remove_empty(layer)]
        # In a process of its own: a cell may have left a million files, and init must not wait.
        if left and not (pid := _fork()):
            for layer in left:
                self._layers.remove(layer)
            if pid == 0:
                os._exit(0)
        self._reply({"op": "discarded", "layer": packet.body["layers"][0]})

    def _resize(self, packet: control.Packet) -> None:
        try:
            base.resize_scratch(packet.body["disk_bytes"])
        except OSError as error:
            self._reply(
                {"op": "resized", "error": error.strerror, "used": self._layers.used_bytes()}
            )
        else:
            self._reply({"op": "resized"})

    def _watch(self, packet: control.Packet) -> None:
        self._watched.add(packet.body["pid"])


def _fork() -> int | None:
    """Fork; None where the host lets no more processes start, which init must outlive."""
    try:
        return libc.fork()
    except OSError:
        return None
