"""The kernel's end of the control channel: ask init, wait for its answers, learn of its death."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from sandbox_kernel.container import control
from sandbox_kernel.errors import LaunchError, SandboxError, SessionLost


class Supervisor:
    """Init, as the kernel speaks with it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(False)
        self._waiting: dict[tuple[str, int], asyncio.Future[dict[str, Any]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_lost: Callable[[], None] = lambda: None
        self._started = False
        self.failure: SandboxError | None = None
        self.reaped: dict[int, Callable[[int, int], None]] = {}
        """pid in the session -> who wants to know its si_code and si_status."""

    def attach(self, on_lost: Callable[[], None]) -> None:
        """Begin to read, in the running loop; `on_lost` is called once when init is gone."""
        self._loop = asyncio.get_running_loop()
        self._on_lost = on_lost
        self._loop.add_reader(self._sock.fileno(), self._read)

    def close(self) -> None:
        """Close the channel, which ends init and with it every process of the session."""
        if self._sock.fileno() >= 0:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        self._fail(SessionLost("the session was closed"))

    def send(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Send one message; raises SessionLost when init is gone."""
        try:
            control.send(self._sock, body, fds)
        except OSError as error:
            raise self.failure or SessionLost("the session's init is gone") from error

    async def ask(self, body: dict[str, Any], answer: str, *, key: int = 0) -> dict[str, Any]:
        """Send one message and give the answer of the verb `answer` for `key`, a layer or 0."""
        waiting = self.expect(answer, key=key)
        self.send(body)
        return await waiting

    def expect(self, answer: str, *, key: int = 0) -> asyncio.Future[dict[str, Any]]:
        """Give a future of the next message with that verb."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        # Whoever asked may be cancelled before the answer: its failure is no news then.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self.failure is not None:
            future.set_exception(self.failure)
        else:
            self._waiting[answer, key] = future
        return future

    def _read(self) -> None:
        while self.failure is None:
            try:
                packet = control.receive(self._sock)
            except BlockingIOError:
                return
            except ValueError as error:
                self.lose(SessionLost(f"init sent nonsense: {error}"))
                return
            if packet is None:
                self.lose(SessionLost("the session's init was killed", hint=RESTART_HINT))
                return
            packet.close()
            self._handle(packet)

    def _handle(self, packet: control.Packet) -> None:
        body = packet.body
        if packet.op == "failed":
            step, cause, hint = (str(body.get(name, "")) for name in ("step", "cause", "hint"))
            if self._started:  # what lived in there is gone with init
                self.lose(SessionLost(f"{step}: {cause}", hint="; ".join([hint, RESTART_HINT])))
            else:
                self.lose(LaunchError(step, cause, hint=hint))
        elif packet.op == "reaped":
            on_reaped = self.reaped.pop(int(body["pid"]), None)
            if on_reaped is not None:
                on_reaped(int(body["code"]), int(body["status"]))
        else:
            self._started = self._started or packet.op == "started"
            waiting = self._waiting.pop((packet.op, int(body.get("layer", 0))), None)
            if waiting is not None and not waiting.done():
                waiting.set_result(body)

    def lose(self, failure: SandboxError) -> None:
        """Take it that init is of no use any more; tells whoever waits, and the owner once."""
        if self._loop is not None and self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
        if self.failure is None:
            self._fail(failure)
            self._on_lost()

    def _fail(self, failure: SandboxError) -> None:
        self.failure = self.failure or failure
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(self.failure)
        self._waiting.clear()


RESTART_HINT = "its variables are gone; the next cell starts a new session"
