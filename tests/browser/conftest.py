"""One server and one browser for all pages; a page and a notebook for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser import lab

TIMEOUT_MS = 1000 * lab.TIMEOUT_S


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.Server]:
    """Give a JupyterLab."""
    with lab.serve(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """Give the distribution's Chromium."""
    if lab.CHROMIUM is None:
        required = set(request.config.getoption("--require").split(","))
        (pytest.fail if required & {"all", "chromium"} else pytest.skip)("there is no chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=lab.CHROMIUM, args=lab.FLAGS)


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """Give an empty page that shares nothing with others; a picture is kept at the end."""
    expect.set_options(timeout=TIMEOUT_MS)
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    context.set_default_timeout(TIMEOUT_MS)
    shown = context.new_page()
    yield shown
    lab.SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    shown.screenshot(path=lab.SCREENSHOTS / f"{named(request)}.png")
    context.close()


def named(request: pytest.FixtureRequest) -> str:
    """Give a name for the files of a test."""
    return request.node.name.removeprefix("test_")


@pytest.fixture
def notebook(
    server: lab.Server, page: Page, request: pytest.FixtureRequest
) -> Callable[..., lab.Notebook]:
    """Give a function that opens a new notebook with these cells."""

    def start(*sources: str) -> lab.Notebook:
        lab.write(server, named(request), sources)
        return lab.open_notebook(page, server, named(request))

    return start
