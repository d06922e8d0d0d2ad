"""The application around the kernel: sockets, threads, signals, and the end of the process.

It takes the place of ipykernel's `IPKernelApp`, which is an IPython application: that one reads
profiles and start-up files of the user, and loads the shell, none of which has a place in the
process that holds the keys. Nothing is read from or written to the user's home but the
connection file, and the output of this process is left alone.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
from pathlib import Path

import zmq
from ipykernel.control import ControlThread
from ipykernel.iostream import IOPubThread
from jupyter_client.connect import ConnectionFileMixin
from jupyter_client.session import Session, session_aliases, session_flags
from jupyter_core.paths import jupyter_runtime_dir
from tornado.ioloop import IOLoop
from traitlets import Any as AnyTrait
from traitlets import Instance, Unicode
from traitlets.config.application import Application, catch_config_error
from traitlets.utils import filefind
from zmq.eventloop.zmqstream import ZMQStream

from sandbox_kernel.config import SandboxConfig
from sandbox_kernel.kernel.kernel import SandboxKernel
from sandbox_kernel.kernel.parent import ParentWatch
from sandbox_kernel.kernel.sockets import Heartbeat, bind

ALIASES = {
    **session_aliases,
    "f": "SandboxKernelApp.connection_file",
    "ip": "SandboxKernelApp.ip",
    "transport": "SandboxKernelApp.transport",
    "hb": "SandboxKernelApp.hb_port",
    "shell": "SandboxKernelApp.shell_port",
    "iopub": "SandboxKernelApp.iopub_port",
    "stdin": "SandboxKernelApp.stdin_port",
    "control": "SandboxKernelApp.control_port",
    "log-level": "Application.log_level",
}


class SandboxKernelApp(Application, ConnectionFileMixin):
    """Serve a SandboxKernel on the sockets of a connection file.

    `read_spec` and `open_session` are handed to the kernel.
    """

    name = "jupyter-sandbox-kernel"
    description = "A Python kernel that runs every cell in a fresh container."
    classes = [SandboxConfig, Session]
    aliases = ALIASES
    flags = {
        **session_flags,
        "debug": ({"Application": {"log_level": logging.DEBUG}}, "Log everything."),
    }

    # The mixin's default is a name, and finding it loads every client there is.
    blocking_class = None
    kernel_class = AnyTrait(SandboxKernel)
    read_spec = AnyTrait()
    open_session = AnyTrait()
    connection_dir = Unicode()
    parent_watch = Instance(ParentWatch)

    def _ip_default(self) -> str:
        # The mixin's default asks every interface of the host, even if the file names one.
        if self.transport == "tcp":
            return "127.0.0.1"
        return f"{Path(self.connection_file).with_suffix('')}-ipc"

    def _connection_dir_default(self) -> str:
        return jupyter_runtime_dir()

    @catch_config_error
    def initialize(self, argv: list[str] | None = None) -> None:
        """Bind the sockets and make the kernel; it takes messages after `start`."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.parse_command_line(argv)
        self._read_connection_file()
        self._bind_sockets()
        self._make_kernel()
        self._await_end()
        # Last, for who waits for the file may send a signal as soon as it is there.
        if not self._given:
            self._write_connection_file()

    def _read_connection_file(self) -> None:
        self.connection_file = self.connection_file or f"kernel-{os.getpid()}.json"
        try:
            self.connection_file = filefind(self.connection_file, [".", self.connection_dir])
        except OSError:
            if not Path(self.connection_file).is_absolute():
                self.connection_file = str(Path(self.connection_dir) / self.connection_file)
            self._given = False
            return
        self.load_connection_file()
        self._given = all(self.ports)

    def _bind_sockets(self) -> None:
        self.context = context = zmq.Context()
        if self.transport == "tcp" and getattr(self, "curve_secretkey", None) is None:
            self.log.info("code and outputs travel over TCP without encryption")
        self._shell = bind(self, context, "shell", zmq.ROUTER)
        self._stdin = bind(self, context, "stdin", zmq.ROUTER)
        self._control = bind(self, context, "control", zmq.ROUTER)
        iopub = bind(self, context, "iopub", zmq.XPUB)
        # A context of its own: freeing a message of another takes the GIL.
        self._heartbeat_context = zmq.Context()
        Heartbeat(bind(self, self._heartbeat_context, "hb", zmq.ROUTER)).start()
        self._control_thread = ControlThread(daemon=True)
        self._iopub_thread = IOPubThread(iopub, session=self.session)
        self._iopub_thread.start()
        atexit.register(self.close)

    def _write_connection_file(self) -> None:
        path = Path(self.connection_file)
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            atexit.register(self.cleanup_connection_file)
        self._connection_file_written = False
        self.write_connection_file()
        self.log.warning("connect a client with: jupyter console --existing %s", path)

    def _make_kernel(self) -> None:
        self.kernel = self.kernel_class.instance(
            parent=self,
            session=self.session,
            control_stream=ZMQStream(self._control, self._control_thread.io_loop),
            shell_stream=ZMQStream(self._shell),
            control_thread=self._control_thread,
            iopub_thread=self._iopub_thread,
            iopub_socket=self._iopub_thread.background_socket,
            stdin_socket=self._stdin,
            log=self.log,
            read_spec=self.read_spec,
            open_session=self.open_session,
        )
        names = ("shell_port", "iopub_port", "stdin_port", "hb_port", "control_port")
        self.kernel.record_ports({name: getattr(self, name) for name in names})
        atexit.register(self.kernel.sessions.kill)

    def _await_end(self) -> None:
        self._io_loop = IOLoop.current()
        loop = self._io_loop.asyncio_loop  # type: ignore[attr-defined]
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.stop)
        self.parent_watch.attach(loop, self.stop)

    def start(self) -> None:
        """Serve until a shutdown request, a signal, or the death of the client."""
        self.kernel.start()
        self._control_thread.start()
        self._io_loop.start()

    def stop(self) -> None:
        """End the session at once and leave the loop."""
        self.kernel.sessions.kill()
        self._io_loop.stop()

    def close(self) -> None:
        """Stop the threads, and let the last messages leave."""
        self._heartbeat_context.term()
        # The control thread first: it publishes its idle status through the other one.
        if self._control_thread.is_alive():
            self._control_thread.stop()
            self._control_thread.join()
        self._iopub_thread.stop()
        self._iopub_thread.close()
        for socket in (self._shell, self._control, self._stdin):
            socket.close()
        self.context.term()
