"""sys.stdout and sys.stderr of a guest: unbuffered text on the pipes at fd 1 and 2.

C code and subprocesses write to the same pipes, so everything on one stream is in order by
itself. Between the two streams order is kept by a barrier whenever Python changes from one to the
other. Nothing is buffered here: there is no thread that could flush it later.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, Callable

_current: list[Any] = [None]


class OutputStream(io.TextIOBase):
    """A text stream on a pipe; `barrier` waits until the kernel has read all that was written."""

    encoding = "utf-8"
    errors = "backslashreplace"
    newlines = None
    line_buffering = True

    def __init__(self, fd: int, name: str, barrier: Callable[[], None]) -> None:
        super().__init__()
        self._fd = fd
        self.name = f"<{name}>"
        self.mode = "w"
        self.buffer = io.BufferedWriter(_Pipe(self), buffer_size=1 << 16)
        self._barrier = barrier

    def write(self, text: str) -> int:
        """Write `text` at once."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self.buffer.flush()
        self.write_bytes(text.encode("utf-8", "backslashreplace"))
        return len(text)

    def write_bytes(self, data: bytes) -> None:
        """Write all of `data`, after a barrier if the other stream was the last one in use."""
        if _current[0] is not self:
            if _current[0] is not None:
                self._barrier()
            _current[0] = self
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def flush(self) -> None:
        """Write what is in `buffer`; text is never held back."""
        self.buffer.flush()

    def fileno(self) -> int:
        """Give the pipe's descriptor."""
        return self._fd

    def writable(self) -> bool:
        """Tell that this stream can be written."""
        return True

    def isatty(self) -> bool:
        """Tell that this is no terminal."""
        return False

    def close(self) -> None:
        """Do nothing: a standard stream stays open for the next cell."""


class _Pipe(io.RawIOBase):
    """The raw side of `stream.buffer`."""

    def __init__(self, stream: OutputStream) -> None:
        super().__init__()
        self._stream = stream

    def write(self, data: Any) -> int:
        view = bytes(data)
        self._stream.write_bytes(view)
        return len(view)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()


def mend(ours: dict[str, Any]) -> None:
    """Put back each stream in place of which the cell left something that cannot be written.

    `ours` holds the streams by their name in `sys`. Whoever cannot print sees nothing of it, so
    the user is told. What can be written stays, and is flushed.
    """
    for name, stream in ours.items():
        try:
            found = getattr(sys, name)
            if found is not stream:
                found.write("")
        except BaseException:  # the user's code, and no interrupt: those are held
            setattr(sys, name, stream)
            ours["stderr"].write(f"sys.{name} could not be written any more, and was put back.\n")
        else:
            with contextlib.suppress(BaseException):
                found.flush()


def forget_current() -> None:
    """Say that all pipes are read empty: a message was published, or a new cell begins."""
    _current[0] = None
