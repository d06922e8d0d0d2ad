"""What one request publishes on iopub: in order, merged into few messages, well formed.

Text of a cell is merged: the first line goes out at once, so that a user sees it without delay,
what follows at most every 50 ms. Any other message first sends the text before it.
"""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any

from sandbox_kernel.model import Event, InputRequest, Json, Message, Stream

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from sandbox_kernel.kernel.report import CellError

    Buffers = list[bytes | memoryview[bytes]]
    Send = Callable[[str, Json, Json | None, Buffers | None], None]
    """Send a message on iopub: type, content, metadata, buffers."""

FLUSH_EVERY_S = 0.05
LINE_WITHIN_S = 0.005
"""How long the first piece waits for the end of its line: `print` writes the two apart."""
MAX_PENDING_BYTES = 256 * 1024

_log = logging.getLogger(__name__)


class StreamMerger:
    """Merge pieces of text into stream messages; `write` sends one of them."""

    def __init__(self, write: Callable[[str, str], None], loop: asyncio.AbstractEventLoop) -> None:
        self._write = write
        self._loop = loop
        self._name = ""
        self._pieces: list[str] = []
        self._pending = 0
        self._timer: asyncio.TimerHandle | None = None
        self._awaits_line = False

    def push(self, name: str, text: str) -> None:
        """Take one piece; it is sent now or, at the latest, when the timer fires."""
        if not text:
            return
        if name != self._name:
            self._send()
            self._name = name
        self._pieces.append(text)
        self._pending += len(text)
        if self._timer is None:
            self._awaits_line = True
            self._timer = self._loop.call_later(LINE_WITHIN_S, self._tick)
        if self._awaits_line and text.endswith("\n"):
            self._timer.cancel()
            self._tick()
        elif self._pending >= MAX_PENDING_BYTES:
            self._send()

    def flush(self) -> None:
        """Send what is pending; the next piece goes out at once again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._send()

    def _tick(self) -> None:
        self._timer = None
        self._awaits_line = False
        if self._pieces:
            self._send()
            self._timer = self._loop.call_later(FLUSH_EVERY_S, self._tick)

    def _send(self) -> None:
        if self._pieces:
            text = "".join(self._pieces)
            self._pieces.clear()
            self._pending = 0
            self._write(self._name, text)


class Publisher:
    """Publish the events of one request; remember what the kernel must know of them."""

    def __init__(self, send: Send, loop: asyncio.AbstractEventLoop) -> None:
        self._send = send
        self._streams = StreamMerger(self._write, loop)
        self.opened_comms: list[str] = []
        """Ids of comms that the request opened and did not close."""
        self.result_text: str | None = None
        """The text of the last `execute_result`, for the history."""

    def take(self, event: Stream | Message) -> None:
        """Publish one event of the guest; a malformed message is dropped and logged."""
        if isinstance(event, Stream):
            self._streams.push(event.name, event.text)
            return
        content = checked(event)
        if content is None:
            _log.warning("the guest sent a malformed %s, dropped", event.msg_type)
            return
        self._note(event.msg_type, content)
        self._streams.flush()
        self._safe_send(event.msg_type, content, event.metadata, list(event.buffers))

    def take_output(self, event: Event) -> None:
        """Publish an event of a request that cannot ask the user anything."""
        if not isinstance(event, InputRequest):
            self.take(event)

    def text(self, name: str, text: str) -> None:
        """Publish text of the kernel itself on `stdout` or `stderr`."""
        self._streams.push(name, text)

    def error(self, error: CellError) -> None:
        """Publish an error of the kernel itself."""
        self.send("error", error.content())

    def send(self, msg_type: str, content: Json) -> None:
        """Publish a message of the kernel itself, after the text before it."""
        self._streams.flush()
        self._safe_send(msg_type, content, None, None)

    def close_comms(self) -> None:
        """Tell the client that the comms of this request are gone."""
        for comm_id in self.opened_comms:
            self.send("comm_close", {"comm_id": comm_id, "data": {}})
        self.opened_comms.clear()

    def flush(self) -> None:
        """Send all pending text."""
        self._streams.flush()

    def _note(self, msg_type: str, content: Json) -> None:
        if msg_type == "comm_open":
            self.opened_comms.append(content["comm_id"])
        elif msg_type == "comm_close" and content["comm_id"] in self.opened_comms:
            self.opened_comms.remove(content["comm_id"])
        elif msg_type == "execute_result":
            text = content["data"].get("text/plain")
            self.result_text = text if isinstance(text, str) else None

    def _write(self, name: str, text: str) -> None:
        self._safe_send("stream", {"name": name, "text": text}, None, None)

    def _safe_send(
        self, msg_type: str, content: Json, metadata: Json | None, buffers: Buffers | None
    ) -> None:
        try:
            self._send(msg_type, content, metadata, buffers)
        except (ValueError, TypeError):
            # Strings with lone surrogates cannot be sent; UnicodeError is a ValueError.
            clean = None if metadata is None else encodable(metadata)
            self._send(msg_type, encodable(content), clean, buffers)


_SHAPES: dict[str, dict[str, type]] = {
    "display_data": {"data": dict, "metadata": dict},
    "update_display_data": {"data": dict, "metadata": dict, "transient": dict},
    "execute_result": {"data": dict, "metadata": dict, "execution_count": int},
    "clear_output": {"wait": bool},
    "error": {"ename": str, "evalue": str, "traceback": list},
    "comm_open": {"comm_id": str, "target_name": str, "data": dict},
    "comm_msg": {"comm_id": str, "data": dict},
    "comm_close": {"comm_id": str, "data": dict},
}
_OPTIONAL: dict[str, Any] = {"metadata": {}, "wait": False, "data": {}}


def checked(message: Message) -> Json | None:
    """Give the content of a guest's message with the keys its type must have; None if it lies."""
    shape = _SHAPES.get(message.msg_type)
    if shape is None:
        return None
    content = dict(message.content)
    for key, kind in shape.items():
        if key not in content and key in _OPTIONAL:
            content[key] = _OPTIONAL[key]
        if not isinstance(content.get(key), kind):
            return None
    if not all(isinstance(line, str) for line in content.get("traceback", ())):
        return None
    return content


def encodable(value: Any) -> Any:
    """Give the value as it is if it can be sent as UTF-8 JSON, else a copy that can."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return _cleaned(value, depth=0)
    return value


def _cleaned(value: Any, depth: int) -> Any:
    if depth > 100:
        return "..."
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_cleaned(str(k), depth): _cleaned(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
