"""A real kernel process and one client of it, over jupyter_client's own sockets.

All four channels are read in one place (`Live.wait`), and what came is sorted by the request that
it answers; so a test can wait for whatever it is about, in whichever order things come.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.kernel import traces

NAME = "sandbox-python"
TIMEOUT_S = 60.0
CHANNELS = ("iopub", "shell", "control", "stdin")

Message = dict[str, Any]

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def plain(text: str) -> str:
    """Give `text` without terminal colours."""
    return _COLOURS.sub("", text)


@dataclass(frozen=True)
class Ran:
    """One execution that has ended: its reply, and all that came on iopub under its header."""

    reply: Message
    heard: list[Message]

    @property
    def content(self) -> Message:
        return self.reply["content"]

    @property
    def status(self) -> str:
        return self.content["status"]

    @property
    def figures(self) -> Message:
        """The `sandbox` metadata of the reply."""
        return self.reply["metadata"]["sandbox"]

    @property
    def outputs(self) -> list[Message]:
        """What a notebook would show, and comms: all but status and input."""
        return [m for m in self.heard if m["msg_type"] not in ("status", "execute_input")]

    def of(self, msg_type: str) -> list[Message]:
        """Give the contents of the messages of one type."""
        return [m["content"] for m in self.heard if m["msg_type"] == msg_type]

    def text(self, name: str = "stdout") -> str:
        """Give all that came on a standard stream."""
        return "".join(m["text"] for m in self.of("stream") if m["name"] == name)

    @property
    def result(self) -> str:
        """The text of the result; empty if there is none."""
        return "".join(m["data"]["text/plain"] for m in self.of("execute_result"))

    def said(self) -> str:
        """Say all there is, for the message of a failed assertion."""
        lines = [f"{self.status} {self.content.get('ename')}: {self.content.get('evalue')}"]
        lines += plain("\n".join(self.content.get("traceback", ()))).splitlines()
        return "\n".join([*lines, self.text(), self.text("stderr")])


@dataclass
class Live:
    """A kernel, what it was heard to say, and the shortest ways to speak to it."""

    manager: KernelManager
    client: BlockingKernelClient
    iopub: dict[str, list[Message]] = field(default_factory=lambda: defaultdict(list))
    replies: dict[str, Message] = field(default_factory=dict)
    questions: list[Message] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    """The ids of all executions."""
    order: list[Message] = field(default_factory=list)
    """All messages of all channels, as they came."""

    @property
    def pid(self) -> int:
        """The pid of the kernel process."""
        return self.manager.provisioner.process.pid

    def traces(self) -> traces.Traces:
        """Note every process and cgroup that this kernel has now."""
        return traces.Traces.of(self.pid)

    # ---- hearing

    def wait(self, holds: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
        """Read all channels until something holds; fails with what came instead."""
        poller = zmq.Poller()
        sockets = {name: getattr(self.client, f"{name}_channel").socket for name in CHANNELS}
        for socket in sockets.values():
            poller.register(socket, zmq.POLLIN)
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                names = [f"{m['channel']}:{m['msg_type']}" for m in self.order[-20:]]
                raise AssertionError(f"not within {timeout_s} s; the last messages were {names}")
            if poller.poll(1000 * min(left_s, 1.0)):
                for name in CHANNELS:
                    self._read(name, sockets[name])

    def _read(self, name: str, socket: Any) -> None:
        while socket.get(zmq.EVENTS) & zmq.POLLIN:
            _, msg = self.client.session.recv(socket, zmq.NOBLOCK)
            msg["channel"] = name
            msg["at_s"] = time.monotonic()
            parent = msg["parent_header"].get("msg_id", "")
            self.order.append(msg)
            if name == "iopub":
                self.iopub[parent].append(msg)
            elif name == "stdin":
                self.questions.append(msg)
            else:
                self.replies[parent] = msg

    def is_idle(self, msg_id: str) -> bool:
        """Tell whether the idle status of a request has come."""
        states = (m["content"].get("execution_state") for m in self.iopub[msg_id])
        return "idle" in states

    def is_free(self) -> bool:
        """Tell whether all executions have ended, as far as was heard."""
        return all(map(self.is_idle, self.sent))

    # ---- executing

    def send(self, code: str, **options: Any) -> str:
        """Ask for an execution and give the request's id."""
        self.sent.append(self.client.execute(code, **{"allow_stdin": False, **options}))
        return self.sent[-1]

    def result(self, msg_id: str, timeout_s: float = TIMEOUT_S) -> Ran:
        """Wait for the end of an execution."""
        self.wait(lambda: self.is_idle(msg_id) and msg_id in self.replies, timeout_s)
        return Ran(self.replies[msg_id], self.iopub[msg_id])

    def run(self, code: str, **options: Any) -> Ran:
        """Execute one cell and wait for its end."""
        return self.result(self.send(code, **options))

    def ok(self, code: str, **options: Any) -> Ran:
        """Execute one cell that must succeed."""
        ran = self.run(code, **options)
        assert ran.status == "ok", ran.said()
        return ran

    def value(self, expression: str) -> str:
        """Give the text of an expression."""
        return self.ok(expression).result

    def until_text(self, msg_id: str, text: str) -> None:
        """Wait until a running cell has printed something."""

        def printed() -> bool:
            streams = [m for m in self.iopub[msg_id] if m["msg_type"] == "stream"]
            return text in "".join(m["content"]["text"] for m in streams)

        self.wait(printed)

    # ---- other requests

    def tell(self, msg_type: str, content: Message, **more: Any) -> str:
        """Send a message on the shell channel; give its id."""
        return self._post("shell", msg_type, content, **more)

    def ask(self, msg_type: str, content: Message | None = None, *, channel: str = "shell") -> Any:
        """Send a request and give the content of its reply, after its idle status."""
        msg_id = self._post(channel, msg_type, content or {})
        self.wait(lambda: msg_id in self.replies and self.is_idle(msg_id))
        return self.replies[msg_id]["content"]

    def served(self, msg_id: str) -> list[Message]:
        """Wait until a message without a reply is served; give what came of it."""
        self.wait(lambda: self.is_idle(msg_id))
        return [m for m in self.iopub[msg_id] if m["msg_type"] != "status"]

    def _post(self, channel: str, msg_type: str, content: Message, **more: Any) -> str:
        msg = {**self.client.session.msg(msg_type, content), **more}
        getattr(self.client, f"{channel}_channel").send(msg)
        return msg["header"]["msg_id"]

    def question(self) -> Message:
        """Wait for the next `input_request`; give its content."""
        self.wait(lambda: self.questions)
        return self.questions.pop(0)["content"]

    # ---- the end

    def end(self) -> None:
        """Shut down, by force if need be, and close the channels; may be called twice."""
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=not self.manager.is_alive())
        self.manager.cleanup_resources()


def start(cwd: Path, *arguments: str, name: str = NAME) -> Live:
    """Start a kernel in a folder; give it when it answers."""
    manager = KernelManager(kernel_name=name)
    manager.start_kernel(cwd=str(cwd), extra_arguments=list(arguments))
    client = manager.client()
    client.start_channels()
    live = Live(manager, client)
    try:
        client.wait_for_ready(timeout=TIMEOUT_S)
    except BaseException:
        live.end()
        raise
    return live


def settings(**values: object) -> Iterator[str]:
    """Give settings as arguments of the kernel."""
    return (f"--SandboxConfig.{name}={value}" for name, value in values.items())
