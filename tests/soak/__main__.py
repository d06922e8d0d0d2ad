"""Let a session run for a long time under attack, and look for whatever leaks or slows down.

Run it from the repository's root: `python -m tests.soak`, or `make soak`. Exit status 0 if all is
as it was before, 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.soak.census import Host, adopt_orphans
from tests.soak.endurance import Endurance, Plan
from tests.soak.findings import Problems, Row, as_json, as_table
from tests.soak.home import home
from tests.soak.kills import Kills

TABLE_COLUMNS = 120


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--cells", type=_count, default=10_000, help="in one session")
    parser.add_argument("--sessions", type=_count, default=50, help="in parallel, for a while")
    parser.add_argument(
        "--fleet-cells", type=_count, default=20, metavar="N", help="of each of these"
    )
    parser.add_argument("--kills", type=_count, default=1000, help="of parts, at random moments")
    parser.add_argument("--seed", type=_count, default=1, help="decides the order and the moments")
    parser.add_argument("--no-pace", action="store_true", help="show times, but ask for none")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def soak(options: argparse.Namespace, console: Console) -> tuple[list[Row], Problems]:
    """Run all phases; give the lines of the table and what went wrong."""
    plan = Plan(
        options.cells, options.sessions, options.fleet_cells, options.seed, not options.no_pace
    )
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    rows: list[Row] = []
    problems = Problems()
    adopt_orphans()
    with home() as folders, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def advance(title: str, done: int, total: int) -> None:
            progress.update(task, description=title, completed=done, total=total)

        host = Host(folders)
        if plan.cells:
            rows += Endurance(plan, host, advance, problems).run()
        if options.kills:
            kills = Kills(host, options.seed, advance)
            rows += kills.run(options.kills)
            problems.merge(dict(kills.problems.counts), kills.problems.examples)
    return rows, problems


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print the table, write the JSON; 1 if anything is not as it must be."""
    options = parse(argv)
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console.width = TABLE_COLUMNS
    load_before, began_s = os.getloadavg()[0], time.monotonic()
    rows, problems = soak(options, errors)
    about: dict[str, Any] = {
        "cells": options.cells,
        "sessions": options.sessions,
        "kills": options.kills,
        "seed": options.seed,
        "python": platform.python_version(),
        "linux": platform.release(),
        "load": [load_before, os.getloadavg()[0]],
        "took_s": round(time.monotonic() - began_s),
    }
    title = (
        f"Python {about['python']}, Linux {about['linux']}, {about['took_s']} s, "
        f"load {about['load'][0]:.2f} before and {about['load'][1]:.2f} after"
    )
    console.print(as_table(rows, title))
    for what, count in problems.counts.most_common():
        console.print(f"{count} x {what}", markup=False, style="red")
        for example in problems.examples[what]:
            console.print(f"    {example}", markup=False)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(as_json(rows, problems, about), indent=1)
        options.json.write_text(f"{text}\n", "utf-8")
    return int(any(row.good is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
