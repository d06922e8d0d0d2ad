"""The command line: which commands there are, and how an error is told.

Each command lives in a module of its own, imported when it is called. Exit status: 0 done,
1 the command failed, 2 a value that the user wrote is wrong.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import click

from sandbox_kernel.errors import BuildError, ConfigError, SandboxError

COMMANDS = {
    "install": "sandbox_kernel.cli.install:install",
    "doctor": "sandbox_kernel.cli.doctor:doctor",
    "run": "sandbox_kernel.cli.run:run",
    "image": "sandbox_kernel.cli.image:image",
}
"""Command, and the module and object that it is."""

FAILED, USAGE = 1, 2
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tab and newline."""
HELP = {"help_option_names": ["-h", "--help"]}


class Commands(click.Group):
    """A group that imports a command when it is asked for.

    `aliases` are more names of commands, which `--help` does not show.
    """

    def __init__(
        self,
        *arguments: Any,
        table: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self._table = table
        self._aliases = aliases or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give the names in the order of the table, as `--help` shows them."""
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None where there is no such command."""
        found = self._table.get(self._aliases.get(cmd_name, cmd_name))
        if found is None:
            return None
        module, _, name = found.partition(":")
        return cast("click.Command", getattr(importlib.import_module(module), name))


def version() -> str:
    """Give the installed version, or `unknown` in a bare checkout."""
    import importlib.metadata  # noqa: PLC0415 - slow to import, and for one option only

    try:
        return importlib.metadata.version("sandbox-kernel")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's
    if value:
        click.echo(f"sandbox-kernel, version {version()}")
        ctx.exit()


@click.command(cls=Commands, table=COMMANDS, context_settings=HELP)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def commands() -> None:
    """Run each cell of a notebook in a fresh container."""


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit status; errors go to stderr."""
    try:
        status = commands.main(list(arguments), prog_name="sandbox-kernel", standalone_mode=False)
    except SandboxError as error:
        message = _quoted(error) if isinstance(error, BuildError) else error.message
        return _tell(message, error.hint, USAGE if isinstance(error, ConfigError) else FAILED)
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


def _quoted(error: BuildError) -> str:
    """Give a build's error with the line that it is about, as compilers do."""
    if not error.place:
        return error.problem
    line = error.place.rpartition(":")[2]
    quoted = "\n".join(f"{line:>5} | {text}" for text in error.text.splitlines())
    return f"{error.place}: {error.problem}\n{quoted}".rstrip()


def _tell(message: str, hint: str, status: int) -> int:
    # Registries and archives have their words in it: no control characters for the terminal.
    click.echo(f"Error: {_CONTROL.sub('?', message)}", err=True)
    if hint:
        click.echo(f"Hint: {_CONTROL.sub('?', hint)}", err=True)
    return status
