"""The IPython kernel inside a guest: ipykernel's own, without sockets.

What it would send by ZeroMQ goes to the kernel over the link instead. The kernel stamps parent
headers and decides what is published, so a guest can say only what, never to whom.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import pdb
import selectors
import signal
import sys
import threading
from collections.abc import Coroutine
from types import ModuleType, SimpleNamespace
from typing import Any

from ipykernel.ipkernel import IPythonKernel
from IPython.core import debugger
from jupyter_client.session import Session
from traitlets.config import Config

from sandbox_kernel.guest import streams
from sandbox_kernel.guest.link import Link, hold_interrupts


def _forgo_debugger() -> None:
    """Keep ipykernel from loading debugpy, which costs 0.1 s, starts threads and is not offered."""
    if "ipykernel.debugger" not in sys.modules:
        stub = ModuleType("ipykernel.debugger")
        stub._is_debugpy_available = False  # type: ignore[attr-defined]
        stub.Debugger = object  # type: ignore[attr-defined]
        sys.modules["ipykernel.debugger"] = stub


# What an execution without history leaves on the shell.
_TRACES = ("last_execution_succeeded", "last_execution_result", "execution_count")
_WARM: dict[str, Any] = {
    "code": "print(end='')",
    "silent": False,
    "store_history": False,
    "user_expressions": {},
    "allow_stdin": True,
    "execution_count": 0,
}


def _keep_nothing(*, channel: str) -> contextlib.AbstractContextManager[None]:
    """Stand in for IPython's record of what is printed."""
    del channel
    return contextlib.nullcontext()


def _trigger_nothing(event: str, *args: Any, **kwargs: Any) -> None:
    """Stand in for the trigger of IPython's events while nothing of the user may run."""


async def _interruptible(user_code: Coroutine[Any, Any, Any]) -> Any:
    """Let SIGINT through while user code runs, and at no other time.

    A KeyboardInterrupt in the event loop's own machinery would leave a task behind that has not
    begun, and the next cell would run it.
    """
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return await user_code
    finally:
        hold_interrupts()
        user_code.close()


class LinkSession(Session):
    """A jupyter_client session whose messages go over the link."""

    def __init__(self, link: Link) -> None:
        super().__init__(key=b"")
        self.link = link

    def send(
        self,
        stream: Any,
        msg_or_type: Any,
        content: Any = None,
        parent: Any = None,
        ident: Any = None,
        buffers: Any = None,
        track: bool = False,
        header: Any = None,
        metadata: Any = None,
    ) -> dict[str, Any]:
        """Publish one message; replies have no socket here and are not sent."""
        if isinstance(msg_or_type, str):
            msg = self.msg(msg_or_type, content, parent, header, metadata)
        else:
            msg = msg_or_type
            buffers = buffers or msg.get("buffers")
        if stream is not None and GuestKernel.is_heard:
            raw = tuple(bytes(memoryview(buffer).cast("B")) for buffer in buffers or ())
            self.link.publish(
                {
                    "op": "message",
                    "msg_type": msg["header"]["msg_type"],
                    "content": msg["content"],
                    "metadata": msg["metadata"],
                },
                raw,
            )
            streams.forget_current()
        return dict(msg)


class _Callbacks:
    """As much of tornado's IOLoop as ipykernel needs to cancel an awaiting cell."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def add_callback(self, callback: Any, *args: Any) -> None:
        """Run `callback` in the loop, from any thread or signal handler."""
        self.loop.call_soon_threadsafe(callback, *args)

    def call_later(self, delay_s: float, callback: Any) -> None:
        """Do nothing: `quit()` would end the loop, and sessions are ended by the kernel."""

    def stop(self) -> None:
        """Do nothing, as above."""


class GuestKernel(IPythonKernel):
    """ipykernel's IPython kernel, driven by frames."""

    io_loop: Any = None
    is_heard = False
    """Whether the kernel listens yet: what a library prints while it is loaded is for nobody."""

    def _input_request(self, prompt: Any, ident: Any, parent: Any, password: bool = False) -> str:
        link: Link = self.session.link  # type: ignore[union-attr]
        sys.stdout.flush()
        sys.stderr.flush()
        link.publish({"op": "input", "prompt": str(prompt), "password": bool(password)})
        streams.forget_current()
        frame = link.receive()
        while frame.op != "input_reply":  # nothing else may come while a cell runs
            frame = link.receive()
        value = str(frame.body.get("value", ""))
        if value == "\x04":  # Ctrl-D, as ipykernel has it
            raise EOFError
        return value

    def _abort_queues(self, subshell_id: Any = None) -> None:
        """Do nothing: requests queue on the kernel's side."""


def make_kernel(link: Link) -> GuestKernel:
    """Make the one kernel of this process, its event loop and its standard streams."""
    _forgo_debugger()
    loop = asyncio.SelectorEventLoop(selectors.PollSelector())
    asyncio.set_event_loop(loop)

    def barrier() -> None:
        if GuestKernel.is_heard:
            link.publish({"op": "sync"})

    sys.stdout = sys.__stdout__ = streams.OutputStream(1, "stdout", barrier)  # type: ignore[misc,assignment]
    sys.stderr = sys.__stderr__ = streams.OutputStream(2, "stderr", barrier)  # type: ignore[misc,assignment]
    log = logging.getLogger("sandbox_kernel.guest")
    log.setLevel(logging.CRITICAL)
    config = Config()
    # Threads would make the head unforkable, and the history is the kernel's affair.
    config.HistoryManager.hist_file = ":memory:"
    config.InteractiveShell.banner1 = ""
    kernel = GuestKernel.instance(
        config=config,
        session=LinkSession(link),
        iopub_socket=object(),
        stdin_socket=object(),
        shell_channel_thread=SimpleNamespace(parent_thread=threading.main_thread(), manager=None),
        log=log,
    )
    # What ipykernel's own application does: a breakpoint() asks by input(), and can be interrupted.
    pdb.Pdb = debugger.InterruptiblePdb  # type: ignore[assignment, misc]
    pdb.set_trace = debugger.set_trace
    # It would keep all that a session ever prints, and count it as the cell's memory.
    kernel.shell._tee = _keep_nothing  # type: ignore[union-attr]
    kernel._execute_sleep = 0
    kernel.io_loop = _Callbacks(loop)
    return kernel


class Requests:
    """Answer the requests that the kernel passes on, on the main thread."""

    def __init__(self, kernel: GuestKernel) -> None:
        self.kernel = kernel
        self.shell: Any = kernel.shell
        self._loop: asyncio.AbstractEventLoop = kernel.io_loop.loop
        # Every request runs in one and the same context, so context variables carry over.
        self._context = contextvars.copy_context()
        self._in_context: dict[str, Any] = {}
        if sys.version_info >= (3, 11):
            self._in_context["context"] = self._context
        self._ours = self._hooks()

    def execute(self, body: dict[str, Any]) -> dict[str, Any]:
        """Run a cell; give the reply's content."""
        return self._complete(_interruptible(self._cell(body)))

    def _cell(self, body: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        self._set_parent(body)
        self._align_history(body["execution_count"])
        self.shell.execution_count = body["execution_count"]
        cell: Coroutine[Any, Any, Any] = self.kernel.do_execute(
            body["code"],
            body["silent"],
            body["store_history"],
            body["user_expressions"],
            body["allow_stdin"],
            cell_id=body.get("cell_id"),
        )
        return cell

    def _align_history(self, execution_count: int) -> None:
        """Keep `In[n]` the n-th cell, also after cells that this interpreter has not seen."""
        history = self.shell.history_manager
        for inputs in (history.input_hist_parsed, history.input_hist_raw):
            inputs.extend([""] * (execution_count - len(inputs)))

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a completion or an inspection."""
        content = body["content"]
        if body["msg_type"] == "complete_request":
            return self._complete(self.kernel.do_complete(content["code"], content["cursor_pos"]))
        return self._complete(
            self.kernel.do_inspect(
                content["code"],
                content["cursor_pos"],
                content.get("detail_level", 0),
                set(content.get("omit_sections", ())),
            )
        )

    def prime(self) -> None:
        """Complete something of no interest, which loads jedi and its grammar: 1 to 2 s."""
        code = "import os; os.pa"
        self._complete(self.kernel.do_complete(code, len(code)))

    def comm(self, body: dict[str, Any], buffers: tuple[bytes, ...]) -> None:
        """Hand a comm message to its handler."""
        self._set_parent(body)
        msg = {
            "header": {"msg_type": body["msg_type"], "msg_id": "", "session": ""},
            "parent_header": {},
            "metadata": body.get("metadata", {}),
            "content": body["content"],
            "buffers": [memoryview(buffer) for buffer in buffers],
        }
        handler = self.kernel.shell_handlers[body["msg_type"]]

        async def handle() -> dict[str, Any]:
            result = handler(None, b"", msg)
            if inspect.isawaitable(result):
                await result
            return {}

        self._complete(_interruptible(handle()))

    def comms(self) -> dict[str, str]:
        """Give the target of each open comm."""
        return {
            str(comm_id): str(getattr(comm, "target_name", ""))
            for comm_id, comm in self.kernel.comm_manager.comms.items()
        }

    def warm(self) -> None:
        """Touch what an execution touches, so that its page faults lie behind us.

        Only while no hook of the user could notice.
        """
        if self._hooks() != self._ours:
            return
        shell = self.shell
        kept = {name: getattr(shell, name) for name in _TRACES}
        shell.events.trigger = _trigger_nothing
        try:
            self._complete(self._cell(_WARM))
        finally:
            del shell.events.trigger
        for name, value in kept.items():
            setattr(shell, name, value)

    def _hooks(self) -> tuple[Any, ...]:
        shell = self.shell
        manager = shell.input_transformer_manager
        return (
            {name: len(callbacks) for name, callbacks in shell.events.callbacks.items()},
            len(shell.ast_transformers),
            len(manager.cleanup_transforms),
            len(manager.line_transforms),
            len(manager.token_transformers),
            sys.gettrace(),
            sys.getprofile(),
        )

    def _set_parent(self, body: dict[str, Any]) -> None:
        header = body.get("parent") or {"msg_id": "", "session": ""}
        parent = {"header": header, "parent_header": {}}
        self._context.run(self.kernel.set_parent, [], parent, "shell")

    def _complete(self, result: Any) -> dict[str, Any]:
        if inspect.iscoroutine(result):
            task = self._loop.create_task(result, **self._in_context)
            reply = self._loop.run_until_complete(task)
        else:
            reply = result
        return dict(reply)
