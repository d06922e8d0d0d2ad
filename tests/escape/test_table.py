"""The document names every probe, every class has one, and probes of other files are there."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.escape.elsewhere import ELSEWHERE, Elsewhere
from tests.escape.table import CLASSES, committed, probes, table, write

TESTS = Path(__file__).resolve().parents[1]


def test_the_document_has_the_table(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-table", default=False):
        write()
    assert committed() == table(), "pytest tests/escape/test_table.py --write-table"


def test_every_class_has_a_probe() -> None:
    assert sorted({probe.number for probe in probes()} - {0}) == list(range(1, CLASSES + 1))


def test_every_probe_has_a_name_of_its_own() -> None:
    names = [probe.id for probe in probes()]
    assert len(names) == len(set(names))


@functools.cache
def _tests_of(path: str) -> frozenset[str]:
    tree = ast.parse((TESTS / path).read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


@pytest.mark.parametrize("row", ELSEWHERE, ids=lambda row: row.probe.id)
def test_a_probe_of_another_file_is_there(row: Elsewhere) -> None:
    for test in row.tests:
        path, _, name = test.partition("::")
        assert name in _tests_of(path), test
