"""The soak's arithmetic, and the order of its cells."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.soak.__main__ import parse
from tests.soak.cells import HOSTILE, HOSTILE_EVERY, ORDINARY, WEIGHTS, deck
from tests.soak.findings import (
    MAX_BYTES_PER_CELL,
    Problems,
    as_json,
    as_table,
    counted,
    memory,
    none_left,
    pace,
    same,
    slope,
)


def test_one_cell_in_ten_is_hostile_and_each_kind_has_its_turn() -> None:
    assert len(WEIGHTS) == len(ORDINARY)
    kinds = list(itertools.islice(deck(3), HOSTILE_EVERY * len(HOSTILE)))
    counts = Counter(kind.name for kind in kinds if kind.hostile)
    assert counts == {kind.name: 1 for kind in HOSTILE}
    for start in range(0, len(kinds), HOSTILE_EVERY):
        assert sum(kind.hostile for kind in kinds[start : start + HOSTILE_EVERY]) == 1


def test_a_seed_decides_the_order() -> None:
    first, again, other = (list(itertools.islice(deck(seed), 100)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@given(st.floats(-1e4, 1e4), st.floats(0, 1e9))
def test_slope_of_a_line(rise: float, start: float) -> None:
    points = [(float(x), start + rise * x) for x in range(0, 1000, 50)]
    assert slope(points) == pytest.approx(rise, rel=1e-3, abs=1e-3)


def test_slope_does_not_follow_a_single_step() -> None:
    points = [(float(x), 1e6 if x == 7 else 5.0) for x in range(20)]
    assert slope(points) == 0
    assert slope([(1.0, 1.0)]) is None


def test_memory_that_grows_with_the_cells_fails() -> None:
    flat = [(float(x), 3e7) for x in range(0, 10_000, 100)]
    grows = [(x, y + 2 * MAX_BYTES_PER_CELL * x) for x, y in flat]
    assert memory(flat).good is True
    assert memory(grows).good is False
    assert "+2048 B per cell" in memory(grows).what


@pytest.mark.parametrize(
    ("late_s", "counts", "good"),
    [(0.011, True, True), (0.013, True, False), (0.013, False, None)],
)
def test_pace(late_s: float, counts: bool, good: bool | None) -> None:
    row = pace("tick", [0.01] * 5, [late_s] * 5, counts=counts)
    assert row.good is good
    assert f"ratio {late_s / 0.01:.2f}" in row.what


def test_table_and_json_tell_the_same() -> None:
    problems = Problems()
    for number in range(5):
        problems.add("segfault: ended as ok", f"cell {number}")
    rows = [
        same("processes", 5, 5),
        same("descriptors", 5, 6),
        none_left("cgroups", 2, ["/a"]),
        counted("cells", 10, problems),
        pace("tick", [], [], counts=True),
    ]
    assert [row.verdict for row in rows] == ["pass", "FAILED", "FAILED", "FAILED", "-"]
    text = io.StringIO()
    Console(file=text, width=120).print(as_table(rows, "t"))
    assert "2+1" in text.getvalue()
    assert "5 wrong" in text.getvalue()
    values = as_json(rows, problems, {"seed": 1})
    assert values["rows"][1]["verdict"] == "FAILED"
    assert values["problems"] == {"segfault: ended as ok": 5}
    assert values["examples"] == {"segfault: ended as ok": ["cell 0", "cell 1", "cell 2"]}


def test_the_default_is_long(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse([])
    assert (options.cells, options.sessions, options.kills) == (10_000, 50, 1000)
    with pytest.raises(SystemExit):
        parse(["--cells", "many"])
    assert "'many' is not a whole number" in capsys.readouterr().err
