"""`pytest tests/golden --update-golden` keeps what it finds instead of comparing."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="keep the documents found here")


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> bool:
    # The default is for a run of more than this folder, where the option comes too late.
    return bool(request.config.getoption("--update-golden", default=False))
