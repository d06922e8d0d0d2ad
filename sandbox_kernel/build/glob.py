"""Globs over paths: Go's `filepath.Match`, and with `**` also those of .dockerignore.

`*` is any text and `?` one character, neither a slash; `[a-z]` and `[^a-z]` are classes; a
backslash keeps the next character. `**` is any number of folders, none included.

A path is run through all ways to match at once, one bit each, so that no pattern takes longer
than its length times that of the path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sandbox_kernel.errors import BuildError

MAX_PATTERN = 4096

_Test = Callable[[str], bool]
_STAR, _FOLDERS, _WITHIN, _REST = "star", "folders", "within", "rest"
# Entered without reading a character: the step itself, and what it may skip.
_SKIPS = {_STAR: 1, _REST: 1, _FOLDERS: 2}


def has_wildcards(pattern: str) -> bool:
    """Tell whether a pattern may match another path than the one that it spells."""
    position = 0
    while position < len(pattern):
        if pattern[position] in "*?[":
            return True
        position += 2 if pattern[position] == "\\" else 1
    return False


def unescaped(pattern: str) -> str:
    """Give the path that a pattern without wildcards spells."""
    parts, position = [], 0
    while position < len(pattern):
        position += pattern[position] == "\\" and position + 1 < len(pattern)
        parts.append(pattern[position])
        position += 1
    return "".join(parts)


class Glob:
    """A pattern, ready to match; raises BuildError if it is malformed."""

    def __init__(self, pattern: str, *, folders: bool = False) -> None:
        if len(pattern) > MAX_PATTERN:
            raise BuildError(
                f"a pattern of {len(pattern)} characters", hint=f"the most is {MAX_PATTERN}"
            )
        self.pattern = pattern
        steps = _Steps(pattern, folders=folders).steps
        self.prefix = _literal(steps)
        """What every matching path begins with."""
        self._suffix = _literal(steps[::-1])[::-1]
        self._whole = len(self.prefix) == len(steps)
        self._steps = steps
        self._accepting: dict[str, int] = {}
        masks = {name: _mask(steps, name) for name in (_STAR, _FOLDERS, _WITHIN, _REST)}
        self._stay = masks[_WITHIN] | masks[_REST]
        self._star, self._within = masks[_STAR], masks[_WITHIN]
        self._skipping = [
            (1 << number, ((1 << _SKIPS[step] + 1) - 1) << number)
            for number, step in enumerate(steps)
            if isinstance(step, str) and step in _SKIPS
        ]

    def matches(self, path: str) -> bool:
        """Tell whether the whole path matches."""
        if not path.startswith(self.prefix) or not path.endswith(self._suffix):
            return False
        if self._whole:
            return path == self.prefix
        states = self._skip(1)
        for char in path:
            states = self._advance(states, char)
            if not states:
                return False
        return bool(states >> len(self._steps) & 1)

    def _advance(self, states: int, char: str) -> int:
        accepting = self._accepting.get(char)
        if accepting is None:
            accepting = self._accepting[char] = self._accepts(char)
        stay = self._stay | (self._star if char != "/" else 0)
        leave = self._within if char == "/" else 0
        return self._skip((states & (accepting | leave)) << 1 | states & stay)

    def _skip(self, states: int) -> int:
        # In order of the steps, so that what one skips to may skip on.
        for bit, reached in self._skipping:
            if states & bit:
                states |= reached
        return states

    def _accepts(self, char: str) -> int:
        mask = 0
        for number, step in enumerate(self._steps):
            accepted = step.accepts(char) if isinstance(step, _One) else False
            mask |= accepted << number
        return mask


@dataclass(frozen=True)
class _One:
    """One character: a literal, or any that the test takes."""

    literal: str = ""
    test: _Test | None = None

    def accepts(self, char: str) -> bool:
        return char == self.literal if self.test is None else char != "/" and self.test(char)


_Step = str | _One


def _literal(steps: list[_Step]) -> str:
    text = ""
    for step in steps:
        if not isinstance(step, _One) or step.test is not None:
            break
        text += step.literal
    return text


def _mask(steps: list[_Step], name: str) -> int:
    return sum(1 << number for number, step in enumerate(steps) if step == name)


class _Steps:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str, *, folders: bool) -> None:
        self._pattern = pattern
        self._at = 0
        self.steps: list[_Step] = []
        while self._at < len(pattern):
            if folders and pattern.startswith("**", self._at):
                self._double_star()
            else:
                self.steps.append(self._step())

    def _double_star(self) -> None:
        first = self._at == 0
        self._at += 2
        rest = self._pattern[self._at :]
        # A quirk that people rely on: `**.txt` is any path with this end.
        if not rest or (first and rest[0] != "/" and not has_wildcards(rest)):
            self.steps.append(_REST)
            return
        self._at += rest.startswith("/")
        self.steps += [_FOLDERS, _WITHIN] if self._at < len(self._pattern) else [_REST]

    def _step(self) -> _Step:
        char = self._take()
        if char == "*":
            return _STAR
        if char == "?":
            return _One(test=lambda _: True)
        if char == "[":
            return _One(test=self._class())
        if char == "\\":
            return _One(self._take())
        return _One(char)

    def _take(self) -> str:
        if self._at == len(self._pattern):
            raise self._bad()
        self._at += 1
        return self._pattern[self._at - 1]

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _class(self) -> _Test:
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[tuple[str, str]] = []
        while self._peek() != "]" or not ranges:
            low = self._member()
            high = low
            if self._peek() == "-":
                self._take()
                high = self._member()
            ranges.append((low, high))
        self._take()
        return lambda char: negated != any(low <= char <= high for low, high in ranges)

    def _member(self) -> str:
        char = self._take()
        if char in "-]":
            raise self._bad()
        return self._take() if char == "\\" else char

    def _bad(self) -> BuildError:
        return BuildError(
            f"{self._pattern!r} is not a pattern",
            hint="close every [ with ], and write \\[ for a bracket that is meant as itself",
        )
