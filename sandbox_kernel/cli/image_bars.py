"""A screen with bars, by rich: one for each blob that moves, and one over all steps."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from sandbox_kernel.cli.image_screen import Screen, blob_name
from sandbox_kernel.units import format_duration, format_size

DELAY_S = 1.0
"""What takes less time shows no bar."""


class _Figures(ProgressColumn):
    """How far a row is: in bytes and their speed, in steps, or in time."""

    def render(self, task: Task) -> Text:
        """Give the text of one row."""
        if task.fields["kind"] == "blob":
            speed = f"  {format_size(int(task.speed))}/s" if task.speed else ""
            done, total = format_size(int(task.completed)), format_size(int(task.total or 0))
            return Text(f"{done} of {total}{speed}")
        passed = format_duration(int(task.elapsed or 0))
        return Text(f"{task.completed:.0f}/{task.total:.0f}  {passed}" if task.total else passed)


class BarScreen(Screen):
    """Bars on a terminal, below the lines; they go when all is done."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=2),
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            _Figures(table_column=Column(no_wrap=True, min_width=24)),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            expand=True,
        )
        self._mutex = threading.Lock()
        self._main: TaskID | None = None
        self._rows: dict[str, TaskID] = {}
        self._step: tuple[str, str] | None = None
        self._tag = ""
        self._started = False
        self._closed = False
        self._timer = threading.Timer(DELAY_S, self._start)
        self._timer.daemon = True
        self._timer.start()

    def _start(self) -> None:
        with self._mutex:
            if not self._closed:
                self._progress.start()
                self._started = True

    def close(self) -> None:
        """Take the bars away."""
        self._timer.cancel()
        with self._mutex:
            self._closed = True
            if self._started:
                self._progress.stop()
        self._break()

    def title(self, text: str) -> None:
        """Say what is done now."""
        self._show(text, None, 0)

    def _show(self, text: str, total: int | None, completed: int) -> None:
        if self._main is None:
            self._main = self._progress.add_task(text, total=total, kind="step")
        self._progress.update(self._main, description=text, total=total, completed=completed)

    def line(self, text: str, style: str = "") -> None:
        """Show a line above the bars."""
        self._break()
        self._console.print(Text(text, style), soft_wrap=True)

    def begin(self, tag: str, text: str, done: tuple[int, int]) -> None:
        """Show a step in the bar over all; its line comes with its end, or what it says."""
        super().begin(tag, text, done)
        self._break()
        self._step, self._tag = (tag, text), tag
        self._show(f"{tag} {text}", done[1], done[0])

    def end(self, result: str, style: str = "") -> None:
        """Show the line of the step."""
        step, self._step = self._step, None
        words = [(f"{self._tag} ", "bold")]
        words.append((f"{step[1]}  " if step is not None else "done: ", ""))
        self._console.print(Text.assemble(*words, (result, style)), soft_wrap=True)

    def _break(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            self._console.print(Text.assemble((f"{step[0]} ", "bold"), step[1]), soft_wrap=True)

    def started(self, digest: str, total_bytes: int) -> None:
        """Add the row of a blob."""
        self._rows[digest] = self._progress.add_task(
            blob_name(digest), total=total_bytes, kind="blob"
        )

    def advanced(self, digest: str, count_bytes: int) -> None:
        """Move the bar of a blob."""
        row = self._rows.get(digest)
        if row is not None:
            self._progress.advance(row, count_bytes)

    def finished(self, digest: str, note: str) -> None:
        """Take the row of a blob away: an image may have more of them than a terminal has lines."""
        super().finished(digest, note)
        row = self._rows.pop(digest, None)
        if row is not None:
            self._progress.remove_task(row)
