"""EXPOSE: ports and ranges of ports, each with its protocol."""

from __future__ import annotations

import re

from sandbox_kernel.errors import BuildError

PROTOCOLS = ("tcp", "udp", "sctp")
MAX_PORT = 65535

_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


def published(text: str) -> tuple[str, str, str]:
    """Split `[address:][host port:]port[/protocol]` into what is before the port, it, the rest."""
    before, _, last = text.rpartition(":")
    port, _, protocol = last.partition("/")
    return before, port, protocol


def exposed_ports(text: str) -> tuple[str, ...]:
    """Give each port of an EXPOSE word as `80/tcp`; raises BuildError.

    An address or a port of the host is nothing that an image can say, and left out as Docker does.
    """
    _, port, protocol = published(text)
    protocol = protocol.lower() or "tcp"
    match = _RANGE.fullmatch(port)
    first = int(match[1]) if match else -1
    last = int(match[2] or match[1]) if match else -1
    if protocol not in PROTOCOLS or not 0 <= first <= last <= MAX_PORT:
        raise BuildError(
            f"EXPOSE {text}",
            hint=f"write a port up to {MAX_PORT} or a range, and /tcp, /udp or /sctp after it",
        )
    return tuple(f"{number}/{protocol}" for number in range(first, last + 1))
