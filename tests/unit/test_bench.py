"""The bench's arithmetic and its reading of /proc, without a kernel."""

from __future__ import annotations

import io
import itertools
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.bench.__main__ import MEASURE_KEYS, parse
from tests.bench.kernels import parent_of, with_defaults, with_descendants
from tests.bench.measure import BenchError, Exchange, Probe
from tests.bench.report import (
    STOCK,
    SUBJECT,
    Measure,
    Series,
    as_json,
    as_table,
    figure,
    interleave,
    percentile,
    ratio,
    summarize,
    verdict,
)
from tests.bench.run import ALL_MEASURES, recorded

if TYPE_CHECKING:
    from pathlib import Path

LATENCY = Measure("pass", "pass to idle", "ms", bar=1.2)
RATE = Measure("stdout", "stdout", "MB/s", bar=1.0, more_is_better=True)
NUMBERS = st.lists(st.floats(0.001, 1e6), min_size=1)


def series(measure: Measure, stock: list[float], subject: list[float]) -> Series:
    return Series(measure, samples={STOCK: stock, SUBJECT: subject})


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (25, 2.0), (50, 3.0), (95, 4.8), (100, 5.0)]
)
def test_percentile_interpolates(percent: float, expected: float) -> None:
    assert percentile([5, 1, 4, 2, 3], percent) == pytest.approx(expected)


@pytest.mark.parametrize(("samples", "percent"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_percentile_refuses_what_it_cannot_answer(samples: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="samples"):
        percentile(samples, percent)


@given(NUMBERS)
def test_summary_is_ordered(samples: list[float]) -> None:
    summary = summarize(samples)
    assert summary is not None
    assert summary.n == len(samples)
    ranks = [summary.min, summary.p50, summary.p95, summary.p99, summary.max]
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(ranks))


def test_nothing_is_summarized_as_nothing() -> None:
    assert summarize([]) is None
    assert ratio(series(LATENCY, [], [1.0])) is None
    assert verdict(series(LATENCY, [1.0], [])) == "-"


@pytest.mark.parametrize(
    ("measure", "subject", "expected"),
    [
        (LATENCY, 12.0, "pass"),
        (LATENCY, 18.0, "missed by 50.0%"),
        (RATE, 10.0, "pass"),
        (RATE, 25.0, "pass"),
        (RATE, 8.0, "missed by 20.0%"),
        (Measure("x", "x", "ms"), 99.0, "-"),
    ],
)
def test_verdict(measure: Measure, subject: float, expected: str) -> None:
    assert verdict(series(measure, [10.0], [subject])) == expected


def test_a_failed_measure_is_no_pass() -> None:
    broken = series(LATENCY, [10.0], [1.0])
    with recorded(broken):
        raise BenchError("the kernel died")
    assert verdict(broken) == "failed"
    assert broken.notes == ["the kernel died"]


@given(st.integers(0, 300), st.integers(1, 50))
def test_interleaving_gives_both_sides_the_same(count: int, block: int) -> None:
    shares = list(interleave(count, block))
    for side in (STOCK, SUBJECT):
        assert sum(size for name, size in shares if name == side) == count
    assert all(0 < size <= block for _, size in shares)
    assert all(size == shares[i ^ 1][1] for i, (_, size) in enumerate(shares))


def test_interleaving_swaps_who_is_first() -> None:
    assert [side for side, _ in interleave(3, 1)] == [
        STOCK,
        SUBJECT,
        SUBJECT,
        STOCK,
        STOCK,
        SUBJECT,
    ]


def test_interleaving_refuses_empty_blocks() -> None:
    with pytest.raises(ValueError, match="blocks of 0"):
        list(interleave(1, 0))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (607.2, "607"),
        (1234, "1234"),
    ],
)
def test_figures_have_three_digits(value: float, expected: str) -> None:
    assert figure(value) == expected


def test_table_and_json_tell_the_same() -> None:
    missed = series(LATENCY, [10.0, 10.0], [20.0, 20.0])
    text = io.StringIO()
    table = as_table([missed], title="t", sides={STOCK: "python3", SUBJECT: "sandbox-python"})
    Console(file=text, width=140).print(table)
    assert "missed by 66.7%" in text.getvalue()
    assert "<= 1.2" in text.getvalue()

    values = json.loads(json.dumps(as_json([missed], about={"load": [1.0, 2.0]})))
    [entry] = values["measures"]
    assert entry["ratio"] == 2.0
    assert entry["verdict"] == "missed by 66.7%"
    assert entry[SUBJECT]["p95"] == 20.0
    assert entry[STOCK]["samples"] == [10.0, 10.0]


def test_bars_are_those_agreed_on() -> None:
    bars = {measure.key: measure.bar for measure in ALL_MEASURES if measure.bar is not None}
    assert bars == {
        "start": 1.0,
        "pass-think": 1.0,
        "pass-back-to-back": 2.5,
        "first-output": 1.2,
        "stdout": 1.0,
        "pass-1gb-array": 3.0,
        "image-unpack": 1.0,
        "image-cached": 1.0,
        "image-layers": 1.2,
    }
    most = {measure.key: measure.most for measure in ALL_MEASURES if measure.most is not None}
    assert most == {
        "limit-stop": 500,
        "limit-kill": 500,
        "limit-memory": 500,
        "after-kill": 50,
        "flood-info": 100,
    }


@pytest.mark.parametrize(
    ("subject", "expected"),
    [([40.0] * 20, "pass"), ([40.0] * 10 + [60.0] * 10, "missed by 20.0%"), ([], "-")],
)
def test_a_bar_of_the_subject_alone_is_for_nearly_all_samples(
    subject: list[float], expected: str
) -> None:
    bounded = series(Measure("x", "x", "ms", most=50), [], subject)
    assert verdict(bounded) == expected
    text = io.StringIO()
    table = as_table([bounded], title="t", sides={STOCK: "python3", SUBJECT: "sandbox-python"})
    Console(file=text, width=140).print(table)
    assert "p95 <= 50.0" in text.getvalue()


def test_an_exchange_ends_with_both_reply_and_idle() -> None:
    exchange = Exchange("id", sent_s=0.0, reply_s=0.2)
    assert not exchange.finished
    exchange.idle_s = 0.1
    assert exchange.finished
    assert exchange.total_s == 0.2


def test_an_unexpected_status_says_why() -> None:
    reply = {"status": "error", "ename": "MemoryLimitExceeded", "evalue": "too much"}
    with pytest.raises(BenchError, match="MemoryLimitExceeded too much"):
        Probe.expect(Exchange("id", sent_s=0.0, reply=reply), "ok")


def test_parent_is_found_behind_any_name() -> None:
    assert parent_of("42 (a) b (c) S 7 42 42 0 -1") == 7


def test_a_given_argument_replaces_its_default() -> None:
    defaults = ("--C.memory=4G", "--C.disk=1G")
    assert with_defaults(("--C.memory=2G",), defaults) == ("--C.disk=1G", "--C.memory=2G")


def test_descendants_of_a_session() -> None:
    parents = {1: 0, 10: 1, 11: 10, 12: 11, 20: 1, 30: 2}
    assert with_descendants({10, 30}, parents) == {10, 11, 12, 30}


def test_quick_is_small_and_the_default_is_not(tmp_path: Path) -> None:
    assert parse([]).executions >= 200
    assert parse(["--quick", "--json", str(tmp_path / "b.json")]).executions < 100
    assert parse(["--only", ",".join(MEASURE_KEYS)]).only == set(MEASURE_KEYS)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--executions", "0"], "'0' is not a whole number"),
        (["--starts", "few"], "'few' is not a whole number"),
        (["--only", "pass-think,nonsense"], "no measure 'nonsense'"),
    ],
)
def test_bad_options_name_the_value(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert words in capsys.readouterr().err
