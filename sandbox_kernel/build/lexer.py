"""A Dockerfile as instructions that are still text: directives, continuations, heredocs, flags.

Lines end with a line feed. The escape character at the end of a line, unless it is itself
escaped, joins it with the next; comments and empty lines between the two are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sandbox_kernel.build.expand import unquoted
from sandbox_kernel.build.json_form import json_list
from sandbox_kernel.build.place import Place
from sandbox_kernel.errors import BuildError

MAX_FILE_BYTES = 4 << 20

DIRECTIVES = ("syntax", "escape", "check")
FRONTENDS = re.compile(r"(docker\.io/)?docker/dockerfile(-upstream)?([:@].*)?")

BLANKS = "\t\v\f\r "
_SPLIT = re.compile(rf"[{BLANKS}]+")
_DIRECTIVE = re.compile(r"([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(\S.*)")
_HEREDOC = re.compile(r"\d*<<(-?)\s*([^<]+)")
_TABS = re.compile(r"^\t+", re.MULTILINE)
_WITH_HEREDOC = ("RUN", "COPY", "ADD")


@dataclass(frozen=True)
class Heredoc:
    """A document within the Dockerfile; `expand` unless a part of its name is quoted."""

    name: str
    content: str
    expand: bool
    strip_tabs: bool

    @property
    def text(self) -> str:
        """The content without the leading tabs that `<<-` takes away."""
        return _TABS.sub("", self.content) if self.strip_tabs else self.content


@dataclass(frozen=True)
class Line:
    """One instruction: its keyword as it is written, its flags without quotes, and the rest."""

    place: Place
    keyword: str
    flags: tuple[str, ...]
    rest: str
    heredocs: tuple[Heredoc, ...] = ()
    comments: tuple[str, ...] = ()
    """The comment lines right above."""


@dataclass(frozen=True)
class Source:
    """All lines of a Dockerfile, and what its directives say."""

    file: str
    lines: tuple[Line, ...]
    escape: str
    check: str
    empty_continuations: tuple[Place, ...]


def decode(raw: bytes, file: str) -> str:
    """Give the text of a Dockerfile; raises BuildError if it is none."""
    if len(raw) > MAX_FILE_BYTES:
        raise BuildError(
            f"{file} has {len(raw)} bytes",
            hint=f"a Dockerfile may have {MAX_FILE_BYTES}; put data into files and COPY them",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BuildError(
            "the text is not UTF-8", hint="save the file as UTF-8", place=f"{file}:{line}"
        ) from error


def lex(text: str, file: str = "Dockerfile") -> Source:
    """Split a Dockerfile into its instructions; raises BuildError, which names the line."""
    return _Lexer(text, file).run()


def split_line(text: str, escape: str) -> tuple[str, tuple[str, ...], str]:
    """Give the keyword, the flags and the rest of one instruction."""
    keyword, _, rest = _cut(text.strip())
    flags, rest = _split_flags(rest, escape)
    return keyword, flags, rest.strip()


def heredoc_of(word: str) -> tuple[str, bool, bool] | None:
    """Give name, `expand` and `strip_tabs` if this word begins a heredoc."""
    match = _HEREDOC.fullmatch(word)
    if match is None:
        return None
    name = unquoted(match[2])
    if not name:
        return None
    quoted = any(match[2].count(mark) != name.count(mark) for mark in "'\"")
    return name, not quoted, match[1] == "-"


class _Lexer:
    def __init__(self, text: str, file: str) -> None:
        self._physical = text.removeprefix("\ufeff").split("\n")
        if self._physical[-1] == "":
            self._physical.pop()
        self._next = 0
        self._file = file
        self._directives: dict[str, str] = {}
        self._empty: list[Place] = []
        self._join = _joins("\\")

    @property
    def _escape(self) -> str:
        return self._directives.get("escape", "\\")

    def run(self) -> Source:
        self._read_directives()
        lines, comments = [], []
        while self._next < len(self._physical):
            stripped = self._physical[self._next].strip()
            if stripped.startswith("#"):
                self._next += 1
                comments.append(stripped[1:].strip())
                if not comments[-1]:
                    comments = []
            elif not stripped:
                self._next += 1
            else:
                lines.append(self._read_line(tuple(comments)))
                comments = []
        if not lines:
            raise BuildError(
                f"{self._file} has no instructions", hint="begin with FROM, for example FROM host"
            )
        return Source(
            self._file,
            tuple(lines),
            self._escape,
            self._directives.get("check", ""),
            tuple(self._empty),
        )

    def _read_directives(self) -> None:
        while self._next < len(self._physical):
            text = self._physical[self._next].strip()
            match = _DIRECTIVE.fullmatch(text[1:].strip()) if text.startswith("#") else None
            name = match[1].lower() if match else ""
            if match is None or name not in DIRECTIVES:
                return
            self._next += 1
            place = Place(self._file, self._next, self._next, text)
            if name in self._directives:
                raise place.error(f"a second {name} directive", hint="keep one of them")
            self._directives[name] = _checked_directive(place, name, match[2])
        return

    def _read_line(self, comments: tuple[str, ...]) -> Line:
        first = self._next + 1
        text = self._joined(first)
        place = Place(self._file, first, self._next, text)
        if "\0" in text:
            raise place.error("a NUL character", hint="remove it; no argument can hold one")
        keyword, flags, rest = split_line(text, self._escape)
        if not keyword:
            raise place.error("an instruction of nothing but the escape character", hint="drop it")
        with place.blamed():
            holds = self._may_hold(keyword, rest)
        heredocs = self._read_heredocs(place, text) if holds else ()
        place = Place(self._file, first, self._next, text)
        return Line(place, keyword, flags, rest, heredocs, comments)

    def _joined(self, first: int) -> str:
        self._join = _joins(self._escape)
        parts: list[str] = []
        gap = False
        while self._next < len(self._physical):
            line = self._physical[self._next].rstrip("\r")
            self._next += 1
            stripped = line.strip()
            if parts and (not stripped or stripped.startswith("#")):
                gap = gap or not stripped
                continue
            match = self._join.search(line)
            parts.append(line if match is None else line[: match.start()])
            if match is None:
                break
        text = "".join(parts)
        if gap:
            self._empty.append(Place(self._file, first, self._next, text))
        return text

    def _may_hold(self, keyword: str, rest: str) -> bool:
        if "<<" not in rest:
            return False
        if keyword.upper() == "ONBUILD":
            keyword, _, rest = split_line(rest, self._escape)
        return keyword.upper() in _WITH_HEREDOC and json_list(rest) is None

    def _read_heredocs(self, place: Place, text: str) -> tuple[Heredoc, ...]:
        found = []
        for word in raw_words(text):
            begun = heredoc_of(word)
            if begun is not None:
                name, expand, strip_tabs = begun
                content = self._read_heredoc(place, name, strip_tabs=strip_tabs)
                found.append(Heredoc(name, content, expand, strip_tabs))
        return tuple(found)

    def _read_heredoc(self, place: Place, name: str, *, strip_tabs: bool) -> str:
        begin = self._next
        while self._next < len(self._physical):
            line = self._physical[self._next].rstrip("\r")
            self._next += 1
            if (line.lstrip("\t") if strip_tabs else line) == name:
                return "".join(one + "\n" for one in self._physical[begin : self._next - 1])
        raise place.error(
            f"the heredoc {name} has no end", hint=f"end it with a line that says {name} only"
        )


def _joins(escape: str) -> re.Pattern[str]:
    mark = re.escape(escape)
    return re.compile(rf"(?<!{mark}){mark}[ \t]*$")


def _checked_directive(place: Place, name: str, value: str) -> str:
    if name == "escape" and value not in {"\\", "`"}:
        raise place.error(f"escape={value}", hint="the escape character is \\ or `")
    if name == "syntax" and not FRONTENDS.fullmatch(value.split(maxsplit=1)[0]):
        raise place.error(
            f"the frontend {value} cannot be used",
            hint="remove the line, or write # syntax=docker/dockerfile:1",
        )
    return value


def _cut(text: str) -> tuple[str, str, str]:
    match = _SPLIT.search(text)
    if match is None:
        return text, "", ""
    return text[: match.start()], match[0], text[match.end() :]


def _split_flags(text: str, escape: str) -> tuple[tuple[str, ...], str]:
    """Take the words that begin with `--` off the front, quotes and escapes resolved."""
    flags: list[str] = []
    position = 0
    while True:
        while position < len(text) and text[position].isspace():
            position += 1
        if not text.startswith("--", position):
            return tuple(flags), text[position:]
        word, position = _flag(text, position, escape)
        if word == "--":
            return tuple(flags), text[position:]
        flags.append(word)


def _flag(text: str, position: int, escape: str) -> tuple[str, int]:
    word: list[str] = []
    quote = ""
    while position < len(text):
        char = text[position]
        if char == escape:
            position += 1
            word.append(text[position : position + 1])
        elif quote:
            if char == quote:
                quote = ""
            else:
                word.append(char)
        elif char in "'\"":
            quote = char
        elif char.isspace():
            break
        else:
            word.append(char)
        position += 1
    return "".join(word), position


def raw_words(text: str) -> list[str]:
    """Give the words as a shell splits them, quotes kept; none if a quote has no end.

    Blanks after `<<` do not end a word: the name of the heredoc may follow them.
    """
    words: list[str] = []
    word: list[str] = []
    quote, position = "", 0
    while position < len(text):
        char = text[position]
        if char == "\\" and quote != "'":
            char = text[position : position + 2]
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif text.startswith("<<", position):
            end = position + 2
            while end < len(text) and text[end] in "\t\r ":
                end += 1
            char = text[position:end]
        elif char.isspace():
            words.append("".join(word))
            word, char = [], ""
            position += 1
        word.append(char)
        position += len(char)
    words.append("".join(word))
    return [] if quote else [one for one in words if one]
