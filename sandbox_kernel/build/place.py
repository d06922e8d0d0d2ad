"""Where in a Dockerfile something stands, so that every complaint can name the line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sandbox_kernel.errors import BuildError

MAX_TEXT = 160
"""Characters of a line that an error quotes."""


@dataclass(frozen=True)
class Place:
    """The lines of one instruction, counted from 1, and its text with continuations joined."""

    file: str
    line: int
    last_line: int
    text: str

    def __str__(self) -> str:
        """Give `file:line`, as compilers do."""
        return f"{self.file}:{self.line}"

    def error(self, problem: str, *, hint: str = "") -> BuildError:
        """Give an error that names this line and quotes it."""
        text = self.text.strip()
        shown = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
        return BuildError(problem, hint=hint, place=str(self), text=shown)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Give the errors raised inside, if they name no place, this one."""
        try:
            yield
        except BuildError as error:
            if error.place:
                raise
            raise self.error(error.problem, hint=error.hint) from error
