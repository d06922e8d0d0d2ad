"""`sandbox-kernel doctor` over made-up findings."""

from __future__ import annotations

import json

import pytest

from sandbox_kernel import __main__ as entry
from sandbox_kernel.cli import doctor
from sandbox_kernel.linux import probe
from sandbox_kernel.linux.probe import Finding

GOOD = Finding("seccomp", "seccomp", available=True, required=True, why="", remedy="")
BAD = Finding(
    "overlay", "overlay", available=False, required=True, why="[no] such", remedy="load it"
)
OPTIONAL = Finding("swap", "cgroups", available=False, required=False, why="none", remedy="boot")


def find(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    monkeypatch.setattr(probe, "probe", lambda: findings)


def test_all_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find(monkeypatch, GOOD, OPTIONAL)
    assert entry.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "✓  seccomp" in out
    assert "-  swap" in out
    assert "not needed; none" in out
    assert "can run here" in out


def test_what_is_missing_is_told_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find(monkeypatch, GOOD, BAD)
    assert entry.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "✗  overlay" in out
    assert "[no] such" in out  # no markup
    assert "-> load it" in out
    assert "cannot run here with its defaults: overlay" in out


def test_programs_get_json_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find(monkeypatch, BAD)
    assert entry.main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert err == ""
    assert (content["version"], content["ok"]) == (1, False)
    assert content["layout"] in ("v1", "v2", "hybrid", "none")
    assert content["findings"] == [
        {
            "name": "overlay",
            "group": "overlay",
            "available": False,
            "required": True,
            "why": "[no] such",
            "remedy": "load it",
        }
    ]


def test_a_plain_terminal_gets_plain_marks() -> None:
    marks = [doctor.mark_of(finding, plain=True)[0] for finding in (GOOD, BAD, OPTIONAL)]
    assert marks == ["+", "X", "-"]


def test_every_group_has_a_title() -> None:
    assert tuple(doctor.TITLES) == probe.GROUPS
