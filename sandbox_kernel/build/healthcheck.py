"""HEALTHCHECK: kept in the config for engines that check their containers."""

from __future__ import annotations

import re

from sandbox_kernel.build.flags import Flags, read_flags
from sandbox_kernel.build.instructions import Command, Healthcheck
from sandbox_kernel.build.json_form import json_list
from sandbox_kernel.build.lexer import Line
from sandbox_kernel.errors import BuildError

_UNITS_NS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60 * 1_000_000_000,
    "h": 3600 * 1_000_000_000,
}
_PART = re.compile(r"(\d{1,15})(?:\.(\d{1,15}))?(ns|us|µs|ms|s|m|h)", re.ASCII)
_MAX_NS = (1 << 63) - 1
_TIMES = {
    "interval": "Interval",
    "timeout": "Timeout",
    "start-period": "StartPeriod",
    "start-interval": "StartInterval",
}


def healthcheck(line: Line, _escape: str) -> Healthcheck:
    """Read a HEALTHCHECK; raises BuildError."""
    kind, *others = line.rest.split(None, 1) or [""]
    rest = others[0] if others else ""
    if kind.upper() == "NONE":
        read_flags(line)
        if rest:
            raise BuildError("HEALTHCHECK NONE with arguments", hint="write HEALTHCHECK NONE")
        return Healthcheck(line.place, None)
    flags = read_flags(line, texts=(*_TIMES, "retries"))
    if kind.upper() != "CMD" or not rest:
        raise BuildError(
            "HEALTHCHECK without a command", hint="write HEALTHCHECK CMD command, or NONE"
        )
    argv = json_list(rest)
    if argv == ():
        raise BuildError("HEALTHCHECK CMD of an empty list", hint="name a program in it")
    command = Command(argv or (rest,), argv is None, malformed=argv is None and rest[0] == "[")
    times = tuple((key, _time_ns(flags, name)) for name, key in _TIMES.items() if flags.text(name))
    return Healthcheck(line.place, command, times, _retries(flags.text("retries", "0")))


def _retries(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise BuildError(f"HEALTHCHECK --retries={text}", hint="write a number, 0 or more")
    return int(text)


def _time_ns(flags: Flags, name: str) -> int:
    """Give the nanoseconds of a duration as Go writes it: 1m30s, 1.5h, 500ms."""
    text = flags.text(name)
    parts = list(_PART.finditer(text))
    whole = "".join(part[0] for part in parts)
    total_ns = 0
    for part in parts:
        unit_ns, fraction = _UNITS_NS[part[3]], part[2] or "0"
        total_ns += int(part[1]) * unit_ns + int(fraction) * unit_ns // 10 ** len(fraction)
    if text != "0" and (not parts or whole != text):
        raise BuildError(
            f"HEALTHCHECK --{name}={text} is no duration", hint="write 30s, 500ms or 1m30s"
        )
    if total_ns > _MAX_NS or 0 < total_ns < 1_000_000:
        raise BuildError(
            f"HEALTHCHECK --{name}={text}", hint="the least is 1ms, the most 290 years"
        )
    return total_ns
