"""The table of all probes in docs/security.md, made of what the tests declare.

`pytest tests/escape/test_table.py --write-table` writes it anew. A run of the tests leaves beside it
what came of each test in build/probes.json.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.escape import elsewhere
from tests.escape.probe import Probe

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "security.md"
BEGIN, END = "<!-- probes: begin -->", "<!-- probes: end -->"
MODULES = (
    "tests.escape.cells",
    "tests.escape.test_layers",
    "tests.escape.test_bounds",
    "tests.escape.test_gate",
    "tests.escape.test_frames",
    "tests.escape.test_answers",
    "tests.escape.test_fuzz",
    "tests.golden.syscalls.test_allowed_calls",
)
CLASSES = 50


def probes() -> tuple[Probe, ...]:
    """Give all probes, by their numbers; those of this kernel alone come last."""
    found: list[Probe] = [*elsewhere.PROBES, *elsewhere.DOCUMENTED]
    for name in MODULES:
        found += importlib.import_module(name).PROBES
    return tuple(sorted(found, key=lambda probe: probe.number or CLASSES + 1))


def table() -> str:
    """Give the table as Markdown."""
    rows = [
        "| No. | probe | what it gets | twin without | the twin gets |",
        "|---|---|---|---|---|",
    ]
    rows += [
        "| "
        + " | ".join(
            (
                str(probe.number or ""),
                _cell(probe.name),
                _cell(probe.refused),
                _cell(probe.guard),
                _cell(" or ".join(probe.opens)),
            )
        )
        + " |"
        for probe in probes()
    ]
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def committed() -> str:
    """Give the table that stands in the document."""
    _, _, rest = DOCUMENT.read_text("utf-8").partition(f"{BEGIN}\n")
    return rest.partition(f"\n{END}")[0]


def write() -> None:
    """Put the table into the document."""
    before, begin, rest = DOCUMENT.read_text("utf-8").partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"\n{END}")
    DOCUMENT.write_text(f"{before}{begin}{table()}{end}{after}", "utf-8")
