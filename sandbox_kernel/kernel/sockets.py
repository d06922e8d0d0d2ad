"""The five sockets of a kernel: bound as a connection file says, encrypted if it says so."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Any

import zmq

if TYPE_CHECKING:
    from jupyter_client.connect import ConnectionFileMixin

LINGER_MS = 1000
"""How long a closing socket waits for its last messages to leave."""


def bind(app: ConnectionFileMixin, context: zmq.Context[Any], channel: str, kind: int) -> Any:
    """Give a bound socket of one channel; a port of 0 in `app` becomes the one that was free."""
    socket = context.socket(kind)
    socket.linger = LINGER_MS
    if kind == zmq.ROUTER:
        # A client that reconnects under its old identity takes over from its dead connection.
        socket.router_handover = 1
    secret = getattr(app, "curve_secretkey", None)
    if secret is not None:
        socket.curve_secretkey = secret
        socket.curve_publickey = app.curve_publickey
        socket.curve_server = True
    port = getattr(app, f"{channel}_port")
    if app.transport == "ipc":
        port = port or _free_ipc_port(app.ip)
        socket.bind(f"ipc://{app.ip}-{port}")
    elif port:
        socket.bind(f"tcp://{app.ip}:{port}")
    else:
        port = socket.bind_to_random_port(f"tcp://{app.ip}")
    setattr(app, f"{channel}_port", port)
    return socket


def _free_ipc_port(ip: str) -> int:
    from pathlib import Path  # noqa: PLC0415 - for connection files without ports only

    port = 1
    while Path(f"{ip}-{port}").exists():
        port += 1
    return port


class Heartbeat(threading.Thread):
    """Echo every message, in a thread and below Python, so that a busy kernel stays alive."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        super().__init__(name="Heartbeat", daemon=True)
        self._socket = socket

    def run(self) -> None:
        """Echo until the socket's context ends."""
        while True:
            try:
                zmq.proxy(self._socket, self._socket)
            except zmq.ZMQError as error:
                if error.errno == errno.EINTR:
                    continue
                self._socket.close()
                return
