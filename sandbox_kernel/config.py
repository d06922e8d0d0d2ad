"""What users may set, and the one way from their words to frozen values.

Three places feed it: traitlets (a kernelspec's arguments, a configuration file), the options of
the command line, and the first line of a cell, `%%sandbox memory=256M`. All three read the table
`limits.LIMITS`. Whatever is wrong is a ConfigError that names the value and what would be right;
nothing is clamped or guessed. What a setting does to a container is not known here.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from traitlets import Float, Integer, List, TraitType, Unicode, Union
from traitlets.config import Configurable

from sandbox_kernel.errors import ConfigError
from sandbox_kernel.limits import BY_NAME, LIMITS, WAIVABLE, Limit, limits_markdown
from sandbox_kernel.model import Limits
from sandbox_kernel.units import parse_duration

__all__ = [
    "BY_NAME",
    "LIMITS",
    "WAIVABLE",
    "WORKSPACE_MODES",
    "SandboxConfig",
    "Settings",
    "arguments_of",
    "ceiling_of",
    "freeze",
    "is_status_line",
    "limits_markdown",
    "limits_of",
    "parse_cell",
]

WORKSPACE_MODES = {
    "overlay": "the notebook's folder can be read; what is written stays in the sandbox",
    "ro": "the notebook's folder can be read only",
    "rw": "the notebook's folder itself can be read and written",
    "none": "an empty folder",
}


def _limit_trait(name: str) -> TraitType[Any, Any]:
    limit = BY_NAME[name]
    # Text first: the command line's strings then reach `Limit.parse` as they were written, and
    # a bad one is an error in the notebook instead of a kernel that does not start.
    kinds = [Unicode(), Integer(), Float()]
    return Union(kinds, default_value=limit.default, help=limit.help).tag(config=True)


class SandboxConfig(Configurable):
    """The settings of a kernel: every cell has its limits, and may raise them to the ceiling."""

    memory = _limit_trait("memory")
    cpus = _limit_trait("cpus")
    cpu_time = _limit_trait("cpu_time")
    wall_time = _limit_trait("wall_time")
    processes = _limit_trait("processes")
    disk = _limit_trait("disk")
    output = _limit_trait("output")
    open_files = _limit_trait("open_files")
    io = _limit_trait("io")

    image = Unicode("host", help="The image that cells run in.").tag(config=True)
    workspace = Unicode(
        "overlay",
        help="How /workspace shows the notebook's folder: "
        + "; ".join(f"{mode} ({what})" for mode, what in WORKSPACE_MODES.items())
        + ".",
    ).tag(config=True)
    grace = Union(
        [Unicode(), Integer(), Float()],
        default_value="2s",
        help="How long an interrupted cell may take to stop before it is killed.",
    ).tag(config=True)
    ceiling: List[str] = List(
        Unicode(),
        help="How far a cell may raise a limit, as name=value, for example memory=4G. "
        "A limit that is not named cannot be raised.",
    ).tag(config=True)
    waive: List[str] = List(
        Unicode(), help="Limits to do without where the host cannot enforce them."
    ).tag(config=True)


@dataclass(frozen=True)
class Settings:
    """The frozen form of SandboxConfig; the layers below see nothing else."""

    limits: Limits
    ceiling: Limits
    image: str
    workspace_mode: str
    grace_s: float
    waived: frozenset[str]


def limits_of(config: SandboxConfig) -> Limits:
    """Give the limits that a configuration sets; raises ConfigError."""
    numbers: dict[str, Any] = {
        limit.field: limit.parse(getattr(config, limit.name)) for limit in LIMITS
    }
    return Limits(**numbers)


def ceiling_of(config: SandboxConfig, limits: Limits) -> Limits:
    """Give how far a cell may raise `limits`; raises ConfigError."""
    numbers: dict[str, Any] = {}
    for word in config.ceiling:
        name, sign, text = word.partition("=")
        if not sign:
            raise ConfigError(f"ceiling {word!r} has no value", hint="write it as memory=4G")
        if name not in BY_NAME:
            raise _unknown("limit to give a ceiling to", name, BY_NAME)
        limit = BY_NAME[name]
        numbers[limit.field] = _ceiling(limit, text, getattr(limits, limit.field))
    return replace(limits, **numbers)


def _ceiling(limit: Limit, text: str, default: float | None) -> int | float:
    """Read how far cells may raise the limit that they have; raises ConfigError."""
    number, word = limit.parse(text), f"{limit.name}={text}"
    if number is None:
        raise ConfigError(
            f"ceiling {word} is no bound", hint=f"give a high one, for example {limit.name}=100G"
        )
    if default is None:
        raise ConfigError(
            f"ceiling {word} has no limit below it: cells have none of {limit.name}",
            hint=f"set the limit too: {limit.option} {text}",
        )
    if number < default:
        raise ConfigError(
            f"ceiling {word} is below the limit of {limit.format(default)} that cells have",
            hint=f"lower the limit too: {limit.option} {text}",
        )
    return number


def freeze(config: SandboxConfig) -> Settings:
    """Check a whole configuration and leave traitlets behind; raises ConfigError."""
    if config.workspace not in WORKSPACE_MODES:
        raise _unknown("workspace mode", config.workspace, WORKSPACE_MODES)
    if not config.image.strip():
        raise ConfigError("image is empty", hint="name an image, for example host")
    try:
        grace_s = parse_duration(str(config.grace))
    except ConfigError as error:
        raise ConfigError(f"grace: {error.message}", hint=error.hint) from None
    for name in config.waive:
        if name not in WAIVABLE:
            raise _unknown("limit to waive", name, WAIVABLE)
    limits = limits_of(config)
    return Settings(
        limits=limits,
        ceiling=ceiling_of(config, limits),
        image=config.image,
        workspace_mode=config.workspace,
        grace_s=grace_s,
        waived=frozenset(config.waive),
    )


def arguments_of(config: SandboxConfig) -> list[str]:
    """Give the kernel's command line arguments for what differs from the defaults."""
    arguments = []
    for name, trait in sorted(SandboxConfig.class_own_traits(config=True).items()):
        value = getattr(config, name)
        if isinstance(value, list):
            arguments += [f"--SandboxConfig.{name}={item}" for item in value]
        elif value != trait.default_value:
            arguments.append(f"--SandboxConfig.{name}={value}")
    return arguments


def parse_cell(code: str, limits: Limits, ceiling: Limits) -> tuple[Limits, str]:
    """Give the limits of one cell and the code to run; raises ConfigError.

    Without a `%%sandbox` line at its top the cell has `limits`, with one at most `ceiling`. Line
    numbers stay, so that a traceback points at the line that the user sees.
    """
    lines = code.splitlines(keepends=True)
    top = next((index for index, line in enumerate(lines) if line.strip()), None)
    words = _magic_words(lines[top], "%%sandbox") if top is not None else None
    if top is None or words is None:
        return limits, code
    limits = _changed(limits, words, ceiling)
    following = next((line for line in lines[top + 1 :] if line.strip()), "")
    if _magic_words(following, "%%sandbox") is not None:
        raise ConfigError("a cell has two %%sandbox lines", hint="put all settings on one")
    return limits, _without_line(lines, top)


def _without_line(lines: list[str], top: int) -> str:
    rest = "".join(lines[top + 1 :])
    if not rest.strip():
        return ""
    if rest.lstrip().startswith("%%"):
        # IPython takes a cell magic on the very first line only.
        return rest.lstrip()
    # IPython drops blank lines at the top, and the count with them, but never a comment.
    return "".join((*lines[:top], f"# {lines[top].strip()}\n", rest))


def is_status_line(code: str) -> bool:
    """Tell whether a cell is `%sandbox` alone, the question for limits and use.

    Raises ConfigError for an unknown verb, and where other lines stand beside it.
    """
    lines = [line for line in code.splitlines() if line.strip()]
    words = _magic_words(lines[0], "%sandbox") if lines else None
    if words is None:
        return False
    if words:
        raise ConfigError(
            f"%sandbox has no verb {words[0]!r}",
            hint="there is %sandbox alone, which shows limits and use, and a first line "
            "%%sandbox memory=256M, which sets limits for its cell",
        )
    if len(lines) > 1:
        raise ConfigError(
            "%sandbox stands alone in its cell",
            hint="move the other lines to a cell of their own; %%sandbox sets limits",
        )
    return True


def _magic_words(line: str, magic: str) -> list[str] | None:
    """Give the words after a magic, or None where the line is something else."""
    name, *arguments = line.strip().split(None, 1)[:2] or [""]
    if name != magic:
        return None
    try:
        return shlex.split(arguments[0] if arguments else "", comments=True)
    except ValueError as error:
        raise ConfigError(
            f"{line.strip()!r} cannot be read: {error}",
            hint="write it as %%sandbox memory=256M wall_time=5s",
        ) from None


def _changed(limits: Limits, words: Iterable[str], ceiling: Limits) -> Limits:
    """Give the limits with the settings of a %%sandbox line; raises ConfigError."""
    numbers: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or not name:
            raise ConfigError(
                f"%%sandbox cannot read {word!r}",
                hint="write each setting as name=value, without blanks around the =",
            )
        limit = _cell_limit(name)
        if limit.field in numbers:
            raise ConfigError(f"%%sandbox sets {name} twice", hint="leave one of them")
        numbers[limit.field] = _below_ceiling(limit, text, getattr(ceiling, limit.field))
    return replace(limits, **numbers)


def _cell_limit(name: str) -> Limit:
    if (limit := BY_NAME.get(name)) is not None:
        return limit
    if name in SandboxConfig.class_own_traits(config=True):
        raise ConfigError(
            f"%%sandbox cannot set {name}: it belongs to the kernel",
            hint=f"install a kernel with `sandbox-kernel install --{name} ...`",
        )
    raise _unknown("%%sandbox setting", name, BY_NAME)


def _below_ceiling(limit: Limit, text: str, ceiling: float | None) -> int | float | None:
    number = limit.parse(text)
    if number == ceiling:
        return number
    if ceiling is None:
        # What enforces it is made with the session.
        raise ConfigError(
            f"{limit.name}={text} cannot be set by a cell: this kernel has no limit of "
            f"{limit.name} to lower",
            hint=f"install a kernel with one: `sandbox-kernel install {limit.option} {text}`",
        )
    if number is None or number > ceiling:
        raise ConfigError(
            f"{limit.name}={text} is above the ceiling of {limit.format(ceiling)}",
            hint="the kernelspec sets the ceiling: ask for less, or install a kernel with "
            f"`sandbox-kernel install --ceiling {limit.name}={text}`",
        )
    return number


def _unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return ConfigError(f"there is no {what} {name!r}", hint=f"{guess}there is {', '.join(names)}")
