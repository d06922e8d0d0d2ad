"""The notebook about images, as its readers run it: on the plain kernel, outside of the sandbox."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.needs("kernel")]

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "images.ipynb"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run the notebook; give what each of its cells wrote, by the cell's id."""
    folder = tmp_path_factory.mktemp("notebook")
    nb = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("TMPDIR", str(folder))
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(nb, kernel_name="python3", timeout=100, resources=resources).execute()
    assert os.listdir(folder) == []
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    return {
        c.id: "".join(o.get("text", "") for o in c.outputs if o.output_type == "stream")
        for c in code
    }


def rebuilt(text: str) -> list[str]:
    """Give the kinds of the steps that a build made anew, by what it said."""
    lines = text.splitlines()
    done = {line.split("]")[0] for line in lines if "] done" in line}
    titles = [line for line in lines if line.startswith("[") and line.split("]")[0] in done]
    return [line.split()[1] for line in titles if "] done" not in line]


def test_the_first_build_makes_all_four_steps(said: dict[str, str]) -> None:
    assert rebuilt(said["first"]) == ["RUN", "COPY", "RUN", "RUN", "WORKDIR"]
    assert "Built " in said["first"]
    for step in ("seq 1 1000", "COPY stats.py", "python3 /srv/stats.py", "checked by ada"):
        assert step in said["first-history"]


def test_nothing_changed_is_nothing_built(said: dict[str, str]) -> None:
    assert rebuilt(said["again"]) == []
    assert said["again"].count("CACHED") == 6


def test_the_last_line_is_built_alone(said: dict[str, str]) -> None:
    assert rebuilt(said["last"])[:1] == ["RUN"]
    assert said["last"].count("CACHED") == 4
    assert "the instruction has changed, it was: RUN echo 'checked by ada'" in said["last"]


def test_the_first_line_has_all_built(said: dict[str, str]) -> None:
    assert rebuilt(said["first-line"])[:4] == ["RUN", "COPY", "RUN", "RUN"]
    assert "it comes after a change: RUN mkdir -p /srv && seq 1 2000" in said["first-line"]


def test_the_table_shows_it(said: dict[str, str]) -> None:
    rows = {line[:20].strip(): line[20:].split() for line in said["table"].splitlines()}
    assert rows[""] == ["A", "B", "C", "D"]
    assert [rows[name].count("new") for name in rows if name] == [4, 0, 1, 3]


def test_a_failure_goes_on_where_it_stopped(said: dict[str, str]) -> None:
    assert "No such file" in said["failure"]
    assert "exit code 1" in said["failure"]
    assert said["mended"].count("CACHED") == 4
    assert "count 1000 mean 500.5" in said["mended"]


def test_it_cleans_up(said: dict[str, str]) -> None:
    assert "Freed" in said["clean"]
