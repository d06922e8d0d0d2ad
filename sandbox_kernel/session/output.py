"""What a cell writes: the two pipes, split characters, and the limit on it all."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import fcntl
import os
from collections.abc import Callable

from sandbox_kernel.linux import libc
from sandbox_kernel.model import Event, Message, Stream
from sandbox_kernel.units import format_size

PIPE_BYTES = 1 << 20
ERROR_BYTES = 1 << 20
"""A traceback of this size is shown even after the limit: it says why the cell ended."""
_READ_BYTES = 1 << 20


class Output:
    """The kernel's ends of a guest's stdout and stderr; what comes in goes to `sink`.

    After `limit_bytes` one marker line, and the rest is read and dropped: a pipe that nobody
    reads would stop the cell, and one that is closed would kill it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ends: dict[int, tuple[str, codecs.IncrementalDecoder]] = {}
        self._write_ends: list[int] = []
        for name in ("stdout", "stderr"):
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(read_end, False)
            with contextlib.suppress(PermissionError):  # over pipe-user-pages-soft: 64 KiB will do
                fcntl.fcntl(read_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            self._ends[read_end] = (name, decoder)
            self._write_ends.append(write_end)
        self._sink: Callable[[Event], None] | None = None
        self._limit_bytes = 0
        self.bytes_seen = 0

    @property
    def write_ends(self) -> tuple[int, ...]:
        """The guest's ends, to be sent to it and then closed."""
        return tuple(self._write_ends)

    def close_write_ends(self) -> None:
        """Close the guest's ends on this side."""
        while self._write_ends:
            os.close(self._write_ends.pop())

    def close(self) -> None:
        """Close everything; a process that still writes gets EPIPE."""
        self.stop()
        self.close_write_ends()
        for fd in self._ends:
            os.close(fd)
        self._ends = {}

    def start(self, sink: Callable[[Event], None], limit_bytes: int) -> None:
        """Begin to pass on what comes in."""
        self._sink = sink
        self._limit_bytes = limit_bytes
        self.bytes_seen = 0
        for fd in self._ends:
            self._loop.add_reader(fd, self._read, fd)

    def stop(self) -> None:
        """End the cell's output: what is half a character becomes a replacement character."""
        for fd, (name, decoder) in self._ends.items():
            self._loop.remove_reader(fd)
            rest = decoder.decode(b"", final=True)
            if rest and self._sink is not None:
                self._emit(name, rest, 0)
        self._sink = None

    def drain(self) -> None:
        """Pass on what is in the pipes now, and no more than that: the other end may go on."""
        for fd in self._ends:
            pending = libc.fionread(fd)
            while pending > 0:
                taken = self._read(fd, min(pending, _READ_BYTES))
                if taken == 0:
                    break
                pending -= taken

    def admit(self, message: Message, size_bytes: int) -> None:
        """Pass a message on if the limit leaves room for it; an error of moderate size always."""
        if message.msg_type == "error" and size_bytes <= ERROR_BYTES and self._sink is not None:
            self._sink(message)
        else:
            self._count(size_bytes, message)

    def _read(self, fd: int, size: int = _READ_BYTES) -> int:
        try:
            data = os.read(fd, size)
        except BlockingIOError:
            return 0
        if not data:
            self._loop.remove_reader(fd)  # all writers are gone
            return 0
        name, decoder = self._ends[fd]
        if self.bytes_seen > self._limit_bytes:
            self.bytes_seen += len(data)
            return len(data)
        room = self._limit_bytes - self.bytes_seen
        self._emit(name, decoder.decode(data[:room]), len(data))
        return len(data)

    def _emit(self, name: str, text: str, size_bytes: int) -> None:
        if text and self._sink is not None:
            self._sink(Stream(name, text))
        self._count(size_bytes, None)

    def _count(self, size_bytes: int, message: Message | None) -> None:
        was_open = self.bytes_seen <= self._limit_bytes
        self.bytes_seen += size_bytes
        if self._sink is None:
            return
        if self.bytes_seen <= self._limit_bytes:
            if message is not None:
                self._sink(message)
        elif was_open:
            self._sink(Stream("stderr", self._marker()))

    def _marker(self) -> str:
        limit = format_size(self._limit_bytes)
        return f"\n[output limit of {limit} reached: the rest of this cell's output is dropped]\n"
