"""The seam between the kernel and a session, and the holder of the current session.

`Engine` says what the kernel asks of a session; `session.Session` and the tests' fake keep it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from sandbox_kernel.errors import HostError, LaunchError, SandboxError, SessionLost

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sandbox_kernel.model import (
        CellResult,
        CommMessage,
        Event,
        Execution,
        Json,
        Limits,
        SessionSpec,
        Usage,
    )

    Sink = Callable[[Event], None]


class Engine(Protocol):
    """One session, as the kernel sees it; everything but `begin` and `kill` runs in its loop."""

    @property
    def comms(self) -> Mapping[str, str]:
        """The comms of the committed state: id to target name."""
        ...

    def begin(self) -> None:
        """Start init and the guest, and return at once."""
        ...

    async def ready(self) -> None:
        """Wait until the session has come up; raises SandboxError if it never will."""
        ...

    async def execute(self, execution: Execution, limits: Limits, sink: Sink) -> CellResult:
        """Run one cell in a fresh container; every event has been given when it returns."""
        ...

    async def ask(self, msg_type: str, content: Json) -> Json:
        """Answer a question from a throw-away fork of the head."""
        ...

    async def comm(self, message: CommMessage, sink: Sink) -> CellResult:
        """Hand a comm message to the guest; its state is kept if the handler succeeds."""
        ...

    def interrupt(self) -> None:
        """Interrupt what runs, and kill it after the grace."""
        ...

    def answer(self, value: str) -> None:
        """Answer the last `InputRequest`."""
        ...

    def usage(self) -> Usage:
        """Give what the session used so far; memory is what it holds now."""
        ...

    async def close(self) -> None:
        """End every process and remove every trace; may be called twice."""
        ...

    def kill(self) -> None:
        """Do the same at once, without a loop; may be called twice."""
        ...


class SessionHolder:
    """Own the current session: open one when there is none, drop one that is lost.

    `read_spec` gives a new spec (with a new id) for every session, `open_session` a session
    that has begun; both raise SandboxError, which leaves the holder empty.
    """

    def __init__(
        self,
        read_spec: Callable[[], SessionSpec],
        open_session: Callable[[SessionSpec], Engine],
    ) -> None:
        self._read_spec = read_spec
        self._open_session = open_session
        self._spec: SessionSpec | None = None
        self._session: Engine | None = None
        self._proven = False
        self._closed = False
        self._wall_s = 0.0
        self._output_bytes = 0

    @property
    def session(self) -> Engine | None:
        """The current session, if there is one."""
        return self._session

    @property
    def spec(self) -> SessionSpec:
        """What the current session was made of, or the next will be; raises SandboxError."""
        if self._spec is None:
            self._spec = self._read_spec()
        return self._spec

    def adopt(self, spec: SessionSpec, session: Engine) -> None:
        """Take a session that was begun elsewhere."""
        self._spec = spec
        self._take(session)

    def acquire(self) -> Engine:
        """Give the current session, a new one where there is none; raises SandboxError."""
        if self._closed:
            raise SessionLost("the kernel is shutting down", hint="start a new kernel")
        return self._session or self._take(self._open_session(self.spec))

    def _take(self, session: Engine) -> Engine:
        self._session, self._proven = session, False
        self._wall_s, self._output_bytes = 0.0, 0
        return session

    def record(self, result: CellResult) -> None:
        """Note that the current session ran a cell: it holds state worth keeping from now on."""
        self._proven = True
        self._wall_s += result.usage.wall_s
        self._output_bytes += result.usage.output_bytes

    def usage(self) -> Usage | None:
        """Give what the current session used so far, all its cells together."""
        if self._session is None:
            return None
        used = self._session.usage()
        return replace(used, wall_s=self._wall_s, output_bytes=self._output_bytes)

    def fail(self, error: SandboxError) -> str:
        """Drop the session if it can be of no use; give the sentence that says what is left."""
        if self._closed or self._session is None:
            return ""
        if isinstance(error, SessionLost):
            had_state = self._proven
            self._drop()
            lost = "the variables are lost, " if had_state else ""
            return f"{lost}the next cell starts a new session"
        if isinstance(error, HostError | LaunchError):
            if self._proven:
                # One container could not be built, but the head and its variables are there.
                return "the session is as it was before this cell"
            self._drop()
            return "the next cell tries again"
        return ""

    async def close(self) -> None:
        """End the current session for good; may be called twice."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            try:
                await session.close()
            finally:
                session.kill()

    def kill(self) -> None:
        """End the current session for good, at once."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        session, self._session, self._spec = self._session, None, None
        if session is not None:
            session.kill()
