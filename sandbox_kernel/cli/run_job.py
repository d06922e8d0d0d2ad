"""Run the cells of one notebook in order on a kernel, and remember how each ended."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from nbformat import NotebookNode

from sandbox_kernel.cli import run_file
from sandbox_kernel.cli.run_kernel import Kernel, started
from sandbox_kernel.cli.run_screen import CellReport, Screen

VERSION = 1
"""Of the JSON; a new field does not change it."""


@dataclass
class Job:
    """One notebook on its way through the kernel; outputs and figures are put into it."""

    notebook: NotebookNode
    allow_errors: bool = False
    reports: list[CellReport] = field(default_factory=list)
    begun: bool = False
    """Whether the notebook's old outputs were given up."""

    @property
    def cells(self) -> list[NotebookNode]:
        """The cells to run."""
        return run_file.code_cells(self.notebook)

    @property
    def failed(self) -> bool:
        """Tell whether a cell failed that may not, or was not run."""
        return any(report.failed for report in self.reports) or self.not_run > 0

    @property
    def not_run(self) -> int:
        """How many cells were not run."""
        return len(self.cells) - len(self.reports)

    async def run(self, spec: dict[str, Any], folder: Path, *, outputs: bool) -> None:
        """Run the cells, up to the first that fails, on a kernel of this spec in `folder`.

        Raises CancelledError when the user ends it, SandboxError when the kernel does.
        """
        screen = Screen(outputs=outputs)
        interrupts = Interrupts()
        try:
            with interrupts.handled():
                async with started(spec, folder) as kernel:
                    self.notebook.metadata["language_info"] = await kernel.language_info()
                    interrupts.kernel = kernel
                    await self._run_cells(kernel, screen)
        finally:
            screen.close()

    async def _run_cells(self, kernel: Kernel, screen: Screen) -> None:
        cells = self.cells
        self.begun = True
        for cell in cells:  # what an earlier run left would pass for this one's
            run_file.clear(cell)
        for number, cell in enumerate(cells, 1):
            report = await run_cell(kernel, screen, cell, (number, len(cells)))
            self.reports.append(report)
            if report.failed and not self.allow_errors:
                break
        if self.not_run:
            click.echo(f"Stopped; cells not run: {self.not_run} (see --allow-errors)", err=True)

    def as_json(self, file: Path) -> str:
        """Give how each cell ended, with its outputs, for programs."""
        cells = self.cells
        content = {
            "version": VERSION,
            "ok": not self.failed,
            "file": str(file),
            "cells": [
                {**asdict(report), "outputs": cells[report.number - 1].outputs}
                for report in self.reports
            ],
            "not_run": self.not_run,
        }
        return json.dumps(content, indent=2)


async def run_cell(
    kernel: Kernel, screen: Screen, cell: NotebookNode, place: tuple[int, int]
) -> CellReport:
    """Run one cell, show it, and put outputs and figures into it; `place` is number and total."""
    line = run_file.first_line(cell.source)
    screen.begin(*place, line)
    outputs = run_file.Outputs(cell)

    def take(message: dict[str, Any]) -> None:
        output = outputs.take(message)
        if output is not None:
            screen.output(output)

    try:
        reply = await kernel.execute(cell.source, take)
    finally:
        outputs.finish()
    content, sandbox = reply["content"], reply["metadata"].get("sandbox")
    cell.execution_count = content.get("execution_count")
    if sandbox is not None:
        cell.metadata["sandbox"] = sandbox
    may_fail = run_file.MAY_FAIL in run_file.tags_of(cell)
    report = CellReport(
        number=place[0],
        total=place[1],
        first_line=line,
        outcome=(sandbox or {}).get("outcome") or content["status"],
        failed=content["status"] != "ok" and not may_fail,
        ename=content.get("ename", ""),
        evalue=content.get("evalue", ""),
        sandbox=sandbox,
    )
    screen.end(report)
    return report


class Interrupts:
    """Ctrl-C: the first interrupts the cell, the second ends the run; SIGTERM ends it at once."""

    def __init__(self) -> None:
        self.kernel: Kernel | None = None
        self._interrupted: asyncio.Task[None] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals within; the current task is the one to end."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        loop.add_signal_handler(signal.SIGINT, self._interrupt, task)
        loop.add_signal_handler(signal.SIGTERM, self._end, task)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            loop.remove_signal_handler(signal.SIGTERM)

    def _interrupt(self, task: asyncio.Task[Any] | None) -> None:
        if self.kernel is not None and self._interrupted is None:
            self._interrupted = asyncio.create_task(self.kernel.interrupt())
        else:
            self._end(task)

    def _end(self, task: asyncio.Task[Any] | None) -> None:
        if (
            task is not None and not task.cancelling()
        ):  # once: what ends the kernel must come to its end
            task.cancel()
