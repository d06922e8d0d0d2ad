"""The options that set up a kernel, the same for every command that starts or installs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from traitlets import Undefined

from sandbox_kernel.config import LIMITS, WAIVABLE, WORKSPACE_MODES, SandboxConfig

Command = TypeVar("Command", bound=Callable[..., Any])

SETTINGS = (
    *(limit.name for limit in LIMITS),
    *("image", "workspace", "ceiling", "grace", "waive"),
)
"""The names of the parameters that `setting_options` adds, which are traits of SandboxConfig."""


def setting_options(command: Command) -> Command:
    """Add an option for each limit and for image, workspace, ceiling, grace and waive.

    Values arrive as text or None; `config_from` reads them.
    """
    options = [
        click.option(
            limit.option, limit.name, metavar=limit.unit.upper(), help=_with_default(limit.name)
        )
        for limit in LIMITS
    ]
    options += [
        click.option("--image", metavar="REF", help=_with_default("image")),
        click.option(
            "--workspace", metavar="|".join(WORKSPACE_MODES), help=_with_default("workspace")
        ),
        click.option(
            "--ceiling", multiple=True, metavar="NAME=VALUE", help=_with_default("ceiling")
        ),
        click.option("--grace", metavar="DURATION", help=_with_default("grace")),
        click.option(
            "--waive",
            multiple=True,
            metavar="NAME",
            help="A limit to do without where the host cannot enforce it: "
            f"{', '.join(WAIVABLE)}. May be given again.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _with_default(name: str) -> str:
    trait = SandboxConfig.class_own_traits(config=True)[name]
    if isinstance(trait.default_value, list | tuple) or trait.default_value is Undefined:
        return f"{trait.help} May be given again."
    return f"{trait.help} Default: {trait.default_value}."


def config_from(settings: dict[str, Any]) -> SandboxConfig:
    """Give the configuration that the options of `setting_options` ask for, not yet checked."""
    given = {name: settings[name] for name in SETTINGS if settings[name] not in (None, ())}
    for name in ("ceiling", "waive"):
        if name in given:
            given[name] = list(given[name])
    return SandboxConfig(**given)
