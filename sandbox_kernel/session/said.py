"""What a guest says while a request runs, checked: messages to publish, and its last word.

Everything here comes from a hostile process. What breaks a rule raises ProtocolError, which ends
the guest.
"""

from __future__ import annotations

from dataclasses import dataclass

from sandbox_kernel.errors import ProtocolError
from sandbox_kernel.model import Json

PUBLISHABLE = frozenset(
    (
        "display_data",
        "update_display_data",
        "execute_result",
        "clear_output",
        "error",
        "comm_open",
        "comm_msg",
        "comm_close",
    )
)
_MAX_COMMS = 10_000
_PUNCTUATION = 4
"""Quotes, a comma and a blank of each value, or the digits of a number."""


@dataclass(frozen=True)
class Done:
    """A guest's last word on a request."""

    reply: Json
    threads: tuple[str, ...]
    """Threads that outlive the cell and that a fork would lose."""
    fragile: tuple[str, ...]
    """Those among them whose library hangs without them."""
    comms: tuple[tuple[str, str], ...]
    alone: bool
    """Whether the guest has one thread, and can park; else a fork of it parks."""

    @classmethod
    def read(cls, body: Json) -> Done:
        """Read the frame in which a guest says that it is done."""
        reply = body.get("reply")
        if not isinstance(reply, dict) or reply.get("status") not in ("ok", "error"):
            raise ProtocolError("a cell is done without a reply")
        if reply["status"] == "error":
            check_content("error", reply)
        return cls(
            reply,
            _texts(body.get("threads")),
            _texts(body.get("fragile")),
            _comms(body.get("comms")),
            body.get("alone") is True,
        )


def check_content(kind: str, content: Json) -> None:
    """Check the fields of a message that this side or a client relies on."""
    if kind == "error":
        trace = content.get("traceback")
        texts = (content.get("ename"), content.get("evalue"))
        if not all(isinstance(text, str) for text in texts) or not isinstance(trace, list):
            raise ProtocolError("a cell sent an error without name, value and traceback")
        content["traceback"] = [str(line) for line in trace]
    elif kind in ("display_data", "update_display_data", "execute_result"):
        if not isinstance(content.get("data"), dict) or not isinstance(
            content.get("metadata"), dict
        ):
            raise ProtocolError(f"a cell sent a {kind} without data")
    elif kind.startswith("comm_") and not isinstance(content.get("comm_id"), str):
        raise ProtocolError(f"a cell sent a {kind} without a comm")


def size_of(content: Json) -> int:
    """Give about how many characters a content has as text, without making that text."""
    size, waiting = 0, [content]
    while waiting:
        value: object = waiting.pop()
        if isinstance(value, dict):
            size += sum(map(len, value))
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            size += len(value)
        size += _PUNCTUATION
    return size


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ProtocolError("a cell is done without its list of threads")
    return tuple(str(item)[:200] for item in value[:1000])


def _comms(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict) or len(value) > _MAX_COMMS:
        raise ProtocolError("a cell is done without its list of comms")
    return tuple((str(name)[:200], str(target)[:1000]) for name, target in value.items())
