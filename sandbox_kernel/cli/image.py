"""`sandbox-kernel image`: the commands for images, each in a module that it alone imports."""

from __future__ import annotations

import click

from sandbox_kernel.cli.main import HELP, Commands

_HERE = "sandbox_kernel.cli"
COMMANDS = {
    "build": f"{_HERE}.image_build:build",
    "pull": f"{_HERE}.image_transfer:pull",
    "push": f"{_HERE}.image_transfer:push",
    "import": f"{_HERE}.image_archive:import_",
    "export": f"{_HERE}.image_archive:export",
    "list": f"{_HERE}.image_show:list_",
    "inspect": f"{_HERE}.image_show:inspect",
    "history": f"{_HERE}.image_show:history",
    "tag": f"{_HERE}.image_names:tag",
    "remove": f"{_HERE}.image_names:remove",
    "prune": f"{_HERE}.image_space:prune",
    "disk-usage": f"{_HERE}.image_space:disk_usage",
}
ALIASES = {
    "ls": "list",
    "rm": "remove",
    "rmi": "remove",
    "du": "disk-usage",
    "df": "disk-usage",
    "load": "import",
    "save": "export",
}
"""What Docker and Podman call some of them."""


@click.command(cls=Commands, table=COMMANDS, aliases=ALIASES, context_settings=HELP)
def image() -> None:
    """Build, fetch and keep images: what cells run in instead of this machine's Python.

    `sandbox-kernel install --image NAME` makes a kernel of one. Results go to stdout, with
    --json as one document; progress and warnings go to stderr.
    """
