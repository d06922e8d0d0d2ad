"""The kernel's end of a guest's link: frames in and out, and the life of the guest's process.

Everything that comes in is hostile: the decoder bounds it, and whoever handles a frame checks its
fields. A frame that breaks the protocol ends the guest.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from sandbox_kernel.errors import GuestGone, LaunchError, ProtocolError
from sandbox_kernel.guest.wire import Decoder, Frame, WireError, encode

_CREDENTIALS = struct.Struct("3i")
_READ_BYTES = 1 << 20
_READS_PER_TURN = 8
"""How many reads one guest gets before the loop looks at others: a flood must not starve them."""
_CAUSE_CHARACTERS = 500
MAX_UNREAD = 4
"""Frames that nobody has asked for yet; a guest speaks when asked."""
MAX_UNSENT = 4096
"""Frames for a guest that does not read; it waits for each acknowledgement, in every thread."""


class GuestLink:
    """One guest process: its socket, its pid, and who gets its frames."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock = sock
        self._decoder = Decoder()
        self._inbox: deque[Frame] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._outbox: deque[memoryview] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self.read)
        self.handler: Callable[[Frame], None] | None = None
        self.on_child_exit: Callable[[Frame], None] = lambda _: None
        """Who hears how a fork of this guest ended, which only its parent learns."""
        self.on_closed: Callable[[], None] = lambda: None
        self.failure: Exception | None = None
        self.pid = 0
        self.pidfd = -1

    def close(self) -> None:
        """Close the socket and the pidfd; the guest ends by itself when it reads."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
        if self.pidfd >= 0:
            self._loop.remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        self._fail(GuestGone("the guest's link was closed"))

    def kill(self) -> None:
        """Send SIGKILL to the guest's process alone."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def send(
        self, body: dict[str, Any], fds: tuple[int, ...] = (), buffers: tuple[bytes, ...] = ()
    ) -> None:
        """Queue one frame; descriptors go with its first byte. A guest that is gone is no error."""
        data = memoryview(encode(body, buffers))
        if fds:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            with contextlib.suppress(OSError):
                # Frames with descriptors are short, and sent to guests that wait for them.
                data = data[self._sock.sendmsg([data], ancillary) :]
        if data:
            self._outbox.append(data)
            self._flush()

    def acknowledge(self, number: int) -> None:
        """Tell the guest that a frame is taken; raises ProtocolError if it never reads that."""
        if len(self._outbox) > MAX_UNSENT:
            raise ProtocolError("a guest sends and sends, and reads nothing")
        self.send({"op": "ack", "sync": number})

    def _flush(self) -> None:
        if self._sock.fileno() < 0:
            return
        while self._outbox:
            try:
                sent = self._sock.send(self._outbox[0])
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError:
                self._outbox.clear()
                break
            rest = self._outbox.popleft()[sent:]
            if rest:
                self._outbox.appendleft(rest)
        self._loop.remove_writer(self._sock.fileno())

    async def expect(self, op: str, *, timeout_s: float) -> Frame:
        """Wait for the next frame, which must be `op`; raises ProtocolError."""
        deadline_s = self._loop.time() + timeout_s
        while not self._inbox:
            if self.failure is not None:
                raise self.failure
            self._waiter = self._loop.create_future()
            try:
                await asyncio.wait_for(self._waiter, deadline_s - self._loop.time())
            except TimeoutError:
                raise ProtocolError(f"a guest gave no {op!r} within {timeout_s:g} s") from None
            finally:
                self._waiter = None
        frame = self._inbox.popleft()
        if frame.op == "unable":
            cause = str(frame.body.get("cause"))[:_CAUSE_CHARACTERS]
            raise LaunchError("start the guest", cause)
        if frame.op != op:
            raise ProtocolError(f"a guest said {frame.op[:40]!r} where {op!r} was due")
        return frame

    def read(self) -> None:
        """Take what is there now; frames go to the handler, or wait for `expect`."""
        if self.failure is not None:
            return
        for _ in range(_READS_PER_TURN):
            try:
                data, ancillary, _, _ = self._sock.recvmsg(
                    _READ_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                data, ancillary = b"", []
            sender = _sender(ancillary)
            self.pid = self.pid or sender
            if data and sender != self.pid:
                self.kill()
                self._end(ProtocolError("another process spoke on the link of a guest"))
                return
            if not data:
                self._end(GuestGone("the guest is gone"))
                return
            if not self._feed(data):
                return

    def _feed(self, data: bytes) -> bool:
        try:
            for frame in self._decoder.feed(data):
                if frame.op == "warmed":  # nobody waits for it, and it may come at any time
                    continue
                if frame.op == "exited":
                    self.on_child_exit(frame)
                elif self.handler is not None:
                    self.handler(frame)
                elif len(self._inbox) < MAX_UNREAD:
                    self._inbox.append(frame)
                else:
                    raise ProtocolError("a guest speaks though nobody asked")
        except (WireError, ProtocolError) as error:
            failure = error if isinstance(error, ProtocolError) else ProtocolError(str(error))
            self.kill()
            self._inbox.clear()  # nor does anything count that it said before
            self._end(failure)
            return False
        self._wake()
        return True

    def open_pidfd(self, on_exit: Callable[[], None]) -> None:
        """Hold on to the process behind `pid`; `on_exit` is called when it has ended."""
        self.pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self.pidfd, self._exited, on_exit)

    def _exited(self, on_exit: Callable[[], None]) -> None:
        self._loop.remove_reader(self.pidfd)
        on_exit()

    def _end(self, failure: Exception) -> None:
        """Read no more, once; what is in the inbox can still be taken."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
        if self.failure is None:
            self._fail(failure)
            self.on_closed()

    def _fail(self, failure: Exception) -> None:
        self.failure = self.failure or failure
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int:
    """Give the pid of who sends, which Linux fills in as this process sees it (unix(7))."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return int(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0])
    return 0
