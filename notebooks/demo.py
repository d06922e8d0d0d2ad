"""Execute a notebook with nbclient, and show what every cell used and how it ended.

The kernel is the one that the notebook names; nbclient speaks to it as to any other. What the
kernel says about a cell stands in the metadata of its execute_reply, under `sandbox`; a kernel
that says nothing leaves the columns empty. Cells with the tag `raises-exception` may fail.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from jupyter_client.kernelspec import NoSuchKernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbformat import NotebookNode

TOUR = Path(__file__).with_name("tour.ipynb")
CELL_TIMEOUT_S = 120
WIDTH = 120
FIRST_LINE_WIDTH = 26
COMMITTED_STYLES = {"ok": "green", "error": "yellow", "interrupted": "yellow"}


@dataclass(frozen=True)
class CellReport:
    """What one cell did; `figures` is the kernel's account of it, empty if there is none."""

    number: int
    first_line: str
    status: str
    ename: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """How the cell ended, in the kernel's word or else the reply's status."""
        return str(self.figures.get("outcome", self.status))

    def row(self) -> tuple[Text, ...]:
        """Give the cells of the table."""
        figures = self.figures
        words = (
            str(self.number),
            self.first_line,
            duration(figures.get("wall_s")),
            duration(figures.get("cpu_s")),
            size(figures.get("peak_memory_bytes")),
        )
        return (*map(Text, words), *self.ending())

    def ending(self) -> tuple[Text, ...]:
        """Say how the cell ended, by which error, and what became of its state."""
        style = COMMITTED_STYLES.get(self.outcome, "red")
        committed = self.figures.get("committed")
        state = "-" if committed is None else "kept" if committed else "rolled back"
        return Text(self.outcome, style), Text(self.ename, style), Text(state, "dim")


def duration(seconds: object) -> str:
    """Write seconds for people; `-` if they are unknown."""
    if not isinstance(seconds, int | float):
        return "-"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def size(size_bytes: object) -> str:
    """Write bytes for people; `-` if they are unknown."""
    if not isinstance(size_bytes, int | float):
        return "-"
    return f"{size_bytes / 1024**2:.1f} MiB"


def first_line(source: str) -> str:
    """Give the first line of a cell that is not blank; after a cell magic, the next one too."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    return "  ".join(lines[: 2 if source.startswith("%%") else 1])


def report_of(cell: NotebookNode, reply: dict[str, Any], *, number: int) -> CellReport:
    """Read a reply, and keep the kernel's figures in the notebook as well."""
    figures = reply.get("metadata", {}).get("sandbox", {})
    if figures:
        cell.metadata["sandbox"] = figures
    content = reply.get("content", {})
    return CellReport(
        number,
        first_line(cell.source),
        content.get("status", "-"),
        content.get("ename", ""),
        figures,
    )


def execute(
    notebook: NotebookNode, *, folder: Path, told: Callable[[CellReport], None]
) -> str | None:
    """Run every cell, telling each one's end; give the reason if an untagged cell failed.

    The kernel works in `folder`. What was executed so far stays in `notebook`.
    """
    numbers = {cell.id: number for number, cell in enumerate(code_cells(notebook), start=1)}
    number = 0

    def on_cell_execute(cell: NotebookNode, cell_index: int) -> None:
        nonlocal number
        del cell_index  # the place among all cells; readers count those that run
        number = numbers[cell.id]

    def on_cell_executed(
        cell: NotebookNode, cell_index: int, execute_reply: dict[str, Any]
    ) -> None:
        del cell_index
        told(report_of(cell, execute_reply, number=number))

    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        coalesce_streams=True,
        kernel_name=notebook.metadata.kernelspec.name,
        resources={"metadata": {"path": str(folder)}},
        on_cell_execute=on_cell_execute,
        on_cell_executed=on_cell_executed,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return f"cell {number} failed and should not: {error.ename}: {error.evalue}"
    except (CellTimeoutError, DeadKernelError) as error:
        return f"cell {number}: {error}"
    return None


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Give the cells that are executed: those with code in them."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def execute_visibly(
    notebook: NotebookNode, *, folder: Path, console: Console
) -> tuple[list[CellReport], str | None]:
    """Run every cell with a bar below and a line for every cell that has ended."""
    reports: list[CellReport] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        total = len(code_cells(notebook))
        task = progress.add_task("cells", total=total)

        def told(report: CellReport) -> None:
            reports.append(report)
            line = Text(f"{report.number:3}/{total}  {report.first_line[:60]:60}")
            progress.console.print(Text("  ").join((line, *report.ending())), soft_wrap=True)
            progress.advance(task)

        failure = execute(notebook, folder=folder, told=told)
    return reports, failure


def table(reports: Sequence[CellReport]) -> Table:
    """Lay out what every cell used."""
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("cell", justify="right", no_wrap=True)
    result.add_column("first line", no_wrap=True, max_width=FIRST_LINE_WIDTH)
    for heading in ("time", "cpu", "peak memory"):
        result.add_column(heading, justify="right", no_wrap=True)
    for heading in ("outcome", "error", "state"):
        result.add_column(heading, no_wrap=True)
    for report in reports:
        result.add_row(*report.row())
    return result


def write(notebook: NotebookNode, name: str, *, folder: Path) -> tuple[Path, Path]:
    """Keep the executed notebook, and the same as a page."""
    folder.mkdir(parents=True, exist_ok=True)
    as_notebook, as_page = folder / f"{name}.executed.ipynb", folder / f"{name}.html"
    nbformat.write(notebook, as_notebook)  # type: ignore[no-untyped-call]
    resources = {"metadata": {"name": name}}
    exporter = HTMLExporter()  # type: ignore[no-untyped-call]
    body, _ = exporter.from_notebook_node(notebook, resources=resources)
    as_page.write_text(body, "utf-8")
    return as_notebook, as_page


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", nargs="?", type=Path, default=TOUR)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("build"))
    parser.add_argument("--kernel", help="instead of the one that the notebook names")
    return parser.parse_args(argv)


def load(path: Path, kernel: str | None) -> NotebookNode:
    """Read a notebook, and say in it which kernel runs it; raises ValueError if none does."""
    notebook: NotebookNode = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    if kernel is not None:
        notebook.metadata["kernelspec"] = {
            "name": kernel,
            "display_name": kernel,
            "language": "python",
        }
    if not notebook.metadata.get("kernelspec", {}).get("name"):
        raise ValueError(f"{path} names no kernel (choose one with --kernel)")
    return notebook


def main(argv: Sequence[str] | None = None) -> int:
    """Execute, write, show; 1 if an untagged cell failed, 2 if nothing could be executed."""
    options = parse(argv)
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        # A file has no width; rich would take 80 columns and break the rows of the table.
        console.width = errors.width = WIDTH
    try:
        notebook = load(options.notebook, options.kernel)
        at = options.notebook.resolve().parent
        reports, failure = execute_visibly(notebook, folder=at, console=console)
        written = write(notebook, options.notebook.stem, folder=options.folder)
    except (OSError, ValueError, nbformat.ValidationError, NoSuchKernel) as error:
        errors.print(f"demo: {error}", markup=False, style="red")
        return 2
    console.print(table(reports))
    for path in written:
        console.print(f"written to {path}", markup=False, soft_wrap=True)
    if failure is not None:
        errors.print(f"demo: {failure}", markup=False, style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
