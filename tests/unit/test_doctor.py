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
OPTIONAL = Finding(
    "swap", "cgroups", False, False, why="none", remedy="boot", without="a cell may swap"
)
RANGE = Finding("id_range", "ids", available=True, required=True, why="", remedy="")
SINGLE = (
    Finding("subordinate_ids", "ids", False, False, why="no range", remedy="add", without="one id"),
    Finding("user_namespace", "namespaces", available=True, required=True, why="", remedy=""),
)


def find(
    monkeypatch: pytest.MonkeyPatch, *findings: Finding, ids: tuple[Finding, ...] = (RANGE,)
) -> None:
    monkeypatch.setattr(probe, "probe", lambda: (*ids, *findings))
    monkeypatch.setattr(probe, "user", lambda: "root" if ids == (RANGE,) else "ordinary")


def test_all_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find(monkeypatch, GOOD, OPTIONAL)
    assert entry.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "✓  seccomp" in out
    assert "-  swap" in out
    assert "not needed; none" in out
    assert "without it a cell may swap" in out
    assert "(root: a range of its own for each session)" in out
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
    find(monkeypatch, BAD, ids=SINGLE)
    assert entry.main(["doctor", "--json"]) == 1
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert err == ""
    assert (content["version"], content["ok"]) == (1, False)
    assert content["layout"] in ("v1", "v2", "hybrid", "none")
    assert content["user"] == "ordinary"
    assert (content["ids"], content["ids_why"]) == ("single", "no range")
    assert content["findings"][2:] == [
        {
            "name": "overlay",
            "group": "overlay",
            "available": False,
            "required": True,
            "why": "[no] such",
            "remedy": "load it",
            "without": "",
        }
    ]


def test_a_plain_terminal_gets_plain_marks() -> None:
    marks = [doctor.mark_of(finding, plain=True)[0] for finding in (GOOD, BAD, OPTIONAL)]
    assert marks == ["+", "X", "-"]


def test_every_group_has_a_title() -> None:
    assert tuple(doctor.TITLES) == probe.GROUPS


@pytest.mark.parametrize("user", ["root", "ordinary"])
@pytest.mark.parametrize("kind", ["high", "subordinate", "single", "none"])
def test_every_kind_of_host_has_words(
    user: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.show([GOOD], doctor.Host("v2", user, probe.Ids(kind, "")))
    out = capsys.readouterr().out
    assert doctor.USERS[user] in out
    assert doctor.IDS[kind] in out
