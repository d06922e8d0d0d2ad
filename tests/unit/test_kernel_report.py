from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.config import parse_cell
from sandbox_kernel.errors import HostError
from sandbox_kernel.kernel import answers, report
from sandbox_kernel.model import CellResult, Outcome, Usage
from sandbox_kernel.session import advice
from sandbox_kernel.units import parse_duration, parse_size
from tests.fakes.session import CEILING

LOW = replace(
    CEILING,
    memory_bytes=256 << 20,
    wall_time_s=5.0,
    cpu_time_s=3.0,
    processes=8,
    disk_bytes=256 << 20,
)


def killed(outcome: Outcome, **fields: object) -> CellResult:
    result = CellResult(outcome, False, Usage(wall_s=5.1, cpu_s=3.2), LOW, "id")
    return replace(result, **fields)  # type: ignore[arg-type]


def error(result: CellResult) -> report.CellError:
    said = report.error_of(result, ceiling=CEILING, grace_s=2.0)
    assert said is not None
    return said


@pytest.mark.parametrize(
    "outcome", [Outcome.OK, Outcome.ERROR, Outcome.INTERRUPTED], ids=lambda o: o.value
)
def test_committed_cells_speak_for_themselves(outcome: Outcome) -> None:
    result = replace(killed(outcome), committed=True)
    assert report.error_of(result, ceiling=CEILING, grace_s=2.0) is None


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (Outcome.MEMORY, "%%sandbox memory=512M"),
        (Outcome.WALL_TIME, "%%sandbox wall_time=10s"),
        (Outcome.CPU_TIME, "%%sandbox cpu_time=6s"),
        (Outcome.PROCESSES, "%%sandbox processes=16"),
        (Outcome.DISK, "%%sandbox disk=512M"),
    ],
)
def test_below_the_ceiling_the_advice_is_a_line_that_works(outcome: Outcome, line: str) -> None:
    said = error(killed(outcome))
    assert f"`{line}`" in said.evalue
    parse_cell(line, CEILING, CEILING)
    assert said.evalue.endswith("the session is as it was before this cell")


def test_advice_never_exceeds_the_ceiling() -> None:
    limits = replace(LOW, memory_bytes=CEILING.memory_bytes - 1024)
    assert "memory=1G`" in error(killed(Outcome.MEMORY, limits=limits)).evalue


def test_at_the_ceiling_somebody_else_must_help() -> None:
    said = error(killed(Outcome.MEMORY, limits=CEILING))
    assert "%%sandbox" not in said.evalue
    assert "teacher" in said.evalue


def test_interrupt_that_was_ignored() -> None:
    said = error(killed(Outcome.INTERRUPTED))
    assert said.ename == "KeyboardInterrupt"
    assert "2 s" in said.evalue


def test_ends_without_a_status_are_worded_too() -> None:
    assert "stopped answering" in error(killed(Outcome.CRASHED)).evalue
    assert "signal 99" in error(killed(Outcome.CRASHED, signal=99)).evalue
    assert "unknown exit code" in error(killed(Outcome.EXITED)).evalue


def test_traceback_ends_as_ipythons_does() -> None:
    said = error(killed(Outcome.WALL_TIME, traceback=("where", "it was")))
    assert said.traceback[:2] == ("where", "it was")
    assert said.traceback[2] == f"\x1b[31mWallTimeLimitExceeded\x1b[39m: {said.evalue}"


def test_sandbox_errors_tell_remedy_and_remark() -> None:
    said = report.error_from(HostError("no cgroup", hint="run doctor"), remark="the rest")
    assert (said.ename, said.evalue) == ("HostError", "no cgroup (run doctor); the rest")


@given(st.integers(min_value=0, max_value=1 << 50))
def test_size_option_is_exact(size_bytes: int) -> None:
    assert parse_size(advice.size_option(size_bytes)) == size_bytes


@given(st.integers(min_value=1, max_value=10**6))
def test_seconds_option_is_readable(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(advice.seconds_option(seconds)) == pytest.approx(seconds, rel=1e-4)


def test_status_table_without_a_session() -> None:
    rows = report.status_rows(CEILING, None)
    assert [row[0] for row in rows][:2] == ["memory", "cpus"]
    assert {row[2] for row in rows} == {"-"}
    assert "&lt;x&gt;" in report.status_bundle(CEILING, None, image="<x>")["text/html"]


def test_reply_of_a_killed_cell_ignores_what_the_guest_said() -> None:
    lie = {"status": "ok", "payload": [{"source": "page"}], "user_expressions": {"a": 1}}
    result = killed(Outcome.EXITED, reply=lie)
    reply = answers.execute_reply(result, error(result))
    assert reply["status"] == "error"
    assert reply["payload"] == []
    assert reply["user_expressions"] == {}


@pytest.mark.parametrize("said", [{}, {"traceback": 3, "ename": 4, "payload": 5}])
def test_nonsense_of_a_guest_becomes_a_valid_reply(said: dict[str, object]) -> None:
    result = replace(killed(Outcome.ERROR), committed=True, reply=said)
    reply = answers.execute_reply(result, None)
    assert reply["status"] == "error"
    assert isinstance(reply["ename"], str)
    assert reply["traceback"] == []
    assert answers.complete_reply({"matches": [1]}, 3)["matches"] == []
    assert answers.inspect_reply({"found": True, "data": 1})["found"] is False


def test_meter_gives_per_cent_since_the_last_question() -> None:
    times = iter([10.0, 12.0, 12.0, 13.0])
    meter = answers.Meter(clock=lambda: next(times))
    assert meter.percent(1.0) == 50.0
    assert meter.percent(2.0) == 0.0  # no time has passed
    assert meter.percent(1.0) == 0.0  # a new session counts from zero


def test_usage_shows_the_limit_as_the_hosts_memory() -> None:
    reply = answers.usage_reply(Usage(peak_memory_bytes=2 << 30), CEILING, 300.0)
    assert reply["host_virtual_memory"]["total"] == 1 << 30
    assert reply["host_virtual_memory"]["percent"] == 100.0
    assert reply["host_virtual_memory"]["free"] == 0
    assert reply["host_cpu_percent"] == 100.0
