"""The client that started this process, and the news of its death.

Clients name themselves in JPY_PARENT_PID. A pidfd of that process tells of its end at once, also
where a wrapper script stands between the two; it must be opened early, before the client can
have died and its number can have gone to another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

POLL_EVERY_S = 0.5


class ParentWatch:
    """Watch the client, from construction on; `attach` says whom to tell."""

    def __init__(self, client_pid: int) -> None:
        self._client_pid = client_pid
        self._client_fd = _open_ancestor(client_pid) if client_pid > 1 else None
        self._parent_pid = os.getppid()

    @classmethod
    def of_environment(cls) -> ParentWatch:
        """Watch the client that the environment names; none if it names none."""
        text = os.environ.get("JPY_PARENT_PID", "")
        return cls(int(text) if text.isdigit() else 0)

    def attach(self, loop: asyncio.AbstractEventLoop, gone: Callable[[], None]) -> None:
        """Call `gone` in the loop when the client is dead, also if it died before."""
        if self._client_pid <= 1:
            return
        if self._client_fd is not None:
            loop.add_reader(self._client_fd, gone)
        else:
            self._poll(loop, gone)

    def _poll(self, loop: asyncio.AbstractEventLoop, gone: Callable[[], None]) -> None:
        # The number means nothing here: the client is dead, or in another PID namespace. Then
        # the end of our own parent is all that can be seen of it.
        if os.getppid() != self._parent_pid or self._parent_pid == 1:
            gone()
            return
        loop.call_later(POLL_EVERY_S, self._poll, loop, gone)


def _open_ancestor(pid: int) -> int | None:
    """Give a pidfd of a process if it is an ancestor of this one."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    # Asked after the open: while it is an ancestor, its number is its own.
    if pid in _ancestors():
        return fd
    os.close(fd)
    return None


def _ancestors() -> set[int]:
    found: set[int] = set()
    pid = os.getppid()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            break
        # The name in brackets may hold anything; the parent is the second field after it.
        pid = int(stat.rpartition(")")[2].split()[1])
    return found
