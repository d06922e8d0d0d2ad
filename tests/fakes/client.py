"""A client of one kernel over its real sockets, with the messages of each request sorted out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 20.0


@dataclass
class Answer:
    """What came back for one request: the reply, and its iopub messages without status."""

    reply: dict[str, Any]
    iopub: list[dict[str, Any]] = field(default_factory=list)

    @property
    def content(self) -> dict[str, Any]:
        return self.reply["content"]

    def of(self, *types: str) -> list[dict[str, Any]]:
        """Give the contents of the messages of these types."""
        return [message["content"] for message in self.iopub if message["msg_type"] in types]

    def text(self, name: str = "stdout") -> str:
        """Give all text of one stream."""
        return "".join(c["text"] for c in self.of("stream") if c["name"] == name)


class Client:
    """Send requests and wait for replies."""

    def __init__(self, manager: KernelManager) -> None:
        self.manager = manager
        self.kc: BlockingKernelClient = manager.client()
        self.kc.start_channels()
        self.kc.wait_for_ready(timeout=TIMEOUT_S)

    def run(self, code: str, **options: Any) -> Answer:
        """Execute a cell and wait for its end."""
        return self.finish(self.kc.execute(code, **options))

    def finish(self, msg_id: str) -> Answer:
        """Wait for the reply to a shell request and for its idle status."""
        answer = Answer(self.reply(msg_id))
        answer.iopub = self.iopub(msg_id)
        return answer

    def reply(self, msg_id: str) -> dict[str, Any]:
        """Give the reply to one shell request, and drop those to others."""
        while True:
            message = self.kc.get_shell_msg(timeout=TIMEOUT_S)
            if message["parent_header"].get("msg_id") == msg_id:
                return message

    def iopub(self, msg_id: str) -> list[dict[str, Any]]:
        """Give the iopub messages of one request up to its idle status."""
        found = []
        while True:
            message = self.kc.get_iopub_msg(timeout=TIMEOUT_S)
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            if message["msg_type"] != "status":
                found.append(message)
            elif message["content"]["execution_state"] == "idle":
                return found

    def await_iopub(self, msg_id: str, msg_type: str) -> dict[str, Any]:
        """Wait for a message of one type."""
        while True:
            message = self.kc.get_iopub_msg(timeout=TIMEOUT_S)
            same = message["parent_header"].get("msg_id") == msg_id
            if same and message["msg_type"] == msg_type:
                return message

    def send(self, msg_type: str, content: dict[str, Any], **parts: Any) -> str:
        """Send any message on the shell channel; give its id."""
        message = self.kc.session.msg(msg_type, content)
        socket = self.kc.shell_channel.socket
        self.kc.session.send(socket, message, **parts)
        return message["header"]["msg_id"]

    def ask(self, msg_type: str, content: dict[str, Any]) -> Answer:
        """Send any request on the shell channel and wait for its end."""
        return self.finish(self.send(msg_type, content))

    def control(self, msg_type: str, content: dict[str, Any]) -> dict[str, Any]:
        """Send a request on the control channel and give the content of its reply."""
        message = self.kc.session.msg(msg_type, content)
        self.kc.control_channel.send(message)
        while True:
            reply = self.kc.get_control_msg(timeout=TIMEOUT_S)
            if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                return reply["content"]


@contextmanager
def fake_kernel(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Client]:
    """Start a kernel whose sessions are fakes, in a process of its own."""
    manager = KernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "tests.fakes.session", "-f", "{connection_file}", *arguments],
        display_name="fake",
        language="python",
        interrupt_mode="message",
    )
    manager.start_kernel(cwd=str(ROOT), env={**os.environ, **(env or {})})
    client = None
    try:
        client = Client(manager)
        yield client
    finally:
        if client is not None:
            client.kc.stop_channels()
        manager.shutdown_kernel(now=True)
