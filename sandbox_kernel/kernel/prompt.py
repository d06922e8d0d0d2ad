"""`input()` of a cell: one question on the stdin channel, answered without blocking the loop.

The zmq socket belongs to the main thread. Its file descriptor is edge-triggered: whoever
touches the socket must look at EVENTS afterwards, or a reply that came meanwhile is missed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import zmq

from sandbox_kernel.kernel.publish import encodable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from jupyter_client.session import Session

    from sandbox_kernel.model import InputRequest, Json

_log = logging.getLogger(__name__)


class Prompter:
    """Ask the client of one execution; give each reply to `answer`."""

    def __init__(
        self,
        socket: Any,
        session: Session,
        loop: asyncio.AbstractEventLoop,
        answer: Callable[[str], None],
    ) -> None:
        self._socket = socket
        self._session = session
        self._loop = loop
        self._answer = answer
        self._waiting = False

    def ask(self, request: InputRequest, *, parent: Json, ident: Any) -> None:
        """Send the question to the client that sent `parent`; a new one replaces the last."""
        self._forget_stale()
        content = encodable({"prompt": request.prompt, "password": request.password})
        self._session.send(self._socket, "input_request", content, parent, ident=ident)
        if not self._waiting:
            self._waiting = True
            self._loop.add_reader(self._socket.fileno(), self._read)
        self._loop.call_soon(self._read)

    def close(self) -> None:
        """Wait no longer; a reply that comes later is thrown away by the next question."""
        if self._waiting:
            self._waiting = False
            self._loop.remove_reader(self._socket.fileno())

    def _forget_stale(self) -> None:
        while self._has_message():
            self._socket.recv_multipart(zmq.NOBLOCK)

    def _has_message(self) -> bool:
        return bool(self._socket.get(zmq.EVENTS) & zmq.POLLIN)

    def _read(self) -> None:
        while self._waiting and self._has_message():
            try:
                _, reply = self._session.recv(self._socket, zmq.NOBLOCK)
            except ValueError as error:  # a bad signature or no message at all
                _log.warning("dropped a bad message on the stdin channel: %s", error)
                continue
            if reply is None:
                return
            self.close()
            value = reply["content"].get("value", "")
            self._answer(value if isinstance(value, str) else "")
