"""The exec form: a JSON list of strings, as Docker tells it from a shell's line."""

from __future__ import annotations

import json

from sandbox_kernel.errors import BuildError

_HINT = 'write ["program", "argument"], every element in double quotes'


def json_list(text: str) -> tuple[str, ...] | None:
    """Give the strings of a JSON list; None if this is no JSON, and so a shell's line.

    Raises BuildError for JSON that holds something else than strings.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text, parse_int=_no_text, parse_float=_no_text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list):
        return None
    if not all(isinstance(one, str) for one in found):
        raise BuildError("the exec form holds something else than strings", hint=_HINT)
    if any("\0" in one for one in found):
        raise BuildError("a NUL character", hint="remove it; no argument can hold one")
    # JSON can spell half of a surrogate pair, which no UTF-8 can.
    return tuple(one.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for one in found)


def _no_text(_digits: str) -> None:
    """Read any number as something that is no string, however long it is."""


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
