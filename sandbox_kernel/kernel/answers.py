"""Answers that need no cell: what the kernel is, whether code is complete, what is used.

What a guest answers to a question is put into the shape that the protocol wants here, so that a
guest that answers nonsense gives a client nothing worse than an empty reply.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from sandbox_kernel.model import Json, Limits, Outcome, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandbox_kernel.kernel.report import CellError
    from sandbox_kernel.model import CellResult

PROTOCOL_VERSION = "5.5"
IMPLEMENTATION = "sandbox_kernel"
PAYLOADS = frozenset({"page", "set_next_input", "edit_magic", "ask_exit"})


@functools.cache
def version() -> str:
    """Give the installed version of this package; 0.0.0 in a bare checkout."""
    try:
        return importlib.metadata.version("sandbox-kernel")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"


def kernel_info() -> Json:
    """Give the content of a `kernel_info_reply`; it advertises only what works."""
    python = platform.python_version()
    return {
        "protocol_version": PROTOCOL_VERSION,
        "implementation": IMPLEMENTATION,
        "implementation_version": version(),
        "language_info": {
            "name": "python",
            "version": python,
            "mimetype": "text/x-python",
            "codemirror_mode": {"name": "ipython", "version": 3},
            "pygments_lexer": "ipython3",
            "nbconvert_exporter": "python",
            "file_extension": ".py",
        },
        "banner": f"Python {python}, every cell in a fresh container (sandbox_kernel {version()})",
        "help_links": [
            {
                "text": "Python Reference",
                "url": f"https://docs.python.org/{sys.version_info[0]}.{sys.version_info[1]}",
            },
            {"text": "IPython Reference", "url": "https://ipython.readthedocs.io/en/stable/"},
        ],
        "supported_features": [],
    }


def is_complete(code: str) -> Json:
    """Tell whether a client should send the code or go on asking for lines."""
    # Imported here because only consoles ask, and it is slow to load.
    from IPython.core.inputtransformer2 import TransformerManager  # noqa: PLC0415

    status, indent = TransformerManager().check_complete(code)
    reply: Json = {"status": status}
    if status == "incomplete":
        reply["indent"] = " " * (indent or 0)
    return reply


def without_sandbox_line(code: str) -> str:
    """Blank a `%%sandbox` line out, every character after it at its place.

    The guest's completer knows no such magic and would take the cell for the magic's text.
    """
    head, newline, rest = code.partition("\n")
    return " " * len(head) + newline + rest if head.split(None, 1)[:1] == ["%%sandbox"] else code


def complete_reply(answer: Json, cursor_pos: int) -> Json:
    """Give the content of a `complete_reply` from a guest's answer, however it looks."""
    matches = answer.get("matches")
    if not isinstance(matches, list) or not all(isinstance(match, str) for match in matches):
        matches = []
    start, end = answer.get("cursor_start"), answer.get("cursor_end")
    metadata = answer.get("metadata")
    return {
        "status": "ok",
        "matches": matches,
        "cursor_start": start if isinstance(start, int) else cursor_pos,
        "cursor_end": end if isinstance(end, int) else cursor_pos,
        "metadata": metadata if isinstance(metadata, dict) else {},
    }


def inspect_reply(answer: Json) -> Json:
    """Give the content of an `inspect_reply` from a guest's answer, however it looks."""
    data, metadata = answer.get("data"), answer.get("metadata")
    data = data if isinstance(data, dict) else {}
    return {
        "status": "ok",
        "found": answer.get("found") is True and bool(data),
        "data": data,
        "metadata": metadata if isinstance(metadata, dict) else {},
    }


def execute_reply(result: CellResult, error: CellError | None) -> Json:
    """Give the content of an `execute_reply`, without its count.

    `error` is the kernel's own word for a killed cell; without one the guest's reply counts.
    """
    said = result.reply
    if error is not None:
        reply: Json = {"status": "error", **error.content()}
    elif result.outcome is Outcome.OK:
        reply = {"status": "ok"}
    else:
        reply = {"status": "error", **_said_error(said)}
    expressions = said.get("user_expressions")
    ok = reply["status"] == "ok" and isinstance(expressions, dict)
    reply["user_expressions"] = expressions if ok else {}
    reply["payload"] = _payload(said.get("payload")) if error is None else []
    return reply


def _said_error(said: Json) -> Json:
    lines = said.get("traceback")
    return {
        "ename": str(said.get("ename", "Error")),
        "evalue": str(said.get("evalue", "")),
        "traceback": [str(line) for line in lines] if isinstance(lines, list) else [],
    }


def _payload(items: object) -> list[Json]:
    if not isinstance(items, list):
        return []
    return [item for item in items if isinstance(item, dict) and _is_known(item.get("source"))]


def _is_known(source: object) -> bool:
    return isinstance(source, str) and source in PAYLOADS


class Meter:
    """Turn a session's total of processor time into per cent since the last question."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = clock()
        self._last_cpu_s = 0.0

    def percent(self, cpu_s: float) -> float:
        """Give the share of one processor, 100 for one that was busy all the time."""
        now_s = self._clock()
        spent_s, passed_s = cpu_s - self._last_cpu_s, now_s - self._last_s
        self._last_s, self._last_cpu_s = now_s, cpu_s
        return max(0.0, 100.0 * spent_s / passed_s) if passed_s > 0 else 0.0


def usage_reply(usage: Usage, limits: Limits | None, kernel_cpu: float) -> Json:
    """Give the content of a `usage_reply`; the memory of the "host" is the cell's limit.

    So the panel that clients have for it shows how much is left before a cell is killed.
    """
    used = usage.peak_memory_bytes or 0
    reply: dict[str, Any] = {
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "kernel_cpu": kernel_cpu,
        "kernel_memory": used,
        "cpu_count": os.cpu_count() if limits is None else limits.cpus,
    }
    if limits is not None:
        total = limits.memory_bytes
        free = max(0, total - used)
        reply["host_virtual_memory"] = {
            "total": total,
            "available": free,
            "percent": round(100.0 * min(used, total) / total, 1),
            "used": used,
            "free": free,
        }
        reply["host_cpu_percent"] = min(100.0, kernel_cpu / limits.cpus)
    return reply
