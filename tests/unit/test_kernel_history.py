from __future__ import annotations

import pytest

from sandbox_kernel.kernel.history import History, Row, View

PLAIN = View()


@pytest.fixture
def history() -> History:
    store = History()
    for number, source in enumerate(["a = 1", "b = 2\n", "a = 1", "%time c", "d[1]"], start=1):
        store.append(number, source)
    return store


def numbers(rows: list[Row]) -> list[int]:
    return [row[1] for row in rows]


def test_tail(history: History) -> None:
    assert history.tail(2, PLAIN) == [(1, 4, "%time c"), (1, 5, "d[1]")]
    assert numbers(history.tail(None, PLAIN)) == [1, 2, 3, 4, 5]
    assert history.tail(0, PLAIN) == []
    assert len(history.tail(99, PLAIN)) == 5


def test_output_and_transformed_source(history: History) -> None:
    line = history.append(6, "!ls")
    line.output = "x"
    assert history.tail(1, View(output=True)) == [(1, 6, ("!ls", "x"))]
    assert history.tail(1, View(raw=False)) == [(1, 6, "get_ipython().system('ls')\n")]
    assert history.tail(2, View(output=True))[0][2] == ("d[1]", None)


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (1, 3, [1, 2]),
        (2, None, [2, 3, 4, 5]),
        (None, None, [1, 2, 3, 4, 5]),
        (-2, None, [4, 5]),
        (1, -1, [1, 2, 3, 4]),
        (9, 12, []),
    ],
)
def test_range(history: History, start: int | None, stop: int | None, expected: list[int]) -> None:
    assert numbers(history.range(0, start, stop, PLAIN)) == expected
    assert numbers(history.range(1, start, stop, PLAIN)) == expected


def test_other_sessions_are_empty(history: History) -> None:
    assert history.range(2, 1, 3, PLAIN) == []
    assert history.range(-1, 1, 3, PLAIN) == []
    assert History().range(0, 1, None, PLAIN) == []


@pytest.mark.parametrize(
    ("pattern", "count", "unique", "expected"),
    [
        ("*=*", None, False, [1, 2, 3]),
        ("*=*", 2, False, [2, 3]),
        ("*=*", None, True, [2, 3]),
        ("a", None, False, []),
        ("A*", None, False, []),
        ("? = [12]", None, False, [1, 2, 3]),
        ("[^a] = *", None, False, [2]),
        ("*c", 1, True, [4]),
    ],
)
def test_search(
    history: History, pattern: str, count: int | None, unique: bool, expected: list[int]
) -> None:
    assert numbers(history.search(pattern, count, PLAIN, unique=unique)) == expected


def test_source_that_is_no_python_is_given_as_it_is() -> None:
    store = History()
    store.append(1, "a b 'c")
    assert store.tail(1, View(raw=False))[0][2].strip() == "a b 'c"  # type: ignore[union-attr]
