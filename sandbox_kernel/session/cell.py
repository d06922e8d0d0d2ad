"""One execution in one container: pass its events on, hold its limits, note how it ended.

What follows from that is decided in `verdict`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from sandbox_kernel.errors import (
    GuestGone,
    HostError,
    ProtocolError,
    SandboxError,
    SessionLost,
)
from sandbox_kernel.guest.wire import Frame
from sandbox_kernel.linux.cgroup import Cgroup, CgroupUsage
from sandbox_kernel.model import (
    CommMessage,
    Event,
    Execution,
    InputRequest,
    Json,
    Limits,
    Message,
    Outcome,
)
from sandbox_kernel.session.guest import Guest
from sandbox_kernel.session.hints import Hints
from sandbox_kernel.session.said import PUBLISHABLE, Done, check_content, size_of
from sandbox_kernel.session.supervisor import RESTART_HINT
from sandbox_kernel.session.verdict import CUT, Seen, Verdict, judge

PROMPT_CHARACTERS = 65_536
CPU_CHECK_FLOOR_S = 0.02
STATUS_WAIT_S = 0.5
LOOK_S = 0.2
"""How often a running cell is looked at; that costs 0.1 ms."""


def execute_body(execution: Execution, limits: Limits) -> Json:
    """Give the frame that asks a guest to run a cell."""
    return {
        "op": "execute",
        "code": execution.code,
        "silent": execution.silent,
        "store_history": execution.store_history,
        "user_expressions": execution.user_expressions,
        "allow_stdin": execution.allow_stdin,
        "execution_count": execution.execution_count,
        "cell_id": execution.cell_id,
        "parent": execution.parent,
        "open_files": limits.open_files,
    }


def comm_body(message: CommMessage, limits: Limits) -> Json:
    """Give the frame that asks a guest to handle a comm message."""
    return {
        "op": "comm",
        "msg_type": message.msg_type,
        "content": message.content,
        "metadata": message.metadata,
        "parent": message.parent,
        "open_files": limits.open_files,
    }


class Cell:
    """The run of one request in a guest that sits in its container."""

    def __init__(
        self,
        guest: Guest,
        cgroup: Cgroup,
        hints: Hints,
        *,
        grace_s: float,
        sink: Callable[[Event], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._guest = guest
        self._cgroup = cgroup
        self._limits = hints.limits
        self._grace_s = grace_s
        self._sink = sink
        self.hints = hints
        self._failed: CgroupUsage | None = None
        """As the cgroup counted when the cell failed."""
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._done: Done | None = None
        self._stopping: Outcome | None = None
        self._traceback: tuple[str, ...] = ()
        self._failure: ProtocolError | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._cpu_before_s = 0.0
        self.wall_s = 0.0
        self.counted: CgroupUsage | None = None
        """What the cgroup had counted when the cell ended."""

    async def run(self, body: Json, buffers: tuple[bytes, ...] = ()) -> Verdict:
        """Send the request and see it through to its end; nothing of the cell is killed here."""
        guest, started_s = self._guest, time.monotonic()
        self._cpu_before_s = self._cgroup.usage().cpu_s
        guest.output.start(self._sink, self._limits.output_bytes)
        guest.link.handler = self._frame
        guest.on_exit(self._exited)
        try:
            self._after(self._limits.wall_time_s, lambda: self.stop(Outcome.WALL_TIME))
            self._after(self._cpu_check_s(self._limits.cpu_time_s), self._check_cpu)
            self._after(LOOK_S, self._check_memory)
            guest.link.send(body, buffers=buffers)
            await self._ended
        finally:
            for timer in self._timers:
                timer.cancel()
            guest.link.handler = None
            self.wall_s = time.monotonic() - started_s
        if self._done is None:
            await self._await_status()
        return self._judge()

    def stop(self, reason: Outcome) -> None:
        """Interrupt the cell; if it does not stop within the grace, kill it."""
        if self._ended.done():
            return
        if self._stopping is None:
            self._stopping = reason
            # A signal can fall between CPython's last look and a system call that blocks.
            self._after(self._grace_s / 2, self._interrupt_again)
            self._after(self._grace_s, self._kill)
        self._guest.interrupt()

    def _interrupt_again(self) -> None:
        if not self._ended.done():
            self._guest.interrupt()

    def fail(self, failure: SandboxError) -> None:
        """End at once, by `failure`: the session is going down."""
        if not self._ended.done():
            self._ended.set_exception(failure)

    def _kill(self) -> None:
        try:
            self._counters()  # or the kill would meet nobody, and be waited for
            self._cgroup.kill()
        except SandboxError as error:
            self.fail(error)

    def _counters(self) -> CgroupUsage:
        """Read what the cgroup has counted; raises SessionLost where that is not of this cell.

        Where processes were moved to, no limit and no kill of ours reaches them: they must end
        with their PID namespace.
        """
        if self._cgroup.holds(self._guest.pid) or self._guest.is_ending():
            try:
                return self._cgroup.usage()
            except HostError:
                if self._cgroup.exists():
                    raise
        raise SessionLost(
            f"somebody took the cell out of its cgroup {self._cgroup.paths[0]} and its limits",
            hint=f"see what moves processes between cgroups here; {RESTART_HINT}",
        )

    def _after(self, delay_s: float, act: Callable[[], None]) -> None:
        self._timers.append(self._loop.call_later(delay_s, act))

    def _check_cpu(self) -> None:
        try:
            left_s = self._limits.cpu_time_s - (self._counters().cpu_s - self._cpu_before_s)
        except SandboxError as error:
            self.fail(error)
            return
        if left_s <= 0:
            self.stop(Outcome.CPU_TIME)
        else:
            self._after(self._cpu_check_s(left_s), self._check_cpu)

    def _check_memory(self) -> None:
        """End the cell when a process of it was killed for memory: the others may wait for ever.

        v2 kills the group as a whole; v1 has no event for a kill, only one before it.
        """
        try:
            if self._counters().oom_kills > 0:
                self._kill()
        except SandboxError as error:
            self.fail(error)
        else:
            self._after(LOOK_S, self._check_memory)

    def _cpu_check_s(self, left_s: float) -> float:
        """Tell when the rest can be used up at the earliest, on all CPUs of the cell at once."""
        return max(left_s / max(self._limits.cpus, 1.0), CPU_CHECK_FLOOR_S)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _exited(self) -> None:
        self._guest.link.read()  # its last words may still be in the socket
        failure = self._guest.link.failure
        if isinstance(failure, ProtocolError) and not isinstance(failure, GuestGone):
            self._failure = self._failure or failure
        self._end()

    async def _await_status(self) -> None:
        """Give the guest's parent, who alone learns the status, a moment to report it."""
        self._guest.output.drain()
        if self._failure is not None or self._guest.status.done():
            return
        await asyncio.wait([self._guest.status], timeout=STATUS_WAIT_S)

    def _frame(self, frame: Frame) -> None:
        """Handle what a hostile guest says; raises ProtocolError, which ends it."""
        if self._ended.done():
            return
        handlers = {
            "message": self._message,
            "sync": self._sync,
            "input": self._input,
            "done": self._finish,
        }
        try:
            handler = handlers.get(frame.op)
            if handler is None:
                raise ProtocolError(f"a cell said {frame.op[:40]!r}, which is no verb of a cell")
            self._guest.output.drain()
            handler(frame)
        except ProtocolError as error:
            self._failure = error
            self._end()
            raise

    def _acknowledge(self, frame: Frame) -> None:
        number = frame.body.get("sync")
        if type(number) is not int:
            raise ProtocolError("a cell sent a message without its number")
        self._guest.link.acknowledge(number)

    def _sync(self, frame: Frame) -> None:
        self._acknowledge(frame)

    def _message(self, frame: Frame) -> None:
        body = frame.body
        kind, content, metadata = body.get("msg_type"), body.get("content"), body.get("metadata")
        if kind not in PUBLISHABLE:
            raise ProtocolError(f"a cell may not publish {str(kind)[:40]!r}")
        if not isinstance(content, dict) or not isinstance(metadata, dict):
            raise ProtocolError(f"a cell sent a {kind} whose content is no object")
        check_content(str(kind), content)
        if kind == "error" and self._stopping in CUT:
            self._traceback = tuple(str(line) for line in content["traceback"])
        else:
            if kind == "error":
                self._hint(content)
            message = Message(str(kind), content, metadata, frame.buffers)
            size = size_of(content) + sum(map(len, frame.buffers))
            self._guest.output.admit(message, size)
        self._acknowledge(frame)

    def _hint(self, error: Json) -> None:
        """Put what a limit has refused below an error, the same in the message and in the reply."""
        if self._failed is None:
            with contextlib.suppress(SandboxError):  # what is wrong is told at the end
                self._failed = self._counters()
        if self._failed is not None:
            self.hints.add_to(error, self._failed)

    def _input(self, frame: Frame) -> None:
        prompt, password = frame.body.get("prompt"), frame.body.get("password")
        if not isinstance(prompt, str) or not isinstance(password, bool):
            raise ProtocolError("a cell sent an input request without a prompt")
        self._sink(InputRequest(prompt[:PROMPT_CHARACTERS], password))
        self._acknowledge(frame)

    def _finish(self, frame: Frame) -> None:
        self._done = Done.read(frame.body)
        if self._done.reply["status"] == "error":
            self._hint(self._done.reply)
        self._end()

    def _judge(self) -> Verdict:
        self.counted = self._counters()
        status = self._guest.status.result() if self._guest.status.done() else None
        refusal = None
        if self._done is None:
            refusal = self.hints.cause_of_death(self.counted, status)
        return judge(
            Seen(
                oom_kills=self.counted.oom_kills,
                stopping=self._stopping,
                failure=self._failure,
                done=self._done,
                status=status,
                refusal=refusal,
                traceback=self._traceback,
            )
        )
