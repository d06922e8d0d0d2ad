"""Every way in which a cell can fail: it has a name, and costs nothing but that cell.

Each is a notebook of three cells (set x; the bad cell; print x + 1), run by nbclient as a user's
tools run it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.conformance import cases_hostile, cases_limits
from tests.conformance.case import Case
from tests.conformance.notebook import Cell, Kernel, start
from tests.kernel.live import NAME, plain

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.needs("kernel"),
    pytest.mark.timeout(400),
]

ROOT = Path(__file__).parents[2]
BIG_BYTES = 256 << 20
SETTINGS = {"memory": "1G", "disk": "256M", "output": "1M", "processes": 64, "grace": "500ms"}
CLEAN = """
get_ipython().reset(new_session=False)
import glob, os
for path in glob.glob('/tmp/*'): os.path.isdir(path) or os.remove(path)
"""
GROUPS = cases_limits.LIMITS | cases_hostile.HOSTILE
SHARED = [(group, case) for group, cases in GROUPS.items() for case in cases if not case.alone]
ALONE = [(group, case) for group, cases in GROUPS.items() for case in cases if case.alone]


def _named(cases: list[tuple[str, Case]]) -> list[object]:
    return [pytest.param(case, id=f"{group}-{case.name}") for group, case in cases]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let Jupyter find this checkout's kernel; give the folder of its temporary files."""
    base = tmp_path_factory.mktemp("jupyter")
    spec = json.loads((ROOT / "kernelspec" / "kernel.json").read_text(encoding="utf-8"))
    spec["argv"][0] = sys.executable
    spec["env"] = {"PYTHONPATH": str(ROOT), "TMPDIR": str(base / "tmp")}
    folder = base / "path" / "kernels" / NAME
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    (base / "tmp").mkdir()
    places = {"JUPYTER_PATH": str(base / "path"), "JUPYTER_RUNTIME_DIR": str(base / "runtime")}
    with mock.patch.dict(os.environ, places):
        yield base / "tmp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a notebook's folder, with one big file that takes no room on the disk."""
    made = tmp_path_factory.mktemp("notebooks")
    with open(made / "big", "wb") as file:
        file.truncate(BIG_BYTES)
    return made


@pytest.fixture(scope="module")
def keeper() -> Iterator[list[Kernel]]:
    """Keep one kernel for all cases that leave nothing behind."""
    kept: list[Kernel] = []
    yield kept
    for kernel in kept:
        kernel.end()


@pytest.fixture
def kernel(keeper: list[Kernel], folder: Path, temporary: Path) -> Iterator[Kernel]:
    """Give the module's kernel; one that a failed test has spoilt is replaced."""
    if not keeper:
        keeper.append(start(folder, temporary, **SETTINGS))
    yield keeper[0]
    if keeper[0].broken:
        keeper.pop().end()


@pytest.fixture
def own_kernel(folder: Path, temporary: Path) -> Iterator[Kernel]:
    """Give a kernel for one test alone."""
    kernel = start(folder, temporary, **SETTINGS)
    yield kernel
    kernel.end()


def check(case: Case, cell: Cell) -> None:
    """Assert that a cell ended as its case says, in the notebook and in the reply."""
    content, figures = cell.reply["content"], cell.figures
    assert figures.get("outcome") == case.outcome, cell.said()
    assert figures["committed"] is case.is_kept
    assert [error.ename for error in cell.errors] == [case.error_name] * bool(case.error_name), (
        cell.said()
    )
    if cell.errors:
        shown = {key: cell.errors[0][key] for key in ("ename", "evalue", "traceback")}
        assert shown == {key: content[key] for key in shown}
        text = plain("\n".join((content["evalue"], *content["traceback"])))
        assert not [words for words in case.says if words not in text], cell.said()
    assert not [words for words in case.prints if words not in cell.text()], cell.said()
    assert not [words for words in case.warns if words not in cell.text("stderr")], cell.said()


def run(case: Case, kernel: Kernel) -> None:
    """Run the notebook of a case."""
    first, bad, last = kernel.run("x = 41", case.source, "print(x + 1)", within_s=case.within_s)
    assert not first.errors, first.said()
    check(case, bad)
    assert (last.text(), last.errors) == ("42\n", []), last.said()
    assert not [words for words in case.later if words not in last.text("stderr")], last.said()
    assert kernel.manager.provisioner.process.poll() is None


@pytest.mark.parametrize("case", _named(SHARED))
def test_a_bad_cell_has_a_name_and_costs_nothing(case: Case, kernel: Kernel) -> None:
    kernel.broken = True
    run(case, kernel)
    kernel.run(
        "%reset -f", "import os, glob\nfor p in glob.glob('/tmp/*'): os.remove(p)", within_s=60
    )
    kernel.assert_nothing_left()


@pytest.mark.parametrize("case", _named(ALONE))
def test_a_bad_cell_that_leaves_something_behind(case: Case, own_kernel: Kernel) -> None:
    run(case, own_kernel)
    own_kernel.assert_nothing_left()


@pytest.mark.parametrize("late_ms", [-30, -10, 0, 10, 30])
def test_a_cell_that_ends_at_its_time_limit_is_kept_or_not(kernel: Kernel, late_ms: int) -> None:
    """Whoever comes first wins, and nothing in between is possible."""
    wait = f"time.sleep(max(0, begun + {0.5 + late_ms / 1000} - time.monotonic()))"
    code = f"%%sandbox wall_time=500ms\nimport time; begun = time.monotonic(); x = 1\n{wait}"
    first, bad, last = kernel.run("x = 41", code, "print(x + 1)", within_s=30.0)
    assert not first.errors
    outcome = bad.figures["outcome"]
    assert outcome in ("ok", "wall_time"), bad.said()
    assert [error.ename for error in bad.errors] == (
        [] if outcome == "ok" else ["WallTimeLimitExceeded"]
    )
    assert (last.text(), last.errors) == ("2\n" if outcome == "ok" else "42\n", [])
    kernel.assert_nothing_left()
