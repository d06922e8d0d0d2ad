"""The files that `run` reads and writes: notebooks, and Python files cut into cells.

A Python file is read as a notebook too, so that all after this knows one form only.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import tokenize
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode, v4

from sandbox_kernel.errors import ConfigError, SandboxError

MAY_FAIL = "raises-exception"
SKIPPED = "skip-execution"
"""Tags of cells, as nbconvert has them."""

# Jupytext's percent format: `# %%`, more percent signs for deeper headings, then a title,
# [markdown] or [raw], and key=value pairs.
_MARKER = re.compile(r"#\s*%%+(?:\s+(?P<rest>.*))?")
_KIND = re.compile(r"\[(markdown|md|raw)\]")
_TAGS = re.compile(r"\btags=(\[[^\]]*\])")
_SANDBOX_LINE = re.compile(r"(\s*)#\s*(%%?sandbox\b.*)", re.DOTALL)


def read(path: Path) -> NotebookNode:
    """Read a notebook or a Python file; raises ConfigError that names it."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", hint="name a file in it")
    if path.suffix not in (".ipynb", ".py"):
        raise ConfigError(
            f"{path} is neither a notebook nor a Python file",
            hint="its name must end in .ipynb or .py",
        )
    try:
        return _read_notebook(path) if path.suffix == ".ipynb" else _read_python(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", hint="check the path") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="check its mode") from None


def _read_notebook(path: Path) -> NotebookNode:
    text = path.read_bytes()
    try:
        with warnings.catch_warnings():
            # Cells without an id, and what else an older version wrote, are mended in silence.
            warnings.simplefilter("ignore")
            notebook: NotebookNode = nbformat.reads(text.decode("utf-8"), as_version=4)
            nbformat.validate(notebook)
    except Exception as error:  # noqa: BLE001 - nbformat raises whatever its converters meet
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{path} is not a notebook: {reason}", hint="open it in Jupyter and save it again"
        ) from None
    language = notebook.metadata.get("kernelspec", {}).get("language", "python")
    if language.lower() != "python":
        raise ConfigError(f"{path} is a notebook in {language}", hint="the kernel runs Python only")
    return notebook


def _read_python(path: Path) -> NotebookNode:
    try:
        with tokenize.open(path) as file:  # heeds a coding line
            text = file.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not a Python file: {error}", hint="save it in UTF-8"
        ) from None
    return parse_python(text)


def parse_python(text: str) -> NotebookNode:
    """Cut a Python file at its `# %%` lines; without any it is one cell."""
    cells = []
    marker, lines = "", list[str]()
    for line in [*text.splitlines(), None]:
        match = None if line is None else _MARKER.fullmatch(line)
        if line is not None and match is None:
            lines.append(line)
            continue
        if any(part.strip() for part in lines):
            cells.append(_cell(marker, lines))
        marker, lines = (match["rest"] or "" if match else ""), []
    metadata = {
        "kernelspec": {
            "name": "sandbox-python",
            "display_name": "Python 3 (sandboxed)",
            "language": "python",
        }
    }
    notebook: NotebookNode = v4.new_notebook(cells=cells, metadata=metadata)
    return notebook


def _cell(marker: str, lines: list[str]) -> NotebookNode:
    kind = _KIND.search(marker)
    source = "\n".join(lines).strip("\n")
    if kind is not None:
        source = "\n".join(re.sub(r"^# ?", "", line) for line in source.split("\n"))
        new = v4.new_raw_cell if kind[1] == "raw" else v4.new_markdown_cell
        text: NotebookNode = new(source)
        return text
    # Jupytext comments magics out, so that the file stays Python.
    source = _SANDBOX_LINE.sub(r"\1\2", source) if _SANDBOX_LINE.match(source) else source
    tags = _tags(marker)
    code: NotebookNode = v4.new_code_cell(source, metadata={"tags": tags} if tags else {})
    return code


def _tags(marker: str) -> list[str]:
    match = _TAGS.search(marker)
    try:
        found = json.loads(match[1]) if match else []
    except ValueError:
        return []
    return [tag for tag in found if isinstance(tag, str)]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Give the cells to run: code that is not blank, and not tagged to be skipped."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.strip() and SKIPPED not in tags_of(cell)
    ]


def tags_of(cell: NotebookNode) -> list[str]:
    """Give the tags of a cell."""
    tags = cell.metadata.get("tags", [])
    return list(tags)


def clear(cell: NotebookNode) -> None:
    """Take away what an earlier run put into a cell."""
    cell.outputs, cell.execution_count = [], None
    cell.metadata.pop("sandbox", None)
    cell.metadata.pop("execution", None)


def check_writable(path: Path) -> None:
    """Raise ConfigError if a notebook could not be written there."""
    if path.suffix != ".ipynb":
        raise ConfigError(f"-o {path} is not the name of a notebook", hint="end it in .ipynb")
    if path.is_dir():
        raise ConfigError(f"-o {path} is a folder", hint="name a file in it")
    try:
        if path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        with _beside(path):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook as a whole or not at all; raises SandboxError."""
    text = nbformat.writes(notebook)
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        with _beside(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.chmod(mode)
            # Through a link, as a plain write would.
            temporary.replace(path.resolve())
    except OSError as error:
        failure = _unwritable(path, error)
        raise SandboxError(failure.message, hint=failure.hint) from error


def _umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Make a file in the folder of `path`, and remove it if it is still there at the end."""
    folder = path.resolve().parent
    fd, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".tmp", dir=folder)
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write {path}: {error.strerror or error}", hint="name a file that you may write"
    )


def first_line(source: str) -> str:
    """Give the line that a cell is known by: the first with code, else the first at all."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    telling = (line for line in lines if not line.startswith(("#", "%%sandbox")))
    return next(telling, lines[0] if lines else "")


class Outputs:
    """The outputs of one cell, put together from messages as a front end does."""

    def __init__(self, cell: NotebookNode) -> None:
        self._outputs: list[Any] = cell.outputs
        self._outputs.clear()
        self._clear_next = False

    def take(self, message: dict[str, Any]) -> NotebookNode | None:
        """Keep what a message brings; give the output if it is one to show."""
        kind, content = message["msg_type"], message["content"]
        if kind == "clear_output":
            self._clear_next = bool(content.get("wait"))
            if not self._clear_next:
                self._outputs.clear()
            return None
        if kind == "update_display_data":
            return self._update(content)
        if kind not in ("stream", "display_data", "execute_result", "error"):
            return None
        output: NotebookNode = v4.output_from_msg(message)
        if self._clear_next:
            self._outputs.clear()
            self._clear_next = False
        last = self._outputs[-1] if self._outputs else {}
        if kind == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            self._outputs.append(output)
        display_id = (content.get("transient") or {}).get("display_id")
        if display_id is not None:
            # Taken out again by `finish`: the format does not know it.
            self._outputs[-1]["display_id"] = display_id
        return output

    def _update(self, content: dict[str, Any]) -> NotebookNode:
        display_id = (content.get("transient") or {}).get("display_id")
        for output in self._outputs:
            if display_id is not None and output.get("display_id") == display_id:
                output["data"] = nbformat.from_dict(content["data"])
                output["metadata"] = nbformat.from_dict(content["metadata"])
        shown: NotebookNode = v4.new_output(
            "display_data", data=content["data"], metadata=content["metadata"]
        )
        return shown

    def finish(self) -> None:
        """Leave what the format knows."""
        for output in self._outputs:
            output.pop("display_id", None)
