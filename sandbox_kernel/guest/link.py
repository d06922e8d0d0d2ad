"""The guest's end of the link to the kernel: frames out, frames and descriptors in.

A KeyboardInterrupt may come at any moment while a cell runs, so no frame is ever half read or
half written: SIGINT is blocked around each system call that moves bytes, and waiting happens in
poll, which keeps no state.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
from collections import deque
from collections.abc import Iterator
from typing import Any

from sandbox_kernel.guest.wire import Decoder, Frame, encode

MAX_FDS = 8


class LinkClosed(Exception):  # noqa: N818 - not an error: the kernel is gone, and so are we
    """The kernel closed the link."""


def hold_interrupts() -> None:
    """Block SIGINT from here on, however many come at this moment."""
    while signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        with contextlib.suppress(KeyboardInterrupt):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold SIGINT back for the time of the block; it is delivered at the block's end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # Within the try: it changes the mask first and raises what was pending after that.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Link:
    """A stream of frames over one connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._owner = os.getpid()
        self.fds: list[int] = []
        self._decoder = Decoder()
        self._frames: deque[Frame] = deque()
        self._acknowledged = 0
        self._sent = 0

    def fileno(self) -> int:
        """Give the socket's descriptor."""
        return self.sock.fileno()

    def send(self, body: dict[str, Any], buffers: tuple[bytes, ...] = ()) -> None:
        """Send one frame; raises WireError beyond the bounds, OSError without a kernel."""
        data = encode(body, buffers)
        with interrupts_held():
            self.sock.sendall(data)

    def publish(self, body: dict[str, Any], buffers: tuple[bytes, ...] = ()) -> None:
        """Send one frame and wait until the kernel has taken it and all output before it.

        This is what keeps the order between the pipes of stdout and stderr and the messages:
        whatever was written to a pipe before the frame is published before it, whatever comes
        after it after. Processes that the cell forked publish nothing.
        """
        if os.getpid() != self._owner:  # a process that the cell forked: the link is not its own
            return
        self._sent += 1
        number = self._sent
        self.send({**body, "sync": number}, buffers)
        while self._acknowledged < number:
            self._wait()
            self._read()

    def receive(self) -> Frame:
        """Wait for the next frame that is no acknowledgement; raises LinkClosed."""
        while not self._frames:
            self._wait()
            self._read()
        return self._frames.popleft()

    def poll_frame(self) -> bool:
        """Tell whether a frame can be received without waiting, after reading what is there."""
        if not self._frames and select.select([self.sock], [], [], 0)[0]:
            self._read()
        return bool(self._frames)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.poll()

    def _read(self) -> None:
        with interrupts_held():
            data, ancillary, _, _ = self.sock.recvmsg(
                1 << 20, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                raise LinkClosed
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    received = array.array("i")
                    received.frombytes(raw[: len(raw) - len(raw) % received.itemsize])
                    self.fds.extend(received)
            for frame in self._decoder.feed(data):
                if frame.op == "ack":
                    self._acknowledged = max(self._acknowledged, int(frame.body["sync"]))
                else:
                    self._frames.append(frame)
