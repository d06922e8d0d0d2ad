"""Real kernels, found by Jupyter through a kernelspec of this checkout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.kernel import live
from tests.kernel.live import Live

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give Jupyter folders of its own, with the kernel in them, and nothing of the user's."""
    base = tmp_path_factory.mktemp("jupyter")
    spec = json.loads((ROOT / "kernelspec" / "kernel.json").read_text(encoding="utf-8"))
    spec["argv"][0] = sys.executable
    spec["env"] = {"PYTHONPATH": str(ROOT), "TMPDIR": str(base / "tmp")}
    folder = base / "path" / "kernels" / live.NAME
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    (base / "tmp").mkdir()
    places = {
        "JUPYTER_PATH": "path",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    with mock.patch.dict(os.environ, {name: str(base / place) for name, place in places.items()}):
        yield base


@pytest.fixture(autouse=True)
def no_files_left(jupyter: Path) -> Iterator[None]:
    """Assert after each test that no kernel left a temporary file."""
    yield
    assert os.listdir(jupyter / "tmp") == []


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Live]]:
    """Keep one kernel for a module, and see that it leaves nothing."""
    kept: list[Live] = []
    yield kept
    for kernel in kept:
        traces = kernel.traces()
        kernel.end()
        traces.assert_dead()


@pytest.fixture
def kernel(keeper: list[Live], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Give the module's kernel; one that a failed test left busy is replaced."""
    if not keeper:
        keeper.append(live.start(tmp_path_factory.mktemp("notebooks"), *live.settings(grace="1s")))
    yield keeper[0]
    assert keeper[0].manager.is_alive()
    if not keeper[0].is_free():
        keeper.pop().end()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """Give a function that starts a kernel for this test alone; nothing of any may be left."""
    started: list[Live] = []

    def begin(*arguments: str, cwd: Path = tmp_path, **values: object) -> Live:
        kernel = live.start(cwd, *arguments, *live.settings(**values))
        started.append(kernel)
        return kernel

    yield begin
    for kernel in started:
        if kernel.manager.has_kernel and kernel.manager.is_alive():
            traces = kernel.traces()
            kernel.end()
            traces.assert_dead()
        kernel.end()
