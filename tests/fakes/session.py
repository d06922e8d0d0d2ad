"""A session without containers: a cell is a script of small verbs, one a line.

It keeps the contract of `kernel.engine.Engine`, so the kernel can be driven over real sockets
in a fraction of a second. Run as a program it serves a connection file:
`python -m tests.fakes.session -f connection.json`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sandbox_kernel.errors import HostError, LaunchError, SandboxError, SessionLost
from sandbox_kernel.model import (
    CellResult,
    CommMessage,
    Execution,
    Image,
    InputRequest,
    Json,
    Limits,
    Message,
    Outcome,
    SessionSpec,
    Stream,
    Usage,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandbox_kernel.model import Event

    Sink = Callable[[Event], None]

CEILING = Limits(
    memory_bytes=1 << 30,
    cpus=2.0,
    cpu_time_s=300.0,
    wall_time_s=300.0,
    processes=128,
    disk_bytes=512 << 20,
    output_bytes=10 << 20,
    open_files=1024,
)
SPEC = SessionSpec(
    session_id="fake",
    image=Image(reference="host", binds=()),
    workspace="",
    workspace_mode="none",
    limits=CEILING,
    ceiling=CEILING,
)
DEFAULT_USAGE = Usage(
    wall_s=0.5, cpu_s=0.25, peak_memory_bytes=1 << 30, peak_processes=2, output_bytes=7
)


class _Killed(Exception):
    """The script ends here, with an outcome that rolls back."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__(result)
        self.result = result


class FakeSession:
    """Obey scripts; `log` holds what the kernel asked of it, for tests in the same process."""

    def __init__(self, spec: SessionSpec = SPEC) -> None:
        self.spec = spec
        self.comms: dict[str, str] = {}
        self.log: list[tuple[str, Any]] = []
        self.total_cpu_s = 0.0
        self._wakeup = asyncio.Event()
        self._interrupted = False
        self._answers: list[str] = []
        self._gone = False

    def begin(self) -> None:
        """Note it."""
        self.log.append(("begin", self.spec.session_id))

    async def ready(self) -> None:
        """Be ready at once."""
        self.log.append(("ready", None))

    async def execute(self, execution: Execution, limits: Limits, sink: Sink) -> CellResult:
        """Run the lines of the cell as verbs; see `_VERBS`."""
        self.log.append(("execute", execution))
        self._interrupted = False
        script = Script(self, execution, sink)
        self.total_cpu_s += DEFAULT_USAGE.cpu_s
        result = CellResult(
            outcome=Outcome.OK,
            committed=True,
            usage=DEFAULT_USAGE,
            limits=limits,
            container_id="c0ffee",
        )
        try:
            await script.run()
        except _Killed as killed:
            return replace(result, committed=False, **killed.result)
        self.comms.update(script.opened)
        return replace(
            result, outcome=script.outcome, reply=script.reply, notes=tuple(script.notes)
        )

    async def wait(self, done: Callable[[], bool]) -> None:
        """Wait until something is done; raises InterruptedError at an interrupt."""
        while not done():
            if self._gone:
                raise SessionLost("init died")
            if self._interrupted:
                raise InterruptedError
            self._wakeup.clear()
            await self._wakeup.wait()

    def take_answer(self) -> str | None:
        """Give the next answer to a question, if one came."""
        return self._answers.pop(0) if self._answers else None

    @property
    def has_answer(self) -> bool:
        """Tell whether an answer came."""
        return bool(self._answers)

    async def ask(self, msg_type: str, content: Json) -> Json:
        """Complete `pri`, and find `print`; code `die` kills the fork."""
        if content["code"].strip() == "die":
            raise LaunchError("fork", "it died")
        if msg_type == "complete_request":
            end = content["cursor_pos"]
            return {"matches": ["print"], "cursor_start": end - 3, "cursor_end": end}
        return {"found": True, "data": {"text/plain": json.dumps(content)}}

    async def comm(self, message: CommMessage, sink: Sink) -> CellResult:
        """Echo comm messages; data `{"die": 1}` breaks the memory limit."""
        msg_type, content = message.msg_type, message.content
        buffers = list(message.buffers)
        self.log.append((msg_type, content))
        comm_id = content["comm_id"]
        result = CellResult(Outcome.OK, True, DEFAULT_USAGE, CEILING, "c0ffee")
        if content.get("data", {}).get("die"):
            return replace(result, outcome=Outcome.MEMORY, committed=False)
        if msg_type == "comm_open":
            self.comms[comm_id] = content["target_name"]
        elif msg_type == "comm_close":
            self.comms.pop(comm_id, None)
        else:
            echo = {"comm_id": comm_id, "data": {"echo": content["data"]}}
            sink(Message("comm_msg", echo, buffers=tuple(b[::-1] for b in buffers)))
        return result

    def interrupt(self) -> None:
        """Wake whatever waits."""
        self._interrupted = True
        self._wakeup.set()

    def answer(self, value: str) -> None:
        """Take the reply to a question."""
        self._answers.append(value)
        self._wakeup.set()

    def usage(self) -> Usage:
        """Give fixed memory and the processor time of all cells."""
        return replace(DEFAULT_USAGE, cpu_s=self.total_cpu_s)

    async def close(self) -> None:
        """End whatever waits."""
        self.kill()

    def kill(self) -> None:
        """End whatever waits."""
        self._gone = True
        self._wakeup.set()


class Script:
    """One cell of verbs."""

    def __init__(self, session: FakeSession, execution: Execution, sink: Sink) -> None:
        self._session = session
        self._execution = execution
        self._sink = sink
        self.outcome = Outcome.OK
        self.reply: Json = {"status": "ok", "payload": [], "user_expressions": {}}
        self.notes: list[str] = []
        self.opened: dict[str, str] = {}

    async def run(self) -> None:
        """Obey line by line until one raises."""
        self.reply["user_expressions"] = {
            name: {"status": "ok", "data": {"text/plain": text}, "metadata": {}}
            for name, text in self._execution.user_expressions.items()
        }
        for line in self._execution.code.splitlines():
            verb, _, rest = line.partition(" ")
            if line.startswith("#") or not verb:
                continue
            try:
                await getattr(self, f"do_{verb}")(rest)
            except InterruptedError:
                self._end(Outcome.INTERRUPTED, "KeyboardInterrupt", "")
                return
            if self.outcome is not Outcome.OK:
                return

    async def do_out(self, rest: str) -> None:
        """Write text to stdout."""
        self._sink(Stream("stdout", rest + "\n"))

    async def do_err(self, rest: str) -> None:
        """Write text to stderr."""
        self._sink(Stream("stderr", rest + "\n"))

    async def do_many(self, rest: str) -> None:
        """Write many small pieces, with the loop running between them."""
        for number in range(int(rest)):
            self._sink(Stream("stdout", f"{number}\n"))
            await asyncio.sleep(0)

    async def do_message(self, rest: str) -> None:
        """Send any message, given as JSON `[type, content]`."""
        msg_type, content = json.loads(rest)
        self._sink(Message(msg_type, content))

    async def do_result(self, rest: str) -> None:
        """Send an execute_result."""
        content = {
            "data": {"text/plain": rest},
            "metadata": {},
            "execution_count": self._execution.execution_count,
        }
        self._sink(Message("execute_result", content))

    async def do_fail(self, rest: str) -> None:
        """Raise an exception in the cell."""
        self._end(Outcome.ERROR, "ValueError", rest)

    async def do_surrogate(self, rest: str) -> None:
        """Fail with text that UTF-8 cannot hold."""
        self._end(Outcome.ERROR, "ValueError", "\ud800")

    async def do_wait(self, rest: str) -> None:
        """Run until interrupted."""
        await self._session.wait(lambda: False)

    async def do_ask(self, rest: str) -> None:
        """Ask the user and print what was said."""
        self._sink(InputRequest(rest, password=rest.startswith("secret")))
        await self._session.wait(lambda: self._session.has_answer)
        self._sink(Stream("stdout", f"said {self._session.take_answer()}\n"))

    async def do_kill(self, rest: str) -> None:
        """End with an outcome that rolls back, and more fields as JSON."""
        outcome, _, fields = rest.partition(" ")
        raise _Killed({"outcome": Outcome(outcome), **json.loads(fields or "{}")})

    async def do_comm(self, rest: str) -> None:
        """Open a comm, given as `id target`."""
        comm_id, _, target = rest.partition(" ")
        self.opened[comm_id] = target
        content = {"comm_id": comm_id, "target_name": target, "data": {}}
        self._sink(Message("comm_open", content))

    async def do_note(self, rest: str) -> None:
        """Leave a note for the user."""
        self.notes.append(rest)

    async def do_page(self, rest: str) -> None:
        """Add a pager payload, and one of a kind that does not exist."""
        page = {"source": "page", "data": {"text/plain": rest}, "start": 0}
        self.reply["payload"] += [page, {"source": "run_on_host"}, 7]

    async def do_raise(self, rest: str) -> None:
        """Fail as the sandbox itself does."""
        kinds: dict[str, SandboxError] = {
            "lost": SessionLost("init died", hint="run the cells again"),
            "host": HostError("no memory controller", hint="run `sandbox-kernel doctor`"),
        }
        if rest in kinds:
            raise kinds[rest]
        raise RuntimeError(rest)

    def _end(self, outcome: Outcome, ename: str, evalue: str) -> None:
        error = {"ename": ename, "evalue": evalue, "traceback": [f"{ename}: {evalue}"]}
        self._sink(Message("error", error))
        self.outcome = outcome
        self.reply.update(status="error", **error)


class FailsFirst:
    """Open sessions, but refuse the first `failures` times."""

    def __init__(self, failures: int) -> None:
        self._failures = failures

    def __call__(self, spec: SessionSpec) -> FakeSession:
        """Open a session or raise."""
        if self._failures:
            self._failures -= 1
            raise HostError("no user namespaces", hint="run `sandbox-kernel doctor`")
        session = FakeSession(spec)
        session.begin()
        return session


def main(arguments: list[str]) -> None:
    """Serve a connection file; `--failures=N` refuses the first N sessions."""
    from sandbox_kernel.kernel.app import serve

    failures = [int(word[11:]) for word in arguments if word.startswith("--failures=")]
    rest = [word for word in arguments if not word.startswith("--failures=")]
    serve(rest, lambda: SPEC, FailsFirst(sum(failures)))


if __name__ == "__main__":
    main(sys.argv[1:])
