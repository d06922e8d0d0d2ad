r"""The globs of `${v#glob}`, `${v%glob}` and `${v/glob/text}`.

`*` is any text, `?` one character, and a backslash keeps `*`, `?` and itself. There are no
brackets. No regular expression with repeats is used: one with several of them can take forever.
"""

from __future__ import annotations

import re

from sandbox_kernel.errors import BuildError

MAX_CHARACTERS = 1 << 20
"""How long a value may become: each line can double one, and forty of them fill any memory."""
_MAX_WORK = 1 << 28


def too_long() -> BuildError:
    """Give the error for a value beyond MAX_CHARACTERS."""
    return BuildError(
        f"a value is longer than {MAX_CHARACTERS} characters",
        hint="do not let a variable repeat itself",
    )


def remove_prefix(value: str, glob: str, *, longest: bool) -> str:
    """Give `value` without the shortest or longest prefix that matches; raises BuildError."""
    end = _match_end(value, _segments(glob, value), 0, longest=longest)
    return value if end is None else value[end:]


def remove_suffix(value: str, glob: str, *, longest: bool) -> str:
    """Give `value` without the shortest or longest suffix that matches; raises BuildError."""
    segments = [segment[::-1] for segment in reversed(_segments(glob, value))]
    end = _match_end(value[::-1], segments, 0, longest=longest)
    return value if end is None else value[: len(value) - end]


def substitute(value: str, glob: str, text: str, *, everywhere: bool) -> str:
    """Replace the first match, or all of them, by `text`; each is as long as can be."""
    segments = _segments(glob, value)
    if segments == [()]:
        return value
    result: list[str] = []
    position, length = 0, len(value)
    while position < len(value) or not result:
        begin = _find(value, segments[0], position)
        # If the rest is not found behind the first place, it is behind no later one.
        end = None if begin is None else _match_end(value, segments, begin, longest=True)
        if begin is None or end is None:
            break
        result += [value[position:begin], text]
        length += len(text)
        if length > 2 * MAX_CHARACTERS:
            raise too_long()
        position = end
        if not everywhere:
            break
    return "".join(result) + value[position:]


_Segment = tuple[str, ...]
"""Characters that follow each other; an empty string stands for any one character."""


def _segments(glob: str, value: str) -> list[_Segment]:
    """Give what lies between the stars; `value` is what will be matched."""
    if len(glob) * len(value) > _MAX_WORK:
        raise BuildError(
            f"a glob of {len(glob)} characters for a value of {len(value)}", hint="shorten the glob"
        )
    segments: list[list[str]] = [[]]
    position = 0
    while position < len(glob):
        char = glob[position]
        if char == "*":
            segments.append([])
        elif char == "?":
            segments[-1].append("")
        elif char == "\\":
            position += 1
            char = glob[position : position + 1]
            if char not in ("*", "?", "\\", "/", "}"):
                raise BuildError(
                    f"the glob {glob!r} escapes {char!r}", hint="a backslash keeps * ? and \\ only"
                )
            segments[-1].append(char)
        else:
            segments[-1].append(char)
        position += 1
    return [tuple(segment) for segment in segments]


def _match_end(value: str, segments: list[_Segment], begin: int, *, longest: bool) -> int | None:
    """Give where a match that starts at `begin` ends; every star but the last takes the least."""
    first, *between = segments
    if not _regex(first).match(value, begin):
        return None
    position = begin + len(first)
    for number, segment in enumerate(between):
        last = number == len(between) - 1
        found = (_rfind if last and longest else _find)(value, segment, position)
        if found is None:
            return None
        position = found + len(segment)
    return position


def _regex(segment: _Segment) -> re.Pattern[str]:
    return re.compile("".join(re.escape(char) or "." for char in segment), re.DOTALL)


def _find(value: str, segment: _Segment, begin: int) -> int | None:
    match = _regex(segment).search(value, begin)
    return match.start() if match else None


def _rfind(value: str, segment: _Segment, begin: int) -> int | None:
    backwards = _regex(segment[::-1]).search(value[::-1], 0, len(value) - begin)
    return None if backwards is None else len(value) - backwards.end()
