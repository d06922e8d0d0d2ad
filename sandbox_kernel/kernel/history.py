"""The input history of one kernel, in memory, asked as IPython's is.

It lives on the host, so it survives every roll back. Nothing is written to disk.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SESSION = 1
"""The number of the one session that an in-memory history knows."""

Row = tuple[int, int, "str | tuple[str, str | None]"]
"""(session, line, source), or (session, line, (source, output))."""


@dataclass
class Line:
    """One stored cell; `output` is the text of its result, once it has one."""

    number: int
    source: str
    output: str | None = None


@dataclass(frozen=True)
class View:
    """How rows are wanted: with outputs, and as typed (`raw`) or as Python sees the source."""

    output: bool = False
    raw: bool = True

    def row(self, line: Line) -> Row:
        """Give one line as a `history_reply` carries it."""
        source = self.source(line)
        return SESSION, line.number, (source, line.output) if self.output else source

    def source(self, line: Line) -> str:
        """Give the source of a line in the form that is wanted."""
        return line.source if self.raw else transformed(line.source)


class History:
    """The cells that were run with `store_history`, oldest first."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def append(self, number: int, source: str) -> Line:
        """Store a cell before it runs; set `output` of what comes back when there is one."""
        line = Line(number, source.rstrip("\n"))
        self._lines.append(line)
        return line

    def tail(self, count: int | None, view: View) -> list[Row]:
        """Give the last `count` cells, oldest first; all where `count` is None."""
        return [view.row(line) for line in _last(self._lines, count)]

    def range(self, session: int, start: int | None, stop: int | None, view: View) -> list[Row]:
        """Give the cells `start` up to, not with, `stop`; negative numbers count from the end.

        Session 0 is the current one; of any other there is nothing.
        """
        if session not in (0, SESSION):
            return []
        after_last = self._lines[-1].number + 1 if self._lines else 1
        first = 1 if start is None else start
        first = first + after_last if first < 0 else first
        end = stop or after_last
        end = end + after_last if end < 0 else end
        return [view.row(line) for line in self._lines if first <= line.number < end]

    def search(
        self, pattern: str, count: int | None, view: View, *, unique: bool = False
    ) -> list[Row]:
        """Give the last `count` cells whose whole source matches a glob, oldest first.

        With `unique` only the latest of equal sources counts.
        """
        glob = pattern.replace("[^", "[!")
        found = [line for line in self._lines if fnmatch.fnmatchcase(view.source(line), glob)]
        if unique:
            latest = {view.source(line): line.number for line in found}
            found = [line for line in found if latest[view.source(line)] == line.number]
        return [view.row(line) for line in _last(found, count)]


def _last(lines: list[Line], count: int | None) -> Iterable[Line]:
    if count is None:
        return lines
    return islice(lines, max(0, len(lines) - max(0, count)), None)


@lru_cache(maxsize=1024)
def transformed(source: str) -> str:
    """Give the Python that IPython makes of a cell; the cell itself where it is no Python."""
    # Imported here because it is rarely asked for and slow to load.
    from IPython.core.inputtransformer2 import TransformerManager  # noqa: PLC0415

    try:
        return TransformerManager().transform_cell(source)
    except SyntaxError:
        return source
