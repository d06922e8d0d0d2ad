"""What `run` shows: outputs as they come, and a line on stderr for each cell."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from sandbox_kernel.units import format_duration, format_size

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LINE_LENGTH = 60
_GOOD = ("ok",)


@dataclass(frozen=True)
class CellReport:
    """How one cell ended."""

    number: int
    total: int
    first_line: str
    outcome: str
    """As `model.Outcome` names it; `ok` or `error` where the kernel gave no figures."""
    failed: bool
    ename: str = ""
    evalue: str = ""
    sandbox: dict[str, Any] | None = None
    """The figures of the reply."""


class Screen:
    """The terminal; with `outputs=False` only the lines of progress."""

    def __init__(self, *, outputs: bool) -> None:
        self._outputs = outputs
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._open_line = {"stdout": False, "stderr": False}

    def begin(self, number: int, total: int, first_line: str) -> None:
        """Show on a terminal which cell is running, until it has an output."""
        if self._console.is_terminal:
            text = Text.assemble(f"[{number}/{total}] ", (clean(first_line), "dim"))
            self._status = self._console.status(text)
            self._status.start()

    def output(self, output: Any) -> None:
        """Write one output, in the form of the notebook format."""
        if not self._outputs:
            return
        self._stop_status()
        kind = output["output_type"]
        if kind == "stream":
            self._write(output["name"], output["text"])
        elif kind == "error":
            self._write("stderr", "\n".join(output["traceback"]) + "\n")
        else:
            self._write("stdout", text_of(output["data"]) + "\n")

    def end(self, report: CellReport) -> None:
        """Write the line of a cell that ended."""
        self._stop_status()
        for name in self._open_line:
            if self._open_line[name]:
                self._write(name, "\n")
        self._console.print(line_of(report))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stop_status()

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _write(self, name: str, text: str) -> None:
        stream = sys.stderr if name == "stderr" else sys.stdout
        if not stream.isatty():
            text = _ESCAPE.sub("", text)
        # What the encoding of the terminal lacks must not end the run.
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
        if text:
            self._open_line[name] = not text.endswith("\n")


def text_of(data: dict[str, Any]) -> str:
    """Give the text of a result, or the name of what it is where it has none."""
    if "text/plain" in data:
        return str(data["text/plain"])
    return f"<{', '.join(sorted(data))}>"


def clean(text: str) -> str:
    """Give a line of code as it can stand in one line of a terminal."""
    text = _CONTROL.sub(" ", text)
    return text if len(text) <= _LINE_LENGTH else text[: _LINE_LENGTH - 1] + "…"


def line_of(report: CellReport) -> Text:
    """Give the line of a cell: number, outcome, time, memory, first line."""
    figures = report.sandbox or {}
    wall_s, peak_bytes = figures.get("wall_s"), figures.get("peak_memory_bytes")
    style = "green" if report.outcome in _GOOD else "red" if report.failed else "yellow"
    width = len(str(report.total))
    return Text.assemble(
        f"[{report.number:>{width}}/{report.total}] ",
        (f"{report.outcome:<11}", style),
        f" {'' if wall_s is None else format_duration(wall_s):>12}",
        f" {'' if peak_bytes is None else format_size(peak_bytes):>10}  ",
        (clean(report.first_line), "dim"),
    )
