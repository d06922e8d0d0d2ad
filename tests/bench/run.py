"""What is measured, and in which order: one function per phase."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.bench import hostile, kernels
from tests.bench.hostile import HOSTILE_MEASURES, SUBJECT_ONLY
from tests.bench.images import IMAGE_MEASURES, images
from tests.bench.measure import BenchError
from tests.bench.report import SIDES, STOCK, SUBJECT, Measure, Series, interleave

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.kernels import KernelChoice, RunningKernel
    from tests.bench.measure import Probe

THINK_S = 0.1
SETTLE_S = 0.5
"""How long a session rests before it is weighed: what it prepares ahead belongs to it."""
BLOCK = 10
LINES, LINE_BYTES = 100_000, 80

START = Measure("start", "start to ready", "ms", bar=1.0)
FIRST_CELL = Measure("first-cell", "start to end of first cell", "ms")
WEIGHT = Measure("memory", "memory of an idle session (PSS)", "MB")
PROCESSES = Measure("processes", "processes of an idle session", "")
PASS_THINK = Measure("pass-think", "pass, 100 ms between cells", "ms", bar=1.0)
PASS_BACK_TO_BACK = Measure("pass-back-to-back", "pass, back to back", "ms", bar=2.5)
FIRST_OUTPUT = Measure("first-output", "print(1) to first output", "ms", bar=1.2)
STDOUT = Measure("stdout", "stdout, 100 000 lines of 80 bytes", "MB/s", 1.0, more_is_better=True)
INTERRUPT = Measure("interrupt", "interrupt to idle", "ms")
PASS_ARRAY = Measure("pass-1gb-array", "pass with a 1 GB array alive", "ms", bar=3.0)
PASS_OBJECTS = Measure("pass-1gb-objects", "pass with 1 GB in 250 000 objects alive", "ms")
BARE = Measure("bare-python", "python -c pass: bare | in bubblewrap", "ms")

CELL_MEASURES = (PASS_THINK, PASS_BACK_TO_BACK, FIRST_OUTPUT, STDOUT, INTERRUPT)
KERNEL_MEASURES = (START, FIRST_CELL, WEIGHT, PROCESSES, *CELL_MEASURES, PASS_ARRAY, BARE)
ALL_MEASURES = (*KERNEL_MEASURES, *HOSTILE_MEASURES, *IMAGE_MEASURES)
OPTIONAL_MEASURES = (PASS_OBJECTS,)

MAKE_ARRAY = """\
import numpy
held = numpy.empty(1_000_000_000 // 8)
held[:] = 1.0
"""
# The length varies so that the compiler cannot make one constant of it.
MAKE_OBJECTS = "held = [b'x' * (4000 + i % 7) for i in range(250_000)]"


@dataclass(frozen=True)
class Settings:
    """How much is measured, and on what."""

    stock: KernelChoice
    subject: KernelChoice
    executions: int
    starts: int
    warm_up: int
    wanted: frozenset[str]

    @property
    def floods(self) -> int:
        """How often the long measures, stdout and interrupt, are taken."""
        return max(4, self.executions // 10)

    def choice(self, side: str) -> KernelChoice:
        """Give the kernel of a side."""
        return self.stock if side == STOCK else self.subject


class Bench:
    """A run over all phases; `advance(title, done, total)` is told of every step."""

    def __init__(self, settings: Settings, advance: Callable[[str, int, int], None]) -> None:
        self._settings = settings
        self._advance = advance

    def run(self) -> Iterator[Series]:
        """Measure everything that is wanted; a measure that fails says so and the run goes on."""
        yield from self._starts()
        with Pair(self._settings) as pair:
            for measure in (*CELL_MEASURES, *HOSTILE_MEASURES):
                yield from self._cells(pair, measure)
        for measure, code in ((PASS_ARRAY, MAKE_ARRAY), (PASS_OBJECTS, MAKE_OBJECTS)):
            # Kernels of their own: former states of these sessions hold the memory too.
            with Pair(self._settings, setup=code) as pair:
                yield from self._cells(pair, measure)
        yield from self._bare_processes()
        yield from self._images()

    def _wanted(self, *measures: Measure) -> bool:
        return any(measure.key in self._settings.wanted for measure in measures)

    def _starts(self) -> Iterator[Series]:
        measures = (START, FIRST_CELL, WEIGHT, PROCESSES)
        if not self._wanted(*measures):
            return
        series = {measure.key: Series(measure) for measure in measures}
        with recorded(*series.values()):
            # One start each that is not counted fills the page cache and the caches of bytecode.
            for side in SIDES:
                self._start_once(side, {})
            for done, (side, _) in enumerate(interleave(self._settings.starts, 1)):
                self._advance(START.title, done, 2 * self._settings.starts)
                self._start_once(side, series)
        yield from (one for one in series.values() if self._wanted(one.measure))

    def _start_once(self, side: str, series: dict[str, Series]) -> None:
        begin_s = time.perf_counter()
        with contextlib.closing(_Stopping(kernels.start(self._settings.choice(side)))) as held:
            kernel = held.kernel
            kernel.probe.execute("pass")
            first_cell_s = time.perf_counter() - begin_s
            kernel.probe.think(SETTLE_S)
            weight = kernels.weigh(kernel.pid)
        if not series:
            return
        series[START.key].samples[side].append(kernel.ready_s * 1e3)
        series[FIRST_CELL.key].samples[side].append(first_cell_s * 1e3)
        series[WEIGHT.key].samples[side].append(weight.pss_bytes / 1e6)
        series[PROCESSES.key].samples[side].append(weight.processes)
        if weight.unreadable:
            series[WEIGHT.key].note(
                f"{side}: {weight.unreadable} of {weight.processes} processes could not be "
                "weighed (run as root)"
            )

    def _cells(self, pair: Pair, measure: Measure) -> Iterator[Series]:
        if not self._wanted(measure):
            return
        series = Series(measure)
        settings = self._settings
        rare = measure in (STDOUT, INTERRUPT, *HOSTILE_MEASURES)
        count, block = (settings.floods, 1) if rare else (settings.executions, BLOCK)
        with recorded(series):
            done = 0
            for side, size in interleave(count, block):
                self._advance(measure.title, done, 2 * count)
                if side == STOCK and measure in SUBJECT_ONLY:
                    continue
                try:
                    series.samples[side] += _take(pair.probe(side), series, side=side, size=size)
                except BenchError as error:
                    pair.drop(side)
                    raise BenchError(f"{side}: {error}") from error
                done += size
        yield series

    def _bare_processes(self) -> Iterator[Series]:
        if not self._wanted(BARE):
            return
        series = Series(BARE)
        python = [sys.executable, "-c", "pass"]
        bwrap = shutil.which("bwrap")
        commands = {STOCK: python}
        if bwrap is None:
            series.note("bubblewrap skipped: there is no bwrap on PATH")
        else:
            commands[SUBJECT] = [bwrap, "--unshare-all", "--ro-bind", "/", "/", *python]
        count = max(10, self._settings.executions // 4)
        with recorded(series):
            for done, (side, _) in enumerate(interleave(count, 1)):
                self._advance(BARE.title, done, 2 * count)
                if side not in commands:
                    continue
                elapsed_s, error = _time_process(commands[side])
                if error:
                    series.note(f"{side} skipped: {error}")
                    del commands[side]
                else:
                    series.samples[side].append(elapsed_s * 1e3)
        yield series

    def _images(self) -> Iterator[Series]:
        if not self._wanted(*IMAGE_MEASURES):
            return
        with images(self._settings.starts, self._advance) as phase:
            for measure in filter(self._wanted, IMAGE_MEASURES):
                series = Series(measure)
                with recorded(series):
                    phase.take(series)
                yield series


class Pair:
    """Both kernels, warm, side by side; each is started when it is first asked for."""

    def __init__(self, settings: Settings, *, setup: str = "") -> None:
        self._settings = settings
        self._setup = setup
        self._running: dict[str, RunningKernel] = {}

    def __enter__(self) -> Pair:
        """Start nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what was started."""
        for side in tuple(self._running):
            self.drop(side)

    def probe(self, side: str) -> Probe:
        """Give the client of a side's kernel; raises BenchError if it cannot be started."""
        if side not in self._running:
            kernel = self._running[side] = kernels.start(self._settings.choice(side))
            for _ in range(self._settings.warm_up):
                kernel.probe.execute("pass")
            if self._setup:
                kernel.probe.execute(self._setup)
        return self._running[side].probe

    def drop(self, side: str) -> None:
        """Stop the kernel of a side, so that the next measure gets a fresh one."""
        kernel = self._running.pop(side, None)
        if kernel is not None:
            kernel.stop()


@dataclass(frozen=True)
class _Stopping:
    kernel: RunningKernel

    def close(self) -> None:
        self.kernel.stop()


@contextlib.contextmanager
def recorded(*all_series: Series) -> Iterator[None]:
    """Record the load around a phase, and a failure instead of raising it."""
    before = os.getloadavg()[0]
    try:
        yield
    except BenchError as error:
        for series in all_series:
            series.failed = True
            series.note(str(error))
    for series in all_series:
        series.load = (before, os.getloadavg()[0])


def _take(probe: Probe, series: Series, *, side: str, size: int) -> list[float]:
    if series.measure == PASS_BACK_TO_BACK:
        # The one before a block is not counted: it had time to be prepared.
        probe.execute("pass")
        return [probe.execute("pass").total_s * 1e3 for _ in range(size)]
    if series.measure == FIRST_OUTPUT:
        return [_first_output_ms(probe) for _ in range(size)]
    if series.measure == STDOUT:
        return [_flood_mb_per_s(probe, series, side) for _ in range(size)]
    if series.measure in HOSTILE_MEASURES:
        return hostile.take(probe, series.measure)
    if series.measure == INTERRUPT:
        return [_interrupt_ms(probe) for _ in range(size)]
    return [_pass_ms(probe) for _ in range(size)]


def _pass_ms(probe: Probe) -> float:
    probe.think(THINK_S)
    return probe.execute("pass").total_s * 1e3


def _first_output_ms(probe: Probe) -> float:
    probe.think(THINK_S)
    exchange = probe.execute("print(1)")
    if exchange.first_output_s is None:
        raise BenchError("print(1) gave no output before the cell ended")
    return exchange.first_output_s * 1e3


def _flood_mb_per_s(probe: Probe, series: Series, side: str) -> float:
    probe.think(THINK_S)
    line = f"'x' * {LINE_BYTES - 1}"
    exchange = probe.execute(f"line = {line}\nfor _ in range({LINES}):\n    print(line)")
    sent = LINES * LINE_BYTES
    if exchange.stdout_bytes != sent:
        series.note(f"{side}: {exchange.stdout_bytes} of {sent} bytes arrived")
    return exchange.stdout_bytes / 1e6 / exchange.total_s


def _interrupt_ms(probe: Probe) -> float:
    probe.think(THINK_S)
    exchange = probe.send("print('running', flush=True)\nwhile True:\n    pass")
    probe.listen(exchange, until=lambda: exchange.has_output)
    # A moment more, so that the loop is what is interrupted and not the print.
    probe.think(THINK_S)
    elapsed_s = probe.interrupt(exchange)
    probe.expect(exchange, "error")
    if exchange.reply.get("ename") != "KeyboardInterrupt":
        raise BenchError(f"an interrupt ended as {exchange.reply.get('ename')!r}")
    return elapsed_s * 1e3


def _time_process(argv: list[str]) -> tuple[float, str]:
    begin_s = time.perf_counter()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    elapsed_s = time.perf_counter() - begin_s
    if done.returncode == 0:
        return elapsed_s, ""
    words = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [""]
    return elapsed_s, f"{argv[0]} ended with {done.returncode}: {words[0]}"
