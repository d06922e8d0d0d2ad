"""How a cell ended is told from counters and acts of this side; exit codes and signals name no limit."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from sandbox_kernel.errors import ProtocolError
from sandbox_kernel.linux.cgroup import CgroupUsage
from sandbox_kernel.model import Json, Outcome
from sandbox_kernel.session.hints import Hints
from sandbox_kernel.session.said import Done, size_of
from sandbox_kernel.session.scratch import Scratch
from sandbox_kernel.session.verdict import Seen, judge
from tests.fakes.session import CEILING

CALM = Seen(oom_kills=0)
EXITED_137 = (os.CLD_EXITED, 137)
KILLED = (os.CLD_KILLED, signal.SIGKILL)
ABORTED = (os.CLD_DUMPED, signal.SIGABRT)
BROKEN = ProtocolError("a cell is done without a reply")
LIMITS = replace(CEILING, processes=8, disk_bytes=32 << 20, open_files=64)


def done(**reply: Any) -> Done:
    return Done({"status": "ok", **reply}, (), (), (), alone=True)


FAILED = done(status="error", ename="ValueError", evalue="", traceback=[])
STOPPED = done(status="error", ename="KeyboardInterrupt", evalue="", traceback=[])


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        (replace(CALM, status=EXITED_137), Outcome.EXITED),
        (replace(CALM, status=KILLED), Outcome.CRASHED),
        (CALM, Outcome.CRASHED),
        (replace(CALM, oom_kills=1, status=(os.CLD_EXITED, 0)), Outcome.MEMORY),
        (replace(CALM, oom_kills=1, done=done()), Outcome.MEMORY),
        (replace(CALM, oom_kills=1, stopping=Outcome.WALL_TIME, status=KILLED), Outcome.MEMORY),
        (replace(CALM, stopping=Outcome.WALL_TIME, done=done()), Outcome.WALL_TIME),
        (replace(CALM, stopping=Outcome.CPU_TIME, refusal=Outcome.PROCESSES), Outcome.CPU_TIME),
        (replace(CALM, failure=BROKEN, done=done()), Outcome.CRASHED),
        (replace(CALM, refusal=Outcome.PROCESSES, status=ABORTED), Outcome.PROCESSES),
        (replace(CALM, refusal=Outcome.DISK, status=(os.CLD_EXITED, 3)), Outcome.DISK),
        (replace(CALM, stopping=Outcome.INTERRUPTED, status=KILLED), Outcome.INTERRUPTED),
    ],
)
def test_what_rolls_back(seen: Seen, outcome: Outcome) -> None:
    verdict = judge(seen)
    assert (verdict.outcome, verdict.committed) == (outcome, False)
    assert verdict.reply == {}


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        (replace(CALM, done=done()), Outcome.OK),
        (replace(CALM, done=FAILED), Outcome.ERROR),
        (replace(CALM, done=STOPPED), Outcome.ERROR),
        (replace(CALM, done=STOPPED, stopping=Outcome.INTERRUPTED), Outcome.INTERRUPTED),
        (replace(CALM, done=FAILED, stopping=Outcome.INTERRUPTED), Outcome.ERROR),
    ],
)
def test_what_commits(seen: Seen, outcome: Outcome) -> None:
    verdict = judge(seen)
    assert (verdict.outcome, verdict.committed) == (outcome, True)


def test_a_death_keeps_its_status() -> None:
    assert judge(replace(CALM, status=EXITED_137)).exit_code == 137
    assert judge(replace(CALM, status=ABORTED, refusal=Outcome.PROCESSES)).signal == signal.SIGABRT


# ---- refusals


def counted(denied: int = 0, peak: int | None = 8) -> CgroupUsage:
    return CgroupUsage(0.0, 0, 0, peak, 0, 0, denied)


def hints(*looks: bool) -> Hints:
    """Give the hints of a cell whose file system is full or not, look for look."""
    seen = iter(looks)
    return Hints(LIMITS, CEILING, lambda: Scratch(31 << 20, is_full=next(seen)))


def test_a_refused_fork_is_the_cause_before_a_full_disk() -> None:
    assert hints(False, True).cause_of_death(counted(3), ABORTED) is Outcome.PROCESSES


@pytest.mark.parametrize(
    ("was_full", "is_full", "status", "cause"),
    [
        (False, True, EXITED_137, Outcome.DISK),
        (False, True, None, Outcome.DISK),
        (False, False, ABORTED, None),
        (True, True, ABORTED, None),
        (True, True, (os.CLD_DUMPED, signal.SIGBUS), Outcome.DISK),
        (True, False, (os.CLD_DUMPED, signal.SIGBUS), None),
        (True, True, (os.CLD_EXITED, signal.SIGBUS), None),
    ],
)
def test_a_full_disk_is_the_cause_where_the_cell_filled_it(
    was_full: bool, is_full: bool, status: tuple[int, int] | None, cause: Outcome | None
) -> None:
    assert hints(was_full, is_full, is_full).cause_of_death(counted(), status) is cause


def error(evalue: str) -> Json:
    return {"ename": "OSError", "evalue": evalue, "traceback": ["where"]}


@pytest.mark.parametrize(
    ("evalue", "denied", "words"),
    [
        ("[Errno 11] no", 3, ("`processes`", "8 processes", "refused 3", "%%sandbox processes=16")),
        ("can't start new thread", 1, ("`processes`", "refused 1")),
        ("[Errno 28] no", 0, ("`disk`", "32 MiB", "31 MiB", "%%sandbox disk=64M")),
        ("[Errno 24] no", 0, ("`open_files`", "64 open", "%%sandbox open_files=128")),
    ],
)
def test_an_error_says_what_a_limit_refused(
    evalue: str, denied: int, words: tuple[str, ...]
) -> None:
    content = error(evalue)
    hints(False, False).add_to(content, counted(denied))
    before, hint = content["traceback"]
    assert before == "where"
    assert not [word for word in words if word not in hint], hint


def test_a_limit_above_is_not_taken_for_the_cells_own() -> None:
    above = counted(denied=2, peak=5)
    assert hints(False, False).cause_of_death(above, ABORTED) is None
    content = error("[Errno 11] no")
    hints(False, False).add_to(content, above)
    assert "a limit above is reached" in content["traceback"][1]


def test_a_refusal_counts_where_linux_keeps_no_peak() -> None:
    old = counted(denied=2, peak=None)
    assert hints(False).cause_of_death(old, ABORTED) is Outcome.PROCESSES


def test_an_error_of_another_kind_has_no_hint() -> None:
    for was_full in (False, True):
        content = error("[Errno 2] no such file")
        hints(was_full, was_full).add_to(content, counted())
        assert content["traceback"] == ["where"]


# ---- sizes


@pytest.mark.parametrize(
    "content", [{"data": {"text/plain": "x" * 5000}, "metadata": {}}, {"a": ["y" * 1000, 7, None]}]
)
def test_a_size_is_about_that_of_the_text(content: Json) -> None:
    assert size_of(content) == pytest.approx(len(str(content)), abs=50)


def test_a_deep_content_has_a_size() -> None:
    deep: Any = "end"
    for _ in range(100_000):
        deep = [deep]
    assert size_of({"a": deep}) > 100_000
