"""The command line: which commands there are, and how an error is told.

Each command lives in a module of its own, imported when it is called. Exit status: 0 done,
1 the command failed, 2 a value that the user wrote is wrong.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from typing import cast

import click

from sandbox_kernel.errors import ConfigError, SandboxError

COMMANDS = {
    "install": "sandbox_kernel.cli.install",
    "doctor": "sandbox_kernel.cli.doctor",
    "run": "sandbox_kernel.cli.run",
}
"""Command and the module that has it, as an object of the same name."""

FAILED, USAGE = 1, 2


class Commands(click.Group):
    """A group that imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give the names in the order of the table, as `--help` shows them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None where there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name])
        return cast("click.Command", getattr(module, cmd_name))


def version() -> str:
    """Give the installed version, or `unknown` in a bare checkout."""
    try:
        return importlib.metadata.version("sandbox-kernel")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version(), prog_name="sandbox-kernel")
def commands() -> None:
    """Run each cell of a notebook in a fresh container."""


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit status; errors go to stderr."""
    try:
        status = commands.main(list(arguments), prog_name="sandbox-kernel", standalone_mode=False)
    except SandboxError as error:
        return _tell(error.message, error.hint, USAGE if isinstance(error, ConfigError) else FAILED)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return USAGE
    except click.UsageError as error:
        hint = f"see `{error.ctx.command_path} --help`" if error.ctx else ""
        return _tell(error.format_message(), hint, USAGE)
    except click.ClickException as error:
        return _tell(error.format_message(), "", error.exit_code)
    except click.Abort:
        return _tell("interrupted", "", FAILED)
    return status if isinstance(status, int) else 0


def _tell(message: str, hint: str, status: int) -> int:
    click.echo(f"Error: {message}", err=True)
    if hint:
        click.echo(f"Hint: {hint}", err=True)
    return status
