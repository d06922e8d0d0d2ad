"""What a build tells, on a screen: its steps, what they say, and what is wrong with them."""

from __future__ import annotations

from collections import deque
from typing import Any

from sandbox_kernel.build import events
from sandbox_kernel.cli.image_screen import Screen
from sandbox_kernel.cli.image_text import Lines, harmless
from sandbox_kernel.units import format_duration

CACHED = "CACHED"
TAIL_LINES = 20
"""Of a step that failed, if nothing was shown before."""
_INDENT = "    "
"""Before what a step says, so that it cannot look like a step."""


class Steps:
    """Takes the events of a build; `told` is what its JSON document says of the steps."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self.told: list[dict[str, Any]] = []
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._lines: dict[str, Lines] = {}

    def take(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case events.StepBegun():
                self._begin(event)
            case events.StepOutput():
                for line in self._lines.setdefault(event.stream, Lines()).take(event.data):
                    self._say(line)
            case events.StepMissed():
                self.told[-1]["reason"] = event.reason
                self._screen.line(f"{_INDENT}not cached: {harmless(event.reason)}", "yellow")
            case events.StepEnded():
                self._end(event)
            case events.Warned():
                self._screen.line(f"warning: {harmless(event.text)}", "yellow")

    def _begin(self, event: events.StepBegun) -> None:
        self.told.append(
            {
                "number": event.number,
                "stage": event.stage,
                "title": event.title,
                "reason": None,
            }
        )
        self.tail.clear()
        stage = f" {event.stage}" if event.stage else ""
        tag = f"[{event.number}/{event.total}{stage}]"
        self._screen.begin(tag, harmless(event.title), (event.number - 1, event.total))

    def _end(self, event: events.StepEnded) -> None:
        self._finish_lines()
        self.told[-1] |= {
            "cached": event.cached,
            "wall_s": round(event.wall_s, 3),
            "layer": event.layer or None,
            "size_bytes": event.size_bytes,
        }
        # A base that was just fetched was in no cache.
        if event.cached and not self._screen.moved:
            self._screen.end(CACHED, "cyan")
        else:
            self._screen.end(format_duration(event.wall_s), "green")

    def failed(self) -> list[str]:
        """Give the last lines of the step that failed."""
        self._finish_lines()
        return list(self.tail)

    def _finish_lines(self) -> None:
        for lines in self._lines.values():
            for line in lines.end():
                self._say(line)
        self._lines.clear()

    def _say(self, line: str) -> None:
        self.tail.append(line)
        self._screen.line(f"{_INDENT}{line}".rstrip(), "dim")
