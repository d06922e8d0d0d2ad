"""`image build`: its options; the work is in `image_build_work`, which takes long to import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sandbox_kernel.cli.image_limits import LIMITS, WAIVABLE
from sandbox_kernel.cli.image_screen import MODES
from sandbox_kernel.cli.image_store import json_option, platform_option

Command = TypeVar("Command", bound=Callable[..., Any])


def _limit_options(command: Command) -> Command:
    """Add an option for each limit of a step, and `--waive`."""
    text = f"A limit to do without: {', '.join(WAIVABLE)}. May be repeated."
    command = click.option("--waive", multiple=True, metavar="NAME", help=text)(command)
    for limit in reversed(LIMITS):
        option = click.option(
            limit.option,
            limit.name,
            metavar=limit.unit.upper(),
            help=f"{limit.help} Default: {limit.default}.",
        )
        command = option(command)
    return command


def _file_options(command: Command) -> Command:
    """Add the options that name files, and values of the Dockerfile's."""
    options = [
        click.option("-t", "--tag", "tags", multiple=True, metavar="NAME", help="May be repeated."),
        click.option("-f", "--file", metavar="FILE", help="The Dockerfile; - for standard input."),
        click.option(
            "--build-arg",
            "build_args",
            multiple=True,
            metavar="K=V",
            help="A value for ARG; without =V that of the environment. May be repeated.",
        ),
        click.option(
            "--label", "labels", multiple=True, metavar="K=V", help="A label. May be repeated."
        ),
        click.option(
            "--secret",
            "secrets",
            multiple=True,
            metavar="id=ID,src=FILE",
            help="For RUN --mount=type=secret,id=ID; env=VAR in place of src. May be repeated.",
        ),
        click.option("--target", default="", metavar="STAGE", help="Build up to this stage."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("context", metavar="CONTEXT")
@_file_options
@platform_option
@click.option("--no-cache", is_flag=True, help="Make every step anew.")
@click.option("--pull", "refresh", is_flag=True, help="Look for newer images to build on.")
@click.option(
    "--network",
    type=click.Choice(["none", "host"]),
    default="none",
    show_default=True,
    help="What RUN has.",
)
@_limit_options
@click.option("--explain", is_flag=True, help="Say why a step is not taken from the cache.")
@click.option("--progress", type=click.Choice(MODES), default="auto", show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="Print the ID of the image, and nothing else.")
@click.option("--iidfile", type=click.Path(path_type=Path), metavar="FILE", help="Write the ID.")
@json_option
def build(**given: Any) -> None:
    """Build an image of the Dockerfile in the folder CONTEXT.

    FROM host builds on this machine's own Python. With - as CONTEXT the Dockerfile comes from
    standard input, and there is nothing to copy from. Limits hold for each RUN by itself.
    """
    from sandbox_kernel.cli import image_build_work  # noqa: PLC0415 - not for --help

    image_build_work.perform(image_build_work.Asked(**given))
