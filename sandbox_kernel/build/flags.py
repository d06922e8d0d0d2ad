"""The flags of an instruction, checked against those that it knows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from sandbox_kernel.build.lexer import Line

_BOOLEANS = {"": True, "true": True, "false": False}


@dataclass(frozen=True)
class Flags:
    """What was given, by name without the dashes, in the order of the line."""

    given: Mapping[str, tuple[str, ...]]

    def text(self, name: str, default: str = "") -> str:
        """Give the value of a flag that is given once at most."""
        return self.given.get(name, (default,))[0]

    def all(self, name: str) -> tuple[str, ...]:
        """Give all values of a flag that may be repeated."""
        return self.given.get(name, ())

    def switch(self, name: str) -> bool | None:
        """Give the value of a flag that is true or false; None where it is not given."""
        return _BOOLEANS[self.text(name).lower()] if name in self.given else None


def read_flags(
    line: Line,
    *,
    texts: tuple[str, ...] = (),
    repeated: tuple[str, ...] = (),
    switches: tuple[str, ...] = (),
    refused: Mapping[str, str] | None = None,
) -> Flags:
    """Give the flags of this line; raises BuildError for any that is not named here.

    `refused` are flags that Docker has and this builder has not, each with the remedy.
    """
    given: dict[str, list[str]] = {}
    keyword = line.keyword.upper()
    for flag in line.flags:
        name, equals, value = flag[2:].partition("=")
        if refused and name in refused:
            raise line.place.error(f"{keyword} --{name} is not supported", hint=refused[name])
        if name not in (*texts, *repeated, *switches):
            raise _unknown(line, name, (*texts, *repeated, *switches))
        if name in given and name not in repeated:
            raise line.place.error(f"{keyword} --{name} is given twice", hint="give it once")
        if name in switches and (value.lower() not in _BOOLEANS or (equals and not value)):
            raise line.place.error(
                f"{keyword} --{name}={value}", hint=f"write --{name}, or =true or =false"
            )
        if name not in switches and not equals:
            raise line.place.error(
                f"{keyword} --{name} has no value", hint=f"write --{name}=VALUE, without a blank"
            )
        given.setdefault(name, []).append(value)
    return Flags({name: tuple(values) for name, values in given.items()})


def _unknown(line: Line, name: str, known: tuple[str, ...]) -> Exception:
    keyword = line.keyword.upper()
    if not known:
        hint = f"{keyword} has no flags"
    elif close := difflib.get_close_matches(name[:100], known, 1):
        hint = f"did you mean --{close[0]}?"
    else:
        hint = f"{keyword} has " + ", ".join(f"--{one}" for one in known)
    return line.place.error(f"{keyword} has no flag --{name}", hint=hint)
