"""Files beside the code that others rely on."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.mark.parametrize("name", ["run", "packages", "venv"])
def test_scripts_can_be_run(name: str) -> None:
    script = ROOT / ".ci" / name
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_the_kernelspec_promises_what_works() -> None:
    spec = json.loads((ROOT / "kernelspec" / "kernel.json").read_text("utf-8"))
    assert spec["argv"] == ["python", "-P", "-m", "sandbox_kernel", "-f", "{connection_file}"]
    assert spec["interrupt_mode"] == "message"
    assert spec["metadata"]["debugger"] is False


def test_the_changelog_has_this_version() -> None:
    assert f"## {PROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_make_targets_are_there() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    for target in ("demo", "test", "test-unit", "lint", "bench", "clean"):
        assert f"\n{target}:" in text


def test_ci_skips_nothing() -> None:
    text = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "--require=all" in text
    assert "make test" in text
    assert "make demo" in text
