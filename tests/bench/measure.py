"""Time one thing on one kernel, at the client.

The sockets are polled directly: the clients of jupyter_client add a layer of their own to every
message, which would be part of each figure and of its noise.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import zmq

if TYPE_CHECKING:
    from collections.abc import Callable

    from jupyter_client.blocking.client import BlockingKernelClient

POLL_S = 0.5
"""How often a kernel that says nothing is asked whether it is still alive."""


class BenchError(Exception):
    """A measurement could not be taken; the message says why."""


@dataclass
class Exchange:
    """One execute_request and what came back, in seconds after it was sent."""

    msg_id: str
    sent_s: float
    first_output_s: float | None = None
    reply_s: float | None = None
    idle_s: float | None = None
    stdout_bytes: int = 0
    last_text: str = ""
    """The last piece of stdout."""
    reply: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Tell whether both the reply and the idle status are here."""
        return self.reply_s is not None and self.idle_s is not None

    @property
    def has_output(self) -> bool:
        """Tell whether a first piece of output is here."""
        return self.first_output_s is not None

    @property
    def total_s(self) -> float:
        """From sending to whichever of reply and idle came last."""
        return max(self.reply_s or 0.0, self.idle_s or 0.0)


class Probe:
    """A client that sends, listens and looks at the clock."""

    def __init__(
        self, client: BlockingKernelClient, *, alive: Callable[[], bool], patience_s: float
    ) -> None:
        self._client = client
        self._alive = alive
        self._patience_s = patience_s
        self._poller = zmq.Poller()
        for channel in (client.shell_channel, client.iopub_channel, client.control_channel):
            self._poller.register(channel.socket, zmq.POLLIN)

    def greet(self) -> float:
        """Ask for kernel_info and give the time at which the reply came."""
        self._client.kernel_info()
        deadline_s = time.perf_counter() + self._patience_s
        while True:
            for message, at_s in self._receive(deadline_s):
                if message["msg_type"] == "kernel_info_reply":
                    return at_s

    def await_iopub(self) -> None:
        """Ask until a status arrives: a subscription is complete some time after it is made."""
        deadline_s = time.perf_counter() + self._patience_s
        while True:
            msg_id = self._client.kernel_info()
            while True:
                received = list(self._receive(deadline_s, at_most_s=POLL_S))
                if any(_is_idle(message, msg_id) for message, _ in received):
                    return
                if not received:
                    break
            if not self._alive():
                raise BenchError("the kernel died")
            if time.perf_counter() > deadline_s:
                raise BenchError(f"no status on iopub within {self._patience_s:g} s")

    def execute(self, code: str, *, expect: str = "ok") -> Exchange:
        """Run code to its end; raises BenchError unless its reply has the expected status."""
        exchange = self.send(code)
        self.listen(exchange, until=lambda: exchange.finished)
        self.expect(exchange, expect)
        return exchange

    def send(self, code: str) -> Exchange:
        """Send code as a notebook would, and start the clock."""
        sent_s = time.perf_counter()
        return Exchange(self._client.execute(code, allow_stdin=False), sent_s)

    def interrupt(self, exchange: Exchange) -> float:
        """Interrupt running code by message; give the seconds from there to its end."""
        message = self._client.session.msg("interrupt_request", content={})
        sent_s = time.perf_counter()
        self._client.control_channel.send(message)
        self.listen(exchange, until=lambda: exchange.finished)
        return exchange.sent_s + exchange.total_s - sent_s

    def control_info(self) -> float:
        """Ask for kernel_info on the control channel; give the seconds until the reply is here."""
        message = self._client.session.msg("kernel_info_request", content={})
        sent_s = time.perf_counter()
        self._client.control_channel.send(message)
        deadline_s = sent_s + self._patience_s
        while True:
            for answer, at_s in self._receive(deadline_s):
                if answer["parent_header"].get("msg_id") == message["header"]["msg_id"] and (
                    answer["msg_type"] == "kernel_info_reply"
                ):
                    return at_s - sent_s

    def listen(self, exchange: Exchange, *, until: Callable[[], bool]) -> None:
        """Take messages in until the condition holds."""
        deadline_s = time.perf_counter() + self._patience_s
        while not until():
            for message, at_s in self._receive(deadline_s):
                if message["parent_header"].get("msg_id") == exchange.msg_id:
                    _note(exchange, message, at_s - exchange.sent_s)

    def think(self, seconds: float) -> None:
        """Pass time as an idle client does: with its sockets open and read."""
        end_s = time.perf_counter() + seconds
        while (left_s := end_s - time.perf_counter()) > 0:
            self._take(left_s)

    @staticmethod
    def expect(exchange: Exchange, status: str) -> None:
        """Raise BenchError unless the reply has this status."""
        got = exchange.reply.get("status")
        if got != status:
            why = f"{exchange.reply.get('ename', '')} {exchange.reply.get('evalue', '')}".strip()
            raise BenchError(f"a cell ended with {got!r} instead of {status!r}: {why}")

    def _receive(
        self, deadline_s: float, *, at_most_s: float | None = None
    ) -> list[tuple[dict[str, Any], float]]:
        """Wait for messages; an empty list only when `at_most_s` is over."""
        while True:
            messages = self._take(POLL_S if at_most_s is None else at_most_s)
            if messages or at_most_s is not None:
                return messages
            if not self._alive():
                raise BenchError("the kernel died")
            if time.perf_counter() > deadline_s:
                raise BenchError(f"no answer within {self._patience_s:g} s")

    def _take(self, wait_s: float) -> list[tuple[dict[str, Any], float]]:
        messages = []
        for socket, _ in self._poller.poll(math.ceil(wait_s * 1000)):
            _, message = self._client.session.recv(socket, mode=zmq.NOBLOCK)
            if message is not None:
                messages.append((message, time.perf_counter()))
        return messages


def _is_idle(message: dict[str, Any], msg_id: str) -> bool:
    parent, content = message["parent_header"], message["content"]
    return (message["msg_type"], parent.get("msg_id"), content.get("execution_state")) == (
        "status", msg_id, "idle"
    )  # fmt: skip


def _note(exchange: Exchange, message: dict[str, Any], after_s: float) -> None:
    if message["msg_type"] == "execute_reply":
        exchange.reply_s = after_s
        exchange.reply = message["content"]
    elif _is_idle(message, exchange.msg_id):
        exchange.idle_s = after_s
    elif message["msg_type"] == "stream":
        if exchange.first_output_s is None:
            exchange.first_output_s = after_s
        if message["content"]["name"] == "stdout":
            exchange.last_text = message["content"]["text"]
            exchange.stdout_bytes += len(message["content"]["text"].encode())
