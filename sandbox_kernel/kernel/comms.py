"""The comm messages of a client: widgets and the like, handed to the guest.

A handler that succeeds commits, as a cell does. One that breaks a limit loses its comm, never
the kernel. Targets that nobody registered are refused by the guest, as ipykernel does.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from sandbox_kernel.errors import SandboxError
from sandbox_kernel.kernel.report import error_of
from sandbox_kernel.model import CommMessage

if TYPE_CHECKING:
    from sandbox_kernel.kernel.engine import Engine
    from sandbox_kernel.kernel.publish import Publisher
    from sandbox_kernel.model import Json, SessionSpec

COMM_TYPES = ("comm_open", "comm_msg", "comm_close")


def header_of(msg: Json) -> Json:
    """Give the header of a message as JSON: its date was parsed on arrival."""
    return {
        key: value.isoformat() if isinstance(value, datetime) else value
        for key, value in msg.get("header", {}).items()
    }


def comm_info(session: Engine | None, target_name: str | None) -> Json:
    """Give the content of a `comm_info_reply`: all comms, or those of one target."""
    known = {} if session is None else session.comms
    comms = {
        comm_id: {"target_name": target}
        for comm_id, target in known.items()
        if target_name in (None, target)
    }
    return {"status": "ok", "comms": comms}


async def relay(session: Engine, spec: SessionSpec, msg: Json, publisher: Publisher) -> None:
    """Hand one comm message to the guest and publish what comes of it.

    A failure is told on stderr, since comm messages have no reply, and closes the comm.
    """
    content = msg["content"]
    message = CommMessage(
        msg["header"]["msg_type"],
        content,
        msg.get("metadata", {}),
        tuple(bytes(buffer) for buffer in msg.get("buffers", ())),
        parent=header_of(msg),
    )
    try:
        result = await session.comm(message, publisher.take_output)
    except SandboxError as error:
        _close(publisher, content, f"{type(error).__name__}: {error}")
        return
    # Which cell's limits a handler had is of no interest here, only that it broke one.
    killed = error_of(replace(result, traceback=()), ceiling=spec.ceiling, grace_s=spec.grace_s)
    for note in result.notes:
        publisher.text("stderr", note.rstrip("\n") + "\n")
    if killed is None:
        publisher.flush()
        return
    publisher.close_comms()
    _close(publisher, content, f"{killed.ename}: {killed.evalue}")


def _close(publisher: Publisher, content: Json, why: str) -> None:
    comm_id = content.get("comm_id", "")
    publisher.text("stderr", f"The comm {comm_id} was closed. {why}\n")
    publisher.send("comm_close", {"comm_id": comm_id, "data": {}})
