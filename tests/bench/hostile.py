"""What a limit costs the user: how soon its breach is told, and how soon the next cell is taken.

The kernel under test has bars of its own here; stock ipykernel has no limits to compare with, and
is measured only where it answers questions beside a flood.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.bench.measure import BenchError
from tests.bench.report import Measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.measure import Probe

WALL_MS, GRACE_MS = 200.0, 2000.0
"""The limit that the cells below set, and the grace that a kernel gives unless told otherwise."""
LATE_MS, NEXT_MS, ANSWER_MS = 500.0, 50.0, 100.0
ASKED_IN_A_FLOOD = 5
FLOOD_S = 0.3
"""How long a flood runs before the first question: it has filled every buffer by then."""

STOP_LATE = Measure("limit-stop", "limit of time to its error", "ms", most=LATE_MS)
KILL_LATE = Measure("limit-kill", "limit and grace to its error", "ms", most=LATE_MS)
MEMORY_LATE = Measure("limit-memory", "limit of memory to its error", "ms", most=LATE_MS)
NEXT_CELL = Measure("after-kill", "pass, behind a cell that was killed", "ms", most=NEXT_MS)
FLOOD_INFO = Measure("flood-info", "kernel_info while a cell floods", "ms", most=ANSWER_MS)
SUBJECT_ONLY = (STOP_LATE, KILL_LATE, MEMORY_LATE, NEXT_CELL)
HOSTILE_MEASURES = (*SUBJECT_ONLY, FLOOD_INFO)

ENDLESS = f"%%sandbox wall_time={WALL_MS / 1e3:g}s\nwhile True: pass"
DEAF = (
    f"%%sandbox wall_time={WALL_MS / 1e3:g}s\n"
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
)
# CLOCK_MONOTONIC is the same for all processes: so the last time printed is that of the breach.
HOG = (
    "%%sandbox memory=128M\nimport time\nheld = []\nwhile True:\n"
    "    print(time.perf_counter()); held.append(bytearray(1 << 20))"
)
EXIT = "import os; os._exit(1)"
FLOOD = "line = 'x' * 79\nwhile True:\n    print(line)"


def take(probe: Probe, measure: Measure) -> list[float]:
    """Take samples of one measure, in milliseconds; raises BenchError."""
    steps: dict[Measure, Callable[[Probe], list[float]]] = {
        STOP_LATE: lambda probe: _late_ms(probe, ENDLESS, WALL_MS),
        KILL_LATE: lambda probe: _late_ms(probe, DEAF, WALL_MS + GRACE_MS),
        MEMORY_LATE: _memory_late_ms,
        NEXT_CELL: _next_cell_ms,
        FLOOD_INFO: _flood_info_ms,
    }
    return steps[measure](probe)


def _late_ms(probe: Probe, code: str, due_ms: float) -> list[float]:
    probe.think(0.1)
    exchange = probe.execute(code, expect="error")
    _expect_name(exchange.reply, "WallTimeLimitExceeded")
    return [exchange.total_s * 1e3 - due_ms]


def _memory_late_ms(probe: Probe) -> list[float]:
    probe.think(0.1)
    exchange = probe.execute(HOG, expect="error")
    _expect_name(exchange.reply, "MemoryLimitExceeded")
    times_s = exchange.last_text.split()
    if not times_s:
        raise BenchError("a memory hog printed nothing before it was killed")
    return [(exchange.sent_s + exchange.total_s - float(times_s[-1])) * 1e3]


def _next_cell_ms(probe: Probe) -> list[float]:
    probe.think(0.1)
    exchange = probe.execute(EXIT, expect="error")
    _expect_name(exchange.reply, "CellExited")
    return [probe.execute("pass").total_s * 1e3]


def _flood_info_ms(probe: Probe) -> list[float]:
    probe.think(0.1)
    exchange = probe.send(FLOOD)
    probe.listen(exchange, until=lambda: exchange.has_output)
    probe.think(FLOOD_S)
    answered_s = [probe.control_info() for _ in range(ASKED_IN_A_FLOOD)]
    probe.interrupt(exchange)
    probe.expect(exchange, "error")
    return [seconds * 1e3 for seconds in answered_s]


def _expect_name(reply: dict[str, object], name: str) -> None:
    if reply.get("ename") != name:
        raise BenchError(f"a cell ended as {reply.get('ename')!r} instead of {name}")
