"""What `run` reads and writes: cells of Python files, bad notebooks, outputs from messages."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import v4

from sandbox_kernel.cli import run_file, run_screen
from sandbox_kernel.cli.run_kernel import without_current_folder
from sandbox_kernel.errors import ConfigError, SandboxError

PERCENT = """\
#!/usr/bin/env python
before = 1
# %% a title
x = 1

y = 2
# %% [markdown] about
# # Title
#
# text
#%%
# %%sandbox memory=64M
z = "# %% no marker"
# %% tags=["raises-exception"]
1/0
# %%

# %%% [raw]
# raw
"""


def test_a_python_file_is_cut_at_its_markers() -> None:
    notebook = run_file.parse_python(PERCENT)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        ("code", "#!/usr/bin/env python\nbefore = 1"),
        ("code", "x = 1\n\ny = 2"),
        ("markdown", "# Title\n\ntext"),
        ("code", '%%sandbox memory=64M\nz = "# %% no marker"'),
        ("code", "1/0"),
        ("raw", "raw"),
    ]
    assert run_file.tags_of(notebook.cells[4]) == [run_file.MAY_FAIL]
    nbformat.validate(notebook)


def test_a_python_file_without_markers_is_one_cell(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes("# -*- coding: latin-1 -*-\nx = 'ü'\n".encode("latin-1"))
    cells = run_file.read(path).cells
    assert [cell.source for cell in cells] == ["# -*- coding: latin-1 -*-\nx = 'ü'"]


def test_an_empty_file_has_no_cells() -> None:
    assert run_file.parse_python("\n \n").cells == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "neither"),
        ("a.ipynb", b"{", "is not a notebook"),
        ("a.ipynb", b"\xff", "is not a notebook"),
        ("a.ipynb", b"[]", "is not a notebook"),
        ("a.ipynb", b'{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "not a"),
        ("a.py", b"x = '\xff'", "not a Python file"),
        ("a.py", b"# coding: nonsense\n", "not a Python file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        run_file.read(path)
    assert str(path) in caught.value.message


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*gone\.py"):
        run_file.read(tmp_path / "gone.py")
    with pytest.raises(ConfigError, match="is a folder"):
        run_file.read(tmp_path)


def test_a_notebook_in_another_language_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.ipynb"
    metadata = {"kernelspec": {"name": "ir", "display_name": "R", "language": "R"}}
    nbformat.write(v4.new_notebook(metadata=metadata), path)
    with pytest.raises(ConfigError, match="a notebook in R"):
        run_file.read(path)


def test_only_code_with_something_in_it_is_run() -> None:
    skipped = v4.new_code_cell("no", metadata={"tags": [run_file.SKIPPED]})
    cells = [v4.new_markdown_cell("a"), v4.new_code_cell(" \n"), skipped, v4.new_code_cell("b")]
    notebook = v4.new_notebook(cells=cells)
    assert [cell.source for cell in run_file.code_cells(notebook)] == ["b"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.py", "not the name of a notebook"), ("no/a.ipynb", "cannot write"), ("f.ipynb", "folder")],
)
def test_a_bad_output_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "f.ipynb").mkdir()
    with pytest.raises(ConfigError, match=words):
        run_file.check_writable(tmp_path / name)


def test_the_check_leaves_nothing(tmp_path: Path) -> None:
    run_file.check_writable(tmp_path / "a.ipynb")
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_is_written_in_place_with_its_mode(tmp_path: Path) -> None:
    path, link = tmp_path / "a.ipynb", tmp_path / "b.ipynb"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    run_file.write(v4.new_notebook(), link)
    assert link.is_symlink()
    assert json.loads(path.read_text())["nbformat"] == 4
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ipynb", "b.ipynb"]


def test_a_new_notebook_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run_file.write(v4.new_notebook(), tmp_path / "a.ipynb")
    finally:
        os.umask(before)
    assert (tmp_path / "a.ipynb").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_is_gone_is_an_error_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="cannot write") as caught:
        run_file.write(v4.new_notebook(), tmp_path / "no" / "a.ipynb")
    assert not isinstance(caught.value, ConfigError)


# Outputs.


def message(kind: str, **content: Any) -> dict[str, Any]:
    return {"msg_type": kind, "header": {"msg_type": kind}, "content": content, "metadata": {}}


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return message("stream", name=name, text=text)


def collect(*messages: dict[str, Any]) -> list[Any]:
    cell = v4.new_code_cell("")
    outputs = run_file.Outputs(cell)
    for each in messages:
        outputs.take(each)
    outputs.finish()
    nbformat.validate(v4.new_notebook(cells=[cell]))
    found: list[Any] = cell.outputs
    return found


def test_streams_of_one_name_are_put_together() -> None:
    found = collect(stream("a"), stream("b"), stream("c", "stderr"), stream("d"))
    assert [(output.name, output.text) for output in found] == [
        ("stdout", "ab"),
        ("stderr", "c"),
        ("stdout", "d"),
    ]


def test_a_display_is_updated() -> None:
    first = {"data": {"text/plain": "1"}, "metadata": {}, "transient": {"display_id": "d"}}
    second = {"data": {"text/plain": "2"}, "metadata": {}, "transient": {"display_id": "d"}}
    found = collect(message("display_data", **first), message("update_display_data", **second))
    assert [output.data["text/plain"] for output in found] == ["2"]


def test_outputs_are_cleared_now_or_with_the_next() -> None:
    assert collect(stream("a"), message("clear_output", wait=False)) == []
    waiting = [stream("a"), message("clear_output", wait=True)]
    assert [output.text for output in collect(*waiting)] == ["a"]
    assert [output.text for output in collect(*waiting, stream("b"))] == ["b"]


def test_other_messages_are_no_outputs() -> None:
    assert collect(message("execute_input", code="x"), message("comm_open", comm_id="c")) == []


# Lines.


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("x = 1\ny", "x = 1"),
        ("# a comment\n\n%%sandbox memory=1M\n  y", "y"),
        ("# only\n# comments", "# only"),
        ("%%sandbox memory=1M", "%%sandbox memory=1M"),
    ],
)
def test_a_cell_is_known_by_its_first_line_of_code(source: str, line: str) -> None:
    assert run_file.first_line(source) == line


def test_the_line_of_a_cell() -> None:
    report = run_screen.CellReport(
        number=3,
        total=12,
        first_line="x = '\x1b[2J[bold]'" + "y" * 100,
        outcome="memory",
        failed=True,
        sandbox={"wall_s": 0.0123, "peak_memory_bytes": 3 << 20},
    )
    text = run_screen.line_of(report).plain
    assert text.startswith("[ 3/12] memory ")
    assert "12.3 ms" in text
    assert "3 MiB" in text
    assert "x = ' [2J[bold]'" in text
    assert text.endswith("…")


def test_a_result_without_text_is_named() -> None:
    assert run_screen.text_of({"image/png": "", "text/html": ""}) == "<image/png, text/html>"
    assert run_screen.text_of({"text/plain": "1", "image/png": ""}) == "1"


def test_the_notebooks_folder_is_not_on_the_kernels_path() -> None:
    command = without_current_folder(["python", "-m", "sandbox_kernel", "-f", "x"])
    assert command[1:] == ["-P", "-m", "sandbox_kernel", "-f", "x"]
    assert without_current_folder(command) == command
