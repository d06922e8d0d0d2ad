"""`sandbox-kernel doctor`: say what this host offers, why not, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click

from sandbox_kernel.linux import probe
from sandbox_kernel.linux.cgroup import CgroupTree
from sandbox_kernel.linux.probe import Finding, Ids

VERSION = 1
"""Of the JSON; a new field does not change it."""

TITLES = {
    "ids": "User and group ids ({user}: {ids})",
    "namespaces": "Namespaces and mounts",
    "overlay": "Overlay file system",
    "cgroups": "Control groups ({layout})",
    "seccomp": "System call filter",
    "limits": "Other limits",
}

USERS = {"root": "root", "ordinary": "an ordinary user"}
IDS = {
    "high": "a range of its own for each session",
    "subordinate": "the range of /etc/subuid",
    "single": "one id alone",
    "none": "none that a session could have",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
def doctor(*, as_json: bool) -> int:
    """Try everything that the kernel needs of this host, and say what is missing.

    Run it as the user, and in the place, that Jupyter is started from: in the same service,
    container or terminal. The exit status is 1 if the kernel could not run with its defaults.
    """
    findings = probe.probe()
    host = Host(CgroupTree.detect().layout, probe.user(), probe.ids_of(findings))
    if as_json:
        click.echo(document(findings, host))
    else:
        show(findings, host)
    return 1 if probe.lacking(findings) else 0


@dataclass(frozen=True)
class Host:
    """Which kind of host this is, for the user who asks."""

    layout: str
    """Of cgroups: `v2`, `v1`, `hybrid` or `none`."""
    user: str
    """`root` or `ordinary`."""
    ids: Ids


def document(findings: Sequence[Finding], host: Host) -> str:
    """Give the JSON for programs."""
    content = {
        "version": VERSION,
        "ok": not probe.lacking(findings),
        "layout": host.layout,
        "user": host.user,
        "ids": host.ids.kind,
        "ids_why": host.ids.why,
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(content, indent=2)


def show(findings: Sequence[Finding], host: Host) -> None:
    """Print a table per group, and the verdict."""
    from rich.console import Console  # noqa: PLC0415 - slow to import, and not for --json
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    console = Console(highlight=False)
    heading = {
        "layout": host.layout,
        "user": USERS[host.user],
        "ids": IDS[host.ids.kind],
    }
    for group, title in TITLES.items():
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(width=1)
        table.add_column(min_width=18, no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            if finding.group == group:
                mark, style = mark_of(finding, plain=console.options.ascii_only)
                table.add_row(Text(mark, style), finding.name, Text(told(finding)))
        console.print(Text(title.format(**heading), "bold"))
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
    without = f"\nwithout it {finding.without}" if finding.without else ""
    return f"{need}{finding.why}{without}\n-> {finding.remedy}"


def verdict(missing: Sequence[Finding]) -> str:
    """Give the last line."""
    if not missing:
        return "The kernel can run here with its defaults."
    names = ", ".join(finding.name for finding in missing)
    return f"The kernel cannot run here with its defaults: {names}"
