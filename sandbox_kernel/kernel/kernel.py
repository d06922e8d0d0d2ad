"""The Jupyter side of a sandbox: every message that a client may send, and its answer.

The kernel runs in the process that Jupyter started and never runs, evaluates or unpickles what
a guest sends. Code goes to the session (`engine`), events come back and are published
(`publish`), what became of a cell is worded by `report`. All of it runs in the main thread's
loop; only the control channel has a thread of its own, and so answers while a cell runs.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from traitlets import Any as AnyTrait

from sandbox_kernel.config import is_status_line, parse_cell
from sandbox_kernel.errors import SandboxError
from sandbox_kernel.kernel import answers, report
from sandbox_kernel.kernel.comms import COMM_TYPES, comm_info, header_of, relay
from sandbox_kernel.kernel.dispatch import OrderedKernel
from sandbox_kernel.kernel.engine import SessionHolder
from sandbox_kernel.kernel.history import History, View
from sandbox_kernel.kernel.prompt import Prompter
from sandbox_kernel.kernel.publish import Publisher, encodable
from sandbox_kernel.model import Event, Execution, InputRequest, Json, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandbox_kernel.kernel.engine import Engine
    from sandbox_kernel.kernel.publish import Buffers
    from sandbox_kernel.kernel.report import CellError

CLOSE_WITHIN_S = 2.0
"""A client kills a kernel about 2.5 s after it asked it to shut down."""


class SandboxKernel(OrderedKernel):
    """A kernel whose every execution is a transaction in a fresh container.

    `read_spec` gives the spec of a new session and `open_session` a session that has begun;
    either may raise SandboxError, which is then the answer to the cell that needed it.
    """

    read_spec = AnyTrait()
    open_session = AnyTrait()

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sessions = SessionHolder(self.read_spec, self.open_session)
        self._history = History()
        self._meter = answers.Meter()
        self._next_count = 1
        self._figures: Json | None = None
        for msg_type in COMM_TYPES:
            self.shell_handlers[msg_type] = self.comm_request

    def start(self) -> None:
        """Take messages, and let the session that was begun come up meanwhile."""
        super().start()
        if self.sessions.session is not None:
            self._spawn(self._await_ready(self.sessions.session))

    async def _await_ready(self, session: Engine) -> None:
        try:
            await session.ready()
        except SandboxError as error:
            # The first cell meets the same error, and tells it where the user looks.
            self.log.info("the session is not ready: %s", error)

    # What a client asks about the kernel.

    @property
    def kernel_info(self) -> Json:
        """The content of a `kernel_info_reply`."""
        return answers.kernel_info()

    @property
    def execution_count(self) -> int:
        """The number of the next stored cell; silent and unstored ones do not move it."""
        return self._next_count

    @execution_count.setter
    def execution_count(self, value: int) -> None:
        """Ignore the base class, which counts every execution that is not silent."""

    def init_metadata(self, parent: Json) -> Json:
        """Begin the metadata of a reply; consumers of ipykernel's rely on these keys."""
        self._figures = None
        metadata: Json = super().init_metadata(parent)
        return {**metadata, "dependencies_met": True, "engine": self.ident}

    def finish_metadata(self, parent: Json, metadata: Json, reply_content: Json) -> Json:
        """End the metadata of a reply with the figures of the cell."""
        metadata["status"] = reply_content["status"]
        if self._figures is not None:
            metadata["sandbox"] = self._figures
        return metadata

    # Execution.

    async def do_execute(  # noqa: PLR0913 - the signature is the base class's
        self,
        code: str,
        silent: bool,  # noqa: FBT001
        store_history: bool = True,  # noqa: FBT001, FBT002
        user_expressions: Json | None = None,
        allow_stdin: bool = False,  # noqa: FBT001, FBT002
        *,
        cell_meta: Json | None = None,
        cell_id: str | None = None,
    ) -> Json:
        """Run one cell and give the content of its reply."""
        count = self._next_count
        parent = self.get_parent("shell")
        # IPython neither numbers nor keeps an empty cell.
        stored = bool(store_history) and not silent and bool(code.strip())
        line = self._history.append(count, code) if stored else None
        self._next_count += stored
        execution = Execution(
            code=code,
            silent=bool(silent),
            store_history=stored,
            user_expressions=user_expressions or {},
            allow_stdin=bool(allow_stdin),
            execution_count=count,
            cell_id=cell_id,
            parent=header_of(parent),
        )
        publisher = self._publisher(parent)
        reply = await self._answer(execution, publisher)
        publisher.flush()
        if line is not None:
            line.output = publisher.result_text
        reply["execution_count"] = self._next_count - 1
        return _sendable(reply)

    async def _answer(self, execution: Execution, publisher: Publisher) -> Json:
        try:
            if is_status_line(execution.code):
                return await self._show_status(publisher)
            if not execution.code.strip() and not execution.user_expressions:
                return {"status": "ok", "user_expressions": {}, "payload": []}
            return await self._run(execution, publisher)
        except SandboxError as error:
            remark = self.sessions.fail(error)
            return _fail(publisher, report.error_from(error, remark=remark))
        except Exception as error:  # without a reply the client would wait for ever
            self.log.exception("the kernel failed to run a cell")
            text = f"the kernel itself failed: {type(error).__name__}: {error}"
            return _fail(publisher, report.error_from(SandboxError(text)))

    async def _run(self, execution: Execution, publisher: Publisher) -> Json:
        spec = self.sessions.spec
        limits, code = parse_cell(execution.code, spec.limits, spec.ceiling)
        session = self.sessions.acquire()
        parent, ident = self.get_parent("shell"), self._shell_parent_ident.get()
        loop = asyncio.get_running_loop()
        prompter = Prompter(self.stdin_socket, self.session, loop, session.answer)

        def sink(event: Event) -> None:
            if isinstance(event, InputRequest):
                publisher.flush()
                prompter.ask(event, parent=parent, ident=ident)
            else:
                publisher.take(event)

        try:
            result = await session.execute(replace(execution, code=code), limits, sink)
        finally:
            prompter.close()
        self.sessions.record(result)
        self._figures = report.figures(result, image=spec.image.reference)
        error = report.error_of(result, ceiling=spec.ceiling, grace_s=spec.grace_s)
        if error is not None:
            publisher.close_comms()
            publisher.error(error)
        for note in result.notes:
            publisher.text("stderr", note.rstrip("\n") + "\n")
        return answers.execute_reply(result, error)

    async def _show_status(self, publisher: Publisher) -> Json:
        spec = self.sessions.spec
        usage = self.sessions.usage()
        bundle = report.status_bundle(spec.limits, usage, image=spec.image.reference)
        publisher.send("display_data", {"data": bundle, "metadata": {}, "transient": {}})
        return {"status": "ok", "user_expressions": {}, "payload": []}

    def _publisher(self, parent: Json) -> Publisher:
        """Give what publishes the outputs of one request, under its own parent for ever."""

        def send(
            msg_type: str, content: Json, metadata: Json | None, buffers: Buffers | None
        ) -> None:
            self.session.send(
                self.iopub_socket,
                msg_type,
                content,
                parent,
                self._topic(msg_type),
                buffers,
                metadata=metadata,
            )

        return Publisher(send, asyncio.get_running_loop())

    # Questions about code.

    async def do_complete(self, code: str, cursor_pos: int | None) -> Json:
        """Complete, in a throw-away fork of the state."""
        position = len(code) if cursor_pos is None else cursor_pos
        content = {"code": answers.without_sandbox_line(code), "cursor_pos": position}
        return answers.complete_reply(await self._ask("complete_request", content), position)

    async def do_inspect(
        self,
        code: str,
        cursor_pos: int,
        detail_level: int = 0,
        omit_sections: Iterable[str] = (),
    ) -> Json:
        """Inspect, in a throw-away fork of the state."""
        content = {
            "code": answers.without_sandbox_line(code),
            "cursor_pos": cursor_pos,
            "detail_level": detail_level,
            "omit_sections": sorted(omit_sections),
        }
        return answers.inspect_reply(await self._ask("inspect_request", content))

    async def _ask(self, msg_type: str, content: Json) -> Json:
        session = self.sessions.session
        if session is None:
            return {}
        try:
            return _sendable(await session.ask(msg_type, content))
        except SandboxError as error:
            self.log.info("%s was not answered: %s", msg_type, error)
        except Exception:  # an empty reply is better than a client that waits for ever
            self.log.exception("%s was not answered", msg_type)
        return {}

    async def do_is_complete(self, code: str) -> Json:
        """Answer from the text alone."""
        return answers.is_complete(answers.without_sandbox_line(code))

    async def do_history(  # noqa: PLR0913 - the keys of the message
        self,
        hist_access_type: str,
        output: bool = False,  # noqa: FBT001, FBT002
        raw: bool = True,  # noqa: FBT001, FBT002
        session: int = 0,
        start: int | None = None,
        stop: int | None = None,
        n: int | None = None,
        pattern: str | None = None,
        unique: bool = False,  # noqa: FBT001, FBT002
        **_unknown: object,
    ) -> Json:
        """Answer from the host's history."""
        view = View(output=bool(output), raw=bool(raw))
        if hist_access_type == "tail":
            rows = self._history.tail(n, view)
        elif hist_access_type == "range":
            rows = self._history.range(session or 0, start, stop, view)
        elif hist_access_type == "search":
            rows = self._history.search(pattern or "*", n, view, unique=bool(unique))
        else:
            rows = []
        return _sendable({"status": "ok", "history": rows})

    # Comms.

    async def comm_info_request(self, stream: Any, ident: Any, parent: Json) -> None:
        """List the comms of the committed state."""
        content = comm_info(self.sessions.session, parent["content"].get("target_name"))
        self.session.send(stream, "comm_info_reply", encodable(content), parent, ident)

    async def comm_request(self, _stream: Any, _ident: Any, parent: Json) -> None:
        """Hand a comm message to the guest; there is no reply to one."""
        session = self.sessions.session
        if session is None:
            self.log.warning("a comm message came before any session")
            return
        publisher = self._publisher(parent)
        await relay(session, self.sessions.spec, parent, publisher)
        publisher.flush()

    # The control channel, in its own thread.

    async def interrupt_request(self, stream: Any, ident: Any, parent: Json) -> None:
        """Interrupt what runs; the reply does not wait for it to stop."""
        self.main_loop.call_soon_threadsafe(self._interrupt)
        self.session.send(stream, "interrupt_reply", {"status": "ok"}, parent, ident=ident)

    def _interrupt(self) -> None:
        if self.sessions.session is not None:
            self.sessions.session.interrupt()

    async def usage_request(self, stream: Any, ident: Any, parent: Json) -> None:
        """Say what the session uses, against its limit."""
        content = await self.in_main_loop(self._usage())
        self.session.send(stream, "usage_reply", content, parent, ident)

    async def _usage(self) -> Json:
        usage = self.sessions.usage()
        if usage is None:
            return answers.usage_reply(Usage(), None, 0.0)
        limits = self.sessions.spec.limits
        return answers.usage_reply(usage, limits, self._meter.percent(usage.cpu_s))

    async def do_shutdown(self, restart: bool) -> Json:  # noqa: FBT001
        """End the session, in time for clients that wait; may be asked twice."""
        await self.in_main_loop(self._close())
        return {"status": "ok", "restart": restart}

    async def _close(self) -> None:
        try:
            await asyncio.wait_for(self.sessions.close(), CLOSE_WITHIN_S)
        except (SandboxError, TimeoutError) as error:
            self.log.warning("the session was killed at shutdown: %r", error)
        finally:
            self.sessions.kill()


def _sendable(content: Json) -> Json:
    cleaned: Json = encodable(content)
    return cleaned


def _fail(publisher: Publisher, error: CellError) -> Json:
    publisher.close_comms()
    publisher.error(error)
    return {"status": "error", **error.content(), "user_expressions": {}, "payload": []}
