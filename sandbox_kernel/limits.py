"""The table of limits: how each is written, checked and shown; what it does is not known here.

Numbers are bytes, bytes a second, seconds or pieces, as the fields of `model.Limits` say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sandbox_kernel.errors import ConfigError
from sandbox_kernel.units import format_duration, format_size, parse_duration, parse_size

Value = str | int | float
"""A setting as it is written: text, or a number in a configuration file."""

MIB = 1 << 20
UNLIMITED = "none"
"""How the absence of a limit is written, where there may be none."""
MAX_COUNT = 1 << 20
"""Above this, a number of processes, files or processors is a slip of the pen."""


@dataclass(frozen=True)
class Limit:
    """One row of the table of limits."""

    name: str
    default: Value
    unit: Literal["size", "rate", "duration", "count", "number"]
    help: str
    field: str
    """The field of `model.Limits` that it fills."""
    minimum: float
    """The least that is of use, in bytes, seconds or pieces; for a rate in bytes a second."""

    @property
    def option(self) -> str:
        """The option of the command line that sets it."""
        return "--" + self.name.replace("_", "-")

    def parse(self, value: Value) -> int | float | None:
        """Give the value in bytes, seconds or pieces; raises ConfigError.

        None stands for no limit, which only a limit whose default is `none` can have.
        """
        text = str(value)
        if text.strip() == UNLIMITED == self.default:
            return None
        try:
            number = self._number(text)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error.message}", hint=error.hint) from None
        if number < self.minimum:
            raise ConfigError(
                f"{self.name}={text} is too small: the least is {self.format(self.minimum)}",
                hint=self._unit_hint(text),
            )
        return number

    def _number(self, text: str) -> int | float:
        if self.unit == "size":
            return parse_size(text)
        if self.unit == "rate":
            return parse_size(text.strip().removesuffix("/s"))
        if self.unit == "duration":
            return parse_duration(text)
        pattern, what = (r"\d{1,12}", "whole number")
        if self.unit == "number":
            pattern, what = (r"\d{1,12}(\.\d{1,12})?", "number")
        if re.fullmatch(pattern, text.strip(), re.ASCII) is None:
            raise ConfigError(f"{text!r} is not a {what}", hint=f"for example {self.default}")
        number = float(text) if self.unit == "number" else int(text)
        if number > MAX_COUNT:
            raise ConfigError(f"{text!r} is too large", hint=f"the most is {MAX_COUNT}")
        return number

    def _unit_hint(self, text: str) -> str:
        if self.unit in ("size", "rate") and text.strip().isdigit() and int(text) > 0:
            return f"a bare number counts bytes: did you mean {self.name}={text.strip()}M?"
        return f"the default is {self.default}"

    def format(self, number: float | None) -> str:
        """Give a value in bytes, seconds or pieces as people read it; None is `none`."""
        if number is None:
            return UNLIMITED
        if self.unit == "rate":
            return f"{format_size(int(number))}/s"
        if self.unit == "size":
            return format_size(int(number))
        return format_duration(number) if self.unit == "duration" else f"{number:g}"


LIMITS = (
    Limit(
        "memory",
        "1G",
        "size",
        "Memory that one cell may use, beyond what the session already holds.",
        "memory_bytes",
        16 * MIB,
    ),
    Limit("cpus", 2.0, "number", "Processors that one cell may keep busy.", "cpus", 0.01),
    Limit(
        "cpu_time",
        "5m",
        "duration",
        "Processor time of one cell, all its processes together.",
        "cpu_time_s",
        0.1,
    ),
    Limit("wall_time", "5m", "duration", "Time on the clock for one cell.", "wall_time_s", 0.1),
    Limit(
        "processes", 128, "count", "Processes and threads of one cell at a time.", "processes", 1
    ),
    Limit(
        "disk",
        "512M",
        "size",
        "Files that the session's cells may write, all together.",
        "disk_bytes",
        MIB,
    ),
    Limit(
        "output",
        "10M",
        "size",
        "Text of stdout and stderr of one cell; the rest is dropped.",
        "output_bytes",
        1024,
    ),
    Limit("open_files", 1024, "count", "Open files of each process of a cell.", "open_files", 64),
    Limit(
        "io",
        UNLIMITED,
        "rate",
        "Bytes a second that one cell may read from disks, and as many that it may write.",
        "io_bytes_per_s",
        MIB,
    ),
)
"""Every limit there is: feeds the traits, the options, the %%sandbox line and the docs."""

BY_NAME = {limit.name: limit for limit in LIMITS}

WAIVABLE = ("memory", "cpus", "processes", "cpu_time", "io")
"""Limits that a host may not be able to enforce, and that can then be done without by name.

The other limits work everywhere, and no protection can be waived: nothing runs without them.
"""


def limits_markdown() -> str:
    """Give the table of limits as the documentation shows it."""
    rows = ["| limit | default | least | what it bounds |", "|---|---|---|---|"]
    rows += [
        f"| `{limit.name}` | {limit.default} | {limit.format(limit.minimum)} | {limit.help} |"
        for limit in LIMITS
    ]
    return "\n".join(rows) + "\n"
