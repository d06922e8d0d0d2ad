"""ipykernel's base kernel, without what the host of guests must not have.

Shell messages are served strictly in order in the main thread's loop: there is no shell thread,
so no subshells. There is no debugger, no signal handler is ever changed, and no process is
killed but by the session.
"""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar

import zmq
from ipykernel.kernelbase import Kernel

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from jupyter_client.session import Session

    from sandbox_kernel.model import Json

T = TypeVar("T")

SHELL_ONLY = ("execute_request", "complete_request", "inspect_request")
"""Requests that need the session, so they must keep their turn on the shell channel."""


class OrderedKernel(Kernel):
    """A base kernel whose shell requests run one after the other, comms included."""

    # The order of messages comes from flushes here, so there is no need to wait for luck.
    _execute_sleep = 0.0

    session: Session
    # In the base class a trait of an IPython class, which would have to be loaded for it.
    profile_dir = None

    main_loop: asyncio.AbstractEventLoop

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._tasks: set[asyncio.Task[None]] = set()
        for msg_type in SHELL_ONLY:
            self.control_handlers[msg_type] = self._refuse_on_control

    def start(self) -> None:
        """Take messages; to be called in the thread whose loop will run."""
        super().start()
        self.main_loop = self.io_loop.asyncio_loop  # type: ignore[attr-defined]
        if self.shell_stream is not None:
            self.shell_stream.on_recv(self._arrived, copy=False)

    def _arrived(self, msg: list[zmq.Frame]) -> None:
        """Queue one shell message.

        Each has a context of its own, so that its outputs can never take another's parent.
        """
        self._spawn(self.shell_main(None, msg))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.main_loop.create_task(work, context=copy_context())
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)

    async def shell_main(self, subshell_id: str | None, msg: list[zmq.Frame]) -> None:
        """Serve one shell message when all before it are done.

        The base class lets comm messages overtake a running cell. Here they would fork a state
        that the cell is about to replace.
        """
        async with self._main_asyncio_lock:
            await self.dispatch_shell(msg, subshell_id=subshell_id)

    def _abort_queues(self, subshell_id: str | None = None) -> None:
        """Abort the execute requests that the client has sent up to now."""
        self._aborting = True
        if self.shell_stream is not None:
            self.shell_stream.flush(zmq.POLLIN)
        self._spawn(self._end_abort())

    async def _end_abort(self) -> None:
        # The lock is fair: whoever waits for it now was sent before the error was known.
        async with self._main_asyncio_lock:
            if not self.stop_on_error_timeout:
                self._aborting = False
                return
        await asyncio.sleep(self.stop_on_error_timeout)
        self._aborting = False

    async def in_main_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something where sessions live, whichever channel's thread asks."""
        if asyncio.get_running_loop() is self.main_loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.main_loop))

    def pre_handler_hook(self) -> None:
        """Leave SIGINT ignored; the base class would let it raise in the event loop."""

    def post_handler_hook(self) -> None:
        """Leave SIGINT ignored."""

    async def _progressively_terminate_all_children(self) -> None:
        """Do nothing: a session ends its processes itself, and there are no others."""

    async def do_debug_request(self, msg: Json) -> Json:
        """Refuse in the words of both protocols, Jupyter's and the debugger's."""
        reason = "this kernel has no debugger"
        return {
            **_refusal(reason),
            "type": "response",
            "success": False,
            "request_seq": msg.get("seq", 0),
            "command": msg.get("command", ""),
            "message": reason,
        }

    async def _refuse_on_control(self, stream: Any, ident: Any, parent: Json) -> None:
        """Refuse what would have to wait for a running cell, and interrupts behind it."""
        reply_type = parent["header"]["msg_type"].replace("_request", "_reply")
        content = _refusal("the control channel does not take this, send it on the shell channel")
        self.session.send(stream, reply_type, content, parent, ident)

    async def create_subshell_request(self, socket: Any, ident: Any, parent: Json) -> None:
        """Refuse, with a reply."""
        self._refuse_subshell(socket, ident, parent)

    async def delete_subshell_request(self, socket: Any, ident: Any, parent: Json) -> None:
        """Refuse, with a reply."""
        self._refuse_subshell(socket, ident, parent)

    async def list_subshell_request(self, socket: Any, ident: Any, parent: Json) -> None:
        """Refuse, with a reply."""
        self._refuse_subshell(socket, ident, parent)

    def _refuse_subshell(self, socket: Any, ident: Any, parent: Json) -> None:
        reply_type = parent["header"]["msg_type"].replace("_request", "_reply")
        content = _refusal("this kernel has no subshells")
        self.session.send(socket, reply_type, content, parent, ident)


def _refusal(reason: str) -> Json:
    return {"status": "error", "ename": "NotSupported", "evalue": reason, "traceback": []}
