"""Sizes and durations as people write them, in both directions.

Sizes are binary, as Docker and the kernel count them: `k`, `m`, `g` and `t` are powers of 1024,
with or without `b` or `ib` after them. Durations are seconds unless they say otherwise.
"""

from __future__ import annotations

import re

from sandbox_kernel.errors import ConfigError

SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
MAX_SIZE_BYTES = 1 << 62
"""Above this, page counters of the kernel overflow."""
MAX_DURATION_S = 366 * 86400.0

SIZE_HINT = "write a number and a unit, for example 512M, 1.5G or 64KiB"
DURATION_HINT = "write a number and a unit, for example 500ms, 5s, 2m or 1h30m"

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*(?:([kmgt])(?:i?b)?|(b?))", re.ASCII)
_PART = re.compile(r"(\d{1,12}(?:\.\d{1,20})?)\s*(ms|min|s|m|h|d)\s*", re.ASCII)
_NUMBER = re.compile(r"\d{1,12}(?:\.\d{1,20})?", re.ASCII)


def parse_size(text: str) -> int:
    """Give the bytes that a text such as `256M` stands for; raises ConfigError.

    A bare number counts bytes; a fraction of a byte is cut off.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(f"{text!r} is not a size", hint=SIZE_HINT)
    number, unit, plain = match.groups()
    factor = SIZE_UNITS[unit or plain or ""]
    # Whole numbers stay integers: a float holds only 53 bits of them.
    size_bytes = int(float(number) * factor) if "." in number else int(number) * factor
    if size_bytes > MAX_SIZE_BYTES:
        raise ConfigError(
            f"the size {text!r} is too large", hint=f"the most is {format_size(MAX_SIZE_BYTES)}"
        )
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Give a size as people read it, `512 MiB`, rounded to one decimal."""
    value = float(size_bytes)
    names = ("B", "KiB", "MiB", "GiB", "TiB")
    for index, name in enumerate(names):
        # Rounded first, so that one byte below a mebibyte reads `1 MiB`, not `1024 KiB`.
        rounded = round(value, 1)
        if rounded < 1024 or index == len(names) - 1:
            return f"{rounded:.0f} {name}" if rounded.is_integer() else f"{rounded:.1f} {name}"
        value /= 1024
    raise AssertionError("unreachable: the last unit returns")


def parse_duration(text: str) -> float:
    """Give the seconds that a text such as `5s`, `500ms` or `1h30m` stands for.

    A bare number counts seconds. Raises ConfigError; units must go from large to small.
    """
    lowered = text.strip().lower()
    if _NUMBER.fullmatch(lowered):
        return _bounded(float(lowered), text)
    total_s, position, last = 0.0, 0, float("inf")
    while (match := _PART.match(lowered, position)) is not None:
        factor = DURATION_UNITS[match[2]]
        if factor >= last:
            break
        total_s += float(match[1]) * factor
        position, last = match.end(), factor
    if not lowered or position != len(lowered):
        raise ConfigError(f"{text!r} is not a duration", hint=DURATION_HINT)
    return _bounded(total_s, text)


def _bounded(duration_s: float, text: str) -> float:
    if duration_s > MAX_DURATION_S:
        raise ConfigError(
            f"the duration {text!r} is too long",
            hint=f"the most is {format_duration(MAX_DURATION_S)}",
        )
    return duration_s


def format_duration(duration_s: float) -> str:
    """Give a duration as people read it: `12.5 ms`, `5 s`, `1 min 30 s`, `2 h`.

    Three digits below a minute, whole seconds above.
    """
    milliseconds = round(duration_s * 1000, 1 if duration_s < 0.1 else 0)
    if milliseconds < 1000:
        return f"{milliseconds:g} ms"
    seconds = round(duration_s, 2 if duration_s < 10 else 1)
    if seconds < 60:
        return f"{seconds:g} s"
    left = round(duration_s)
    parts = []
    for name, factor in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, factor)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts)
