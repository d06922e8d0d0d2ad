"""The limits of a step of a build, as options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sandbox_kernel.errors import ConfigError
from sandbox_kernel.limits import BY_NAME, UNLIMITED

if TYPE_CHECKING:
    from sandbox_kernel.build.run import JobLimits

LIMITS = (
    replace(BY_NAME["memory"], default="2G", help="Memory of one step."),
    replace(BY_NAME["cpus"], default=UNLIMITED, help="Processors that one step may keep busy."),
    replace(BY_NAME["processes"], default=4096, help="Processes and threads at a time."),
    replace(BY_NAME["wall_time"], default="1h", help="Time on the clock for one step."),
    replace(BY_NAME["disk"], default="4G", help="Files that one step may write."),
)
"""As for cells, with other defaults, which are those of `JobLimits`."""
WAIVABLE = ("memory", "cpus", "processes")


def limits_of(given: Mapping[str, str | None], waived: Sequence[str]) -> JobLimits:
    """Give the limits of a step; raises ConfigError."""
    from sandbox_kernel.build.run import JobLimits  # noqa: PLC0415 - not for --help

    for name in waived:
        if name not in WAIVABLE:
            raise ConfigError(
                f"{name!r} cannot be waived", hint=f"it is one of {', '.join(WAIVABLE)}"
            )
    values: dict[str, Any] = {}
    for limit in LIMITS:
        text = given[limit.name]
        if limit.name in waived:
            if text is not None:
                raise ConfigError(
                    f"{limit.option} {text} and --waive {limit.name} exclude each other",
                    hint="leave one out",
                )
            values[limit.field] = None
        elif text is not None:
            values[limit.field] = limit.parse(text)
    return JobLimits(**values)
