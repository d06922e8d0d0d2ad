"""Who holds the committed state: the head, and the one before until the head has proved itself.

Every cell to come is a fork of the head, and a cell may have tampered with the interpreter that
is the head now: so that it does not fork, or its forks get into no container. So the head before
stays until the first fork of the new one is ready.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sandbox_kernel.errors import SessionLost
from sandbox_kernel.session.guest import Guest
from sandbox_kernel.session.pod import Pod
from sandbox_kernel.session.supervisor import RESTART_HINT

HEAD_SPOILT = (
    "The last cell left an interpreter that cannot be gone on from. "
    "Files and variables are as they were before that cell."
)


@dataclass(frozen=True)
class _Head:
    guest: Guest
    layer: int | None
    """What its cell wrote, or where it would have; None where another guest has it."""
    has_files: bool
    """Whether later cells see the layer; else it goes with the head."""


class Heads:
    """The heads of a session; `on_return` is called when the one before is back."""

    def __init__(self, pod: Pod, on_return: Callable[[], None]) -> None:
        self._pod = pod
        self._on_return = on_return
        self._now: _Head | None = None
        self._before: _Head | None = None

    @property
    def current(self) -> Guest:
        """Who holds the committed state; raises SessionLost before there is one."""
        if self._now is None:
            raise SessionLost("the session is not up")
        return self._now.guest

    def become(self, guest: Guest, layer: int | None, *, has_files: bool) -> None:
        """Let a parked guest hold the state from now on; the one that did is kept till `prove`."""
        self.prove()
        self._before, self._now = self._now, _Head(guest, layer, has_files)
        if self._before is not None:
            self._before.guest.on_exit(self._forget_before)
        guest.refuse_frames()
        guest.on_exit(self._died)

    def adopt(self, guest: Guest, empty_layer: int | None) -> None:
        """Let a parked guest hold the state from now on, and let the one that did go at once."""
        self.become(guest, empty_layer, has_files=False)
        self.prove()

    def prove(self) -> None:
        """Take it that the head does what it should, and let the one before go."""
        before, self._before = self._before, None
        if before is not None:
            self._end(before)
            if not before.has_files:
                self._discard(before)

    def go_back(self) -> bool:
        """Return to the head before, and to its files; tell whether there was one."""
        if self._before is None:
            return False
        gone, self._now, self._before = self._now, self._before, None
        self._on_return()
        self._now.guest.on_exit(self._died)
        if gone is not None:
            self._end(gone)
            self._discard(gone)
        return True

    def release(self) -> None:
        """Listen to none of them any more: the session ends."""
        for head in (self._now, self._before):
            if head is not None:
                head.guest.on_exit(lambda: None)

    def _end(self, head: _Head) -> None:
        head.guest.retire()
        self._pod.end_strangers()

    def _discard(self, head: _Head) -> None:
        if head.layer is not None:
            self._pod.discard(head.layer)

    def _forget_before(self) -> None:
        self.prove()

    def _died(self) -> None:
        if not self.go_back():
            lost = SessionLost("the session's head was killed", hint=RESTART_HINT)
            self._pod.supervisor.lose(lost)
