"""`sandbox-kernel doctor`: say what this host offers, why not, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from sandbox_kernel.linux import probe
from sandbox_kernel.linux.cgroup import CgroupTree
from sandbox_kernel.linux.probe import Finding

VERSION = 1
"""Of the JSON; a new field does not change it."""

TITLES = {
    "ids": "User and group ids",
    "namespaces": "Namespaces and mounts",
    "overlay": "Overlay file system",
    "cgroups": "Control groups ({layout})",
    "seccomp": "System call filter",
    "limits": "Other limits",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
def doctor(*, as_json: bool) -> int:
    """Try everything that the kernel needs of this host, and say what is missing.

    Run it as the user, and in the place, that Jupyter is started from: in the same service,
    container or terminal. The exit status is 1 if the kernel could not run with its defaults.
    """
    findings = probe.probe()
    layout = CgroupTree.detect().layout
    missing = probe.lacking(findings)
    if as_json:
        click.echo(document(findings, layout))
    else:
        show(findings, layout)
    return 1 if missing else 0


def document(findings: Sequence[Finding], layout: str) -> str:
    """Give the JSON for programs."""
    content = {
        "version": VERSION,
        "ok": not probe.lacking(findings),
        "layout": layout,
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(content, indent=2)


def show(findings: Sequence[Finding], layout: str) -> None:
    """Print a table per group, and the verdict."""
    from rich.console import Console  # noqa: PLC0415 - slow to import, and not for --json
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    console = Console(highlight=False)
    for group, title in TITLES.items():
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(width=1)
        table.add_column(min_width=18, no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            if finding.group == group:
                mark, style = mark_of(finding, plain=console.options.ascii_only)
                table.add_row(Text(mark, style), finding.name, Text(told(finding)))
        console.print(Text(title.format(layout=layout), "bold"))
        console.print(table)
        console.print()
    missing = probe.lacking(findings)
    console.print(Text(verdict(missing), "bold red" if missing else "bold green"))


def mark_of(finding: Finding, *, plain: bool) -> tuple[str, str]:
    """Give the mark of a line and its colour; what is missing without harm has a dash.

    `plain` is a terminal that shows nothing but ASCII.
    """
    if finding.available:
        return ("+" if plain else "✓"), "green"
    if not finding.required:
        return "-", "yellow"
    return ("X" if plain else "✗"), "red"


def told(finding: Finding) -> str:
    """Give what stands beside the name: nothing, or why it is missing and what to do."""
    if finding.available:
        return ""
    need = "" if finding.required else "not needed; "
    return f"{need}{finding.why}\n-> {finding.remedy}"


def verdict(missing: Sequence[Finding]) -> str:
    """Give the last line."""
    if not missing:
        return "The kernel can run here with its defaults."
    names = ", ".join(finding.name for finding in missing)
    return f"The kernel cannot run here with its defaults: {names}"
