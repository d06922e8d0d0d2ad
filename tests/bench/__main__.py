"""Measure the sandboxed kernel against stock ipykernel, interleaved in one run.

Run it from the repository's root: `python -m tests.bench`. It asserts nothing: a bar that is
missed is a word in the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    # Started as a file: its own folder is on the path then, and the repository is not.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.bench import kernels
from tests.bench.measure import BenchError
from tests.bench.report import STOCK, SUBJECT, Series, as_json, as_table
from tests.bench.run import ALL_MEASURES, OPTIONAL_MEASURES, Bench, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

TABLE_COLUMNS = 140
MEASURE_KEYS = [measure.key for measure in ALL_MEASURES + OPTIONAL_MEASURES]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--kernel", default="sandbox-python", help="the kernel under test")
    parser.add_argument("--stock", default="python3", help="the kernel to compare with")
    parser.add_argument("-n", "--executions", type=_count, default=200, help="of each cell measure")
    parser.add_argument("--starts", type=_count, default=20, help="of each kernel")
    parser.add_argument("--warm-up", type=_count, default=20, help="executions before that")
    parser.add_argument("--quick", action="store_true", help="a run of about a minute")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), metavar="PATH")
    parser.add_argument(
        "--only", type=_keys, metavar="KEY,...", help=f"choose of: {', '.join(MEASURE_KEYS)}"
    )
    parser.add_argument(
        "--with-objects", action="store_true", help="also with 1 GB in many small objects"
    )
    parser.add_argument(
        "--kernel-arg", action="append", default=[], metavar="ARG", help="for the kernel under test"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.executions, options.starts, options.warm_up = 40, 4, 10
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _keys(text: str) -> frozenset[str]:
    keys = frozenset(text.split(","))
    if unknown := sorted(keys - set(MEASURE_KEYS)):
        raise argparse.ArgumentTypeError(
            f"no measure {', '.join(map(repr, unknown))}; there are {', '.join(MEASURE_KEYS)}"
        )
    return keys


def settings_from(options: argparse.Namespace) -> Settings:
    """Turn options into settings; raises BenchError if a kernel is not installed."""
    wanted = options.only or frozenset(measure.key for measure in ALL_MEASURES)
    if options.with_objects:
        wanted |= {measure.key for measure in OPTIONAL_MEASURES}
    return Settings(
        stock=kernels.choose(options.stock),
        subject=kernels.choose(options.kernel, extra_arguments=tuple(options.kernel_arg)),
        executions=options.executions,
        starts=options.starts,
        warm_up=options.warm_up,
        wanted=wanted,
    )


def about(settings: Settings, load_at_start: float) -> dict[str, Any]:
    """Describe the circumstances of a run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernels": {STOCK: settings.stock.name, SUBJECT: settings.subject.name},
        "extra_arguments": list(settings.subject.extra_arguments),
        "python": platform.python_version(),
        "linux": platform.release(),
        "processors": os.cpu_count(),
        "load": [load_at_start, os.getloadavg()[0]],
        "versions": {name: _version(name) for name in ("ipykernel", "jupyter_client", "numpy")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def measure(settings: Settings, console: Console) -> list[Series]:
    """Run everything, with a bar that shows where it is."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def advance(title: str, done: int, total: int) -> None:
            progress.update(task, description=title, completed=done, total=total)

        return list(Bench(settings, advance).run())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON; 2 if it could not even begin."""
    options = parse(argv)
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        # A file has no width; rich would take 80 columns and break every cell.
        console.width = TABLE_COLUMNS
    load_at_start = os.getloadavg()[0]
    try:
        settings = settings_from(options)
        options.json.parent.mkdir(parents=True, exist_ok=True)
    except (BenchError, OSError) as error:
        errors.print(f"bench: {error}", markup=False, style="red")
        return 2
    all_series = measure(settings, errors)
    facts = about(settings, load_at_start)
    title = (
        f"Python {facts['python']}, Linux {facts['linux']}, {facts['processors']} processors, "
        f"load {facts['load'][0]:.2f} before and {facts['load'][1]:.2f} after"
    )
    console.print(as_table(all_series, title=title, sides=facts["kernels"]))
    for series in all_series:
        for note in series.notes:
            console.print(f"{series.measure.key}: {note}", markup=False)
    options.json.write_text(json.dumps(as_json(all_series, about=facts), indent=1) + "\n", "utf-8")
    console.print(f"written to {options.json}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
