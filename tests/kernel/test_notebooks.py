"""Whole notebooks by ordinary tools: nbclient, nbconvert, and `sandbox-kernel run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import v4

from tests.integration import leaks
from tests.kernel.live import NAME

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.needs("kernel")]

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "notebooks" / "tour.ipynb"
HOG = "%%sandbox memory=96M\nx = 0\nhog = []\nwhile True: hog.append(bytearray(1 << 24))"


def notebook(*sources: str) -> nbformat.NotebookNode:
    cells = [v4.new_code_cell(source) for source in sources]
    return v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": NAME, "display_name": ""}})


def execute(nb: nbformat.NotebookNode, folder: Path, **options: object) -> nbformat.NotebookNode:
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(nb, kernel_name=NAME, resources=resources, timeout=60, **options)
    client.execute()
    nbformat.validate(nb)
    return nb


def errors(nb: nbformat.NotebookNode) -> list[list[str]]:
    """Give the names of the errors of each cell."""
    cells = [cell for cell in nb.cells if cell.cell_type == "code"]
    return [[out.ename for out in c.outputs if out.output_type == "error"] for c in cells]


@pytest.mark.parametrize(
    ("bad", "ename"),
    [
        (HOG, "MemoryLimitExceeded"),
        ("x = 0; import os; os._exit(1)", "CellExited"),
        ("x = 0; import ctypes; ctypes.string_at(0)", "CellCrashed"),
        ("x = 0; import os; os.kill(os.getpid(), 9)", "CellCrashed"),
        ("%%sandbox wall_time=1s\nx = 0\nwhile True: pass", "WallTimeLimitExceeded"),
    ],
)
def test_a_bad_cell_in_the_middle(tmp_path: Path, bad: str, ename: str) -> None:
    nb = execute(notebook("x = 41", bad, "print(x + 1)"), tmp_path, allow_errors=True)
    assert errors(nb) == [[], [ename], []]
    assert nb.cells[2].outputs[0].text == "42\n"
    assert leaks.session_cgroups(os.getpid()) == []


def test_a_bad_cell_ends_a_strict_run_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="MemoryLimitExceeded") as caught:
        execute(notebook("x = 41", HOG, "x"), tmp_path)
    assert caught.value.ename == "MemoryLimitExceeded"


def test_the_clients_own_time_limit(tmp_path: Path) -> None:
    """A cell that ignores interrupts hangs other kernels' clients for ever."""
    deaf = "x = 0; import signal; signal.signal(2, signal.SIG_IGN)\nwhile True: pass"
    nb = notebook("x = 41", deaf, "print(x + 1)")
    client = NotebookClient(
        nb, kernel_name=NAME, timeout=3, interrupt_on_timeout=True, allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )  # fmt: skip
    client.execute()
    assert errors(nb) == [[], ["KeyboardInterrupt"], []]
    assert nb.cells[2].outputs[0].text == "42\n"


def test_widgets_are_kept_in_the_notebook(tmp_path: Path) -> None:
    nb = execute(notebook("import ipywidgets; ipywidgets.IntSlider(value=3)"), tmp_path)
    states = nb.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    assert any(state["state"].get("value") == 3 for state in states)


def test_an_output_widget(tmp_path: Path) -> None:
    code = "import ipywidgets; out = ipywidgets.Output()\nwith out: print('inside')\nout"
    nb = execute(notebook(code), tmp_path)
    states = nb.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    assert any("inside" in json.dumps(s["state"].get("outputs", "")) for s in states)


def command(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def check_tour(nb: nbformat.NotebookNode) -> None:
    cells = [cell for cell in nb.cells if cell.cell_type == "code"]
    expected = ["raises-exception" in cell.metadata.get("tags", ()) for cell in cells]
    assert [bool(names) for names in errors(nb)] == expected
    assert all(cell.execution_count for cell in cells)


def test_nbconvert_executes_the_tour(tmp_path: Path) -> None:
    done = command(
        "nbconvert", "--to", "notebook", "--execute", TOUR, "--output-dir", tmp_path, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    check_tour(nbformat.read(tmp_path / "tour.ipynb", as_version=4))


def test_nbconvert_makes_a_page(tmp_path: Path) -> None:
    nbformat.write(notebook("print('on the page')"), tmp_path / "a.ipynb")
    done = command("nbconvert", "--to", "html", "--execute", "a.ipynb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on the page" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_sandbox_kernel_run_executes_the_tour(tmp_path: Path) -> None:
    out = tmp_path / "out.ipynb"
    done = command("sandbox_kernel", "run", TOUR, "-o", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_tour(nbformat.read(out, as_version=4))
    assert os.listdir(tmp_path) == ["out.ipynb"]
