r"""Variables, quotes and escapes in a word of a Dockerfile, as Docker resolves them.

`$v`, `${v}`, `${v:-word}`, `${v:+word}`, `${v:?message}`, the three without the colon, which ask
whether the variable is set and not whether it is empty, `${v#glob}`, `${v##glob}`, `${v%glob}`,
`${v%%glob}`, `${v/glob/text}` and `${v//glob/text}`. Within a word, `'` keeps everything, `"`
keeps all but `$` and the escape character, which itself keeps the character after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sandbox_kernel.build.pattern import (
    MAX_CHARACTERS,
    remove_prefix,
    remove_suffix,
    substitute,
    too_long,
)
from sandbox_kernel.errors import BuildError

MAX_DEPTH = 50
_SPECIAL = "@*#?-$!0"
_PLAIN = re.compile(r"[^$'\"\\`/}]+")
"""A run of characters that mean nothing anywhere."""


@dataclass(frozen=True)
class Expanded:
    """A word, also split at the blanks that were not quoted, and what it asked for in vain."""

    text: str
    words: tuple[str, ...]
    unset: frozenset[str]
    """Names that were asked for and are not set."""


def expand(
    source: str, env: Mapping[str, str], *, escape: str = "\\", quotes: bool = True
) -> Expanded:
    """Resolve one word; raises BuildError.

    Without `quotes`, as in a heredoc, quotes are characters like any other.
    """
    reader = _Reader(source, env, escape, quotes=quotes)
    pieces = reader.read_until("")
    return Expanded(_text(pieces), tuple(_words(pieces)), frozenset(reader.unset))


def unquoted(source: str) -> str:
    """Give one word without quotes and backslashes; empty if it is none, or several."""
    try:
        words = _words(_Reader(source, None).read_until(""))
    except BuildError:
        return ""
    return words[0] if len(words) == 1 else ""


_Pieces = list[tuple[str, bool]]
"""What was read so far, and whether it was quoted: blanks that were not part words."""


def _text(pieces: _Pieces) -> str:
    return "".join(piece for piece, _ in pieces)


def _words(pieces: _Pieces) -> list[str]:
    words: list[str] = []
    word: list[str] = []
    for piece, quoted in pieces:
        if quoted or not piece:
            word.append(piece)
            continue
        # A mark at either end tells whether the piece touches its neighbours.
        first, *others = ("|" + piece + "|").split()
        word.append(first[1:] if others else first[1:-1])
        if others:
            words += ["".join(word), *others[:-1]]
            word = [others[-1][:-1]]
    return [one for one in (*words, "".join(word)) if one]


class _Reader:
    """Reads a word from left to right; without `env` a dollar is a character like any other."""

    def __init__(
        self, source: str, env: Mapping[str, str] | None, escape: str = "\\", *, quotes: bool = True
    ) -> None:
        self._source = source
        self._at = 0
        self._env = env
        self._escape = escape
        self._quotes = quotes
        self._depth = 0
        self._left = MAX_CHARACTERS + len(source)
        self.unset: set[str] = set()

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        self._at += len(char)
        return char

    def _run(self) -> str:
        """Take a run of plain characters, or else one character."""
        match = _PLAIN.match(self._source, self._at)
        if match is None:
            return self._take()
        self._at = match.end()
        return match[0]

    def _bounded(self, text: str) -> str:
        self._left -= len(text)
        if self._left < 0:
            raise too_long()
        return text

    def read_until(self, stop: str, *, keep_escapes: bool = False) -> _Pieces:
        """Read up to the character `stop`, or to the end if that is empty."""
        pieces: _Pieces = []
        while char := self._peek():
            if char == stop:
                self._take()
                return pieces
            if char == "$" and self._env is not None:
                pieces.append((self._bounded(self._dollar(self._env)), False))
            elif char in "'\"" and self._quotes:
                pieces += self._quoted(char, keep_escapes=keep_escapes)
            elif char == self._escape:
                self._take()
                following = self._take()
                # An escape character that is the last of all is dropped.
                pieces.append((char + following if keep_escapes else following, True))
            else:
                pieces.append((self._run(), False))
        if stop:
            raise BuildError(f"${{ without its {stop}", hint=f"close it with {stop}")
        return pieces

    def _quoted(self, quote: str, *, keep_escapes: bool) -> _Pieces:
        self._take()
        pieces: _Pieces = []
        while char := self._peek():
            if char == quote:
                self._take()
                return pieces
            if quote == '"' and char == "$" and self._env is not None:
                pieces.append((self._bounded(self._dollar(self._env)), True))
            elif quote == '"' and char == self._escape:
                self._take()
                following = self._peek()
                if following in ('"', "$", self._escape):
                    self._take()
                    char = char + following if keep_escapes else following
                pieces.append((char, True))
            else:
                pieces.append((self._run(), True))
        raise BuildError(f"a {quote} without an end", hint=f"close it with {quote}")

    def _dollar(self, env: Mapping[str, str]) -> str:
        self._take()
        if self._peek() != "{":
            name = self._name()
            return self._value(env, name) or "" if name else "$"
        self._take()
        if self._peek() in ("", "{", "}", ":"):
            raise _bad("${" + self._peek())
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise BuildError(
                f"${{ is nested more than {MAX_DEPTH} deep", hint="set an ARG in between"
            )
        name = self._name()
        # The name is looked up even where the word after it is what counts.
        result = self._modified(name, self._value(env, name))
        self._depth -= 1
        return result

    def _modified(self, name: str, value: str | None) -> str:
        operator = self._take()
        if operator == "}":
            return value or ""
        if operator == ":":
            operator += self._take()
        if operator in ("-", "+", "?", ":-", ":+", ":?"):
            return _chosen(name, value, operator, _text(self.read_until("}")))
        if operator in ("#", "%"):
            longest = self._peek() == operator
            if longest:
                self._take()
            glob = _text(self.read_until("}", keep_escapes=True))
            trim = remove_prefix if operator == "#" else remove_suffix
            return trim(value or "", glob, longest=longest)
        if operator == "/":
            everywhere = self._peek() == "/"
            if everywhere:
                self._take()
            glob = _text(self.read_until("/", keep_escapes=True))
            text = _text(self.read_until("}", keep_escapes=True))
            return substitute(value or "", glob, text, everywhere=everywhere)
        raise _bad(f"${{{name}{operator}")

    def _value(self, env: Mapping[str, str], name: str) -> str | None:
        value = env.get(name)
        if value is None:
            self.unset.add(name)
        return value

    def _name(self) -> str:
        begin = self._at
        first = self._peek()
        if first.isdecimal():
            while self._peek().isdecimal():
                self._at += 1
        elif first and first in _SPECIAL:
            self._at += 1
        else:
            while (char := self._peek()) and (char.isalnum() or char == "_"):
                self._at += 1
        return self._source[begin : self._at]


def _chosen(name: str, value: str | None, operator: str, word: str) -> str:
    missing = value is None or (operator[0] == ":" and not value)
    if operator[-1] == "-":
        return word if missing else value or ""
    if operator[-1] == "+":
        return "" if missing else word
    if missing:
        state = "unset" if value is None else "empty"
        raise BuildError(
            f"{name}: {word or f'the variable is {state}'}",
            hint=f"set it before this line with ARG or ENV, or by --build-arg {name}=…",
        )
    return value or ""


def _bad(text: str) -> BuildError:
    return BuildError(
        f"bad substitution {text}",
        hint="write ${NAME}, or one of ${NAME:-word}, ${NAME:+word}, ${NAME:?message}, "
        "${NAME#glob}, ${NAME%glob} and ${NAME/glob/text}",
    )
