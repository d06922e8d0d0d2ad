"""A short soak, as build machines run it: nothing leaks, and every cell ends as it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.soak.home import ROOT

pytestmark = [
    pytest.mark.needs("user_namespace", "overlay", "seccomp", "memory", "cpus", "processes"),
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.escape,
]


def soak(report: Path, *options: str) -> dict[str, Any]:
    """Run a soak in a process of its own, which adopts all orphans; give its report."""
    # How fast cells are depends on what else the machine does.
    words = [sys.executable, "-m", "tests.soak", "--no-pace", "--json", str(report), *options]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert report.exists(), done.stderr[-2000:]
    found: dict[str, Any] = json.loads(report.read_text("utf-8"))
    bad = [row for row in found["rows"] if row["verdict"] == "FAILED"]
    assert not bad, done.stdout
    assert done.returncode == 0, done.stdout
    return found


@pytest.mark.timeout(300)
def test_a_session_under_attack_leaks_nothing(tmp_path: Path) -> None:
    found = soak(
        tmp_path / "report.json", "--cells=400", "--sessions=8", "--fleet-cells=10", "--kills=0"
    )
    verdicts = {row["what"]: row["verdict"] for row in found["rows"]}
    assert verdicts["cells in one session"] == "pass"
    assert found["problems"] == {}


@pytest.mark.timeout(300)
def test_parts_that_are_killed_at_random_moments_leave_nothing(tmp_path: Path) -> None:
    found = soak(tmp_path / "report.json", "--cells=0", "--kills=60", "--seed=5")
    assert found["problems"] == {}
    assert any(row["what"].startswith("kills: ") for row in found["rows"])
