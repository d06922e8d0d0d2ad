"""A guest's process as the session holds it: link, output, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from sandbox_kernel.errors import ProtocolError
from sandbox_kernel.guest.wire import Frame
from sandbox_kernel.session.link import GuestLink
from sandbox_kernel.session.output import Output

PF_EXITING = 0x4
"""A flag of a process (linux/sched.h)."""
ExitStatus = tuple[int, int]
"""(si_code, si_status) as waitid(2) gives them."""


class Guest:
    """One interpreter: the head, or a child in its container."""

    def __init__(self, sock: socket.socket) -> None:
        self.link = GuestLink(sock)
        self.output = Output()
        self.status: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        self.closed = False
        self.pid_inside = 0
        """The process as init sees it, once `identify` was called."""
        self._on_exit: Callable[[], None] = lambda: None

    @property
    def pid(self) -> int:
        """The process as this side sees it; 0 before it has said anything."""
        return self.link.pid

    def identify(self) -> None:
        """Hold on to the process that has just spoken, and learn its pid inside of the session.

        Raises ProtocolError when it is gone already.
        """
        try:
            self.link.open_pidfd(self._exited)
            # The last of NSpid is the pid in the innermost PID namespace.
            self.pid_inside = int(status_of(self.pid)["NSpid"][-1])
        except (OSError, LookupError) as error:
            raise ProtocolError(f"a guest was gone before it could be held: {error}") from error

    def on_exit(self, act: Callable[[], None]) -> None:
        """Call `act` when the process has ended or closed its link."""
        self._on_exit = act
        self.link.on_closed = act

    def _exited(self) -> None:
        self._on_exit()

    @property
    def is_head(self) -> bool:
        """Tell whether it holds the committed state."""
        return self.link.handler is _refuse

    def is_ending(self) -> bool:
        """Tell whether the process has ended, or runs nothing any more and only frees its memory.

        It is in no cgroup's list then, and its pidfd may not say so yet.
        """
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return True
        # The command's name, in brackets, may hold anything; flags are field 9 (proc_pid_stat(5)).
        return bool(int(text.rpartition(")")[2].split()[6]) & PF_EXITING)

    def refuse_frames(self) -> None:
        """Take any frame from now on as a breach of the protocol: a head speaks when asked."""
        self.link.handler = _refuse

    def set_status(self, code: int, status: int) -> None:
        """Note the exit status that the parent has reported."""
        if not self.status.done():
            self.status.set_result((code, status))

    def interrupt(self) -> None:
        """Send SIGINT to the cell's process group, as a terminal would."""
        # The leader is held by a pidfd that has not signalled its end, so the id is not reused.
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(self.pid, signal.SIGINT)
            except ProcessLookupError:  # it has left its group
                signal.pidfd_send_signal(self.link.pidfd, signal.SIGINT)

    def retire(self) -> None:
        """Kill the process, which nobody needs any more, and let go of it."""
        self.on_exit(lambda: None)
        self.link.handler = None
        self.link.kill()
        self.close()

    def close(self) -> None:
        """Let go of everything on this side; the process itself is not touched."""
        self.closed = True
        self.link.close()
        self.output.close()


def _refuse(frame: Frame) -> None:
    raise ProtocolError(f"a head said {frame.op[:40]!r} though nobody asked")


def status_of(pid: int) -> dict[str, list[str]]:
    """Give the fields of /proc/PID/status, each split at blanks (proc(5)); raises OSError."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    lines = (line.partition(":") for line in text.splitlines())
    return {name: rest.split() for name, _, rest in lines}
