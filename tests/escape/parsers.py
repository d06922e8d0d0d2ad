"""Everything that parses what a hostile cell, or a user in haste, has written: one call for each.

`python -m tests.escape.parsers NAME [libFuzzer options]` lets atheris look for bytes that break one
(needs `pip install atheris`); `test_fuzz` lets hypothesis do it, for a moment, in every run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from sandbox_kernel.config import SandboxConfig, ceiling_of, limits_of, parse_cell
from sandbox_kernel.container import control
from sandbox_kernel.errors import ConfigError
from sandbox_kernel.guest import wire
from sandbox_kernel.units import parse_duration, parse_size

LIMITS = limits_of(SandboxConfig())
CEILING = ceiling_of(SandboxConfig(), LIMITS)


def frames(data: bytes) -> None:
    """Cut bytes into frames, at once and byte by byte: both see the same, or are refused alike."""
    whole, pieces = _decoded([data]), _decoded([bytes((byte,)) for byte in data[:4096]])
    assert len(data) > 4096 or whole == pieces


def _decoded(pieces: list[bytes]) -> tuple[list[wire.Frame], str]:
    decoder, found = wire.Decoder(), []
    try:
        for piece in pieces:
            for frame in decoder.feed(piece):
                assert isinstance(frame.body, dict)
                assert isinstance(frame.op, str)
                found.append(frame)
    except wire.WireError as error:
        return found, str(error)
    return found, ""


def framed(data: bytes) -> None:
    """Read bytes as the JSON of one frame, with a prefix that is right."""
    half = len(data) // 2
    text, raw = data[:half], data[half:]
    frames(wire.PREFIX.pack(wire.MAGIC, len(text), len(raw)) + text + raw)


def packet(data: bytes) -> None:
    """Receive bytes as one packet of the control channel."""
    ours, theirs = control.pair()
    with ours, theirs:
        theirs.send(data[: control.MAX_PACKET_BYTES] or b"{}")
        with contextlib.suppress(ValueError):
            received = control.receive(ours)
            assert received is not None
            assert isinstance(received.op, str)


def cell_line(data: bytes) -> None:
    """Read text as the settings of a `%%sandbox` line."""
    with contextlib.suppress(ConfigError):
        limits, code = parse_cell(f"%%sandbox {data.decode('utf-8', 'replace')}", LIMITS, CEILING)
        assert isinstance(code, str)
        assert limits.memory_bytes <= CEILING.memory_bytes
        assert limits.wall_time_s <= CEILING.wall_time_s
        assert limits.processes <= CEILING.processes


def size(data: bytes) -> None:
    """Read text as a size."""
    with contextlib.suppress(ConfigError):
        assert parse_size(data.decode("utf-8", "replace")) >= 0


def duration(data: bytes) -> None:
    """Read text as a duration."""
    with contextlib.suppress(ConfigError):
        assert 0 <= parse_duration(data.decode("utf-8", "replace")) < float("inf")


PARSERS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "framed": framed,
    "packet": packet,
    "cell_line": cell_line,
    "size": size,
    "duration": duration,
}


def main(name: str, options: list[str]) -> None:
    """Fuzz one parser until it breaks or the options say that it is enough."""
    import atheris

    atheris.instrument_all()
    atheris.Setup([sys.argv[0], *options], PARSERS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
