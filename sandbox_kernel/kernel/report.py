"""What a user reads: error texts, the table of `%sandbox`, and the figures of every reply.

Pure functions from values to text and JSON. Nothing here sends anything.
"""

from __future__ import annotations

import html
import signal
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sandbox_kernel.model import CellResult, Json, Limits, Outcome, Usage, total_memory_bytes
from sandbox_kernel.session import advice
from sandbox_kernel.units import format_duration, format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandbox_kernel.errors import SandboxError

_RED = "\x1b[31m"
_PLAIN = "\x1b[39m"
_UNCHANGED = "the session is as it was before this cell"


@dataclass(frozen=True)
class CellError:
    """One `error` message; the reply carries the same three values."""

    ename: str
    evalue: str
    traceback: tuple[str, ...]

    def content(self) -> Json:
        """Give the content of the iopub message."""
        return {
            "ename": self.ename,
            "evalue": self.evalue,
            "traceback": list(self.traceback),
        }


def error_from(error: SandboxError, *, remark: str = "") -> CellError:
    """Word an error of the sandbox itself; its remedy stands in the text, `remark` after it."""
    evalue = f"{error}; {remark}" if remark else str(error)
    return _cell_error(type(error).__name__, evalue)


def error_of(result: CellResult, *, ceiling: Limits, grace_s: float) -> CellError | None:
    """Word the end of a killed cell; None where the guest has said itself how it ended."""
    if result.committed:
        return None
    if result.outcome is Outcome.INTERRUPTED:
        evalue = (
            f"the cell did not stop within {format_duration(grace_s)} of the interrupt "
            f"and was killed; {_UNCHANGED}"
        )
        return _cell_error("KeyboardInterrupt", evalue, result.traceback)
    word = _WORDS.get(result.outcome, _crashed)
    ename, reason, advice = word(result, ceiling)
    parts = (reason, advice, _UNCHANGED)
    evalue = "; ".join(part for part in parts if part)
    return _cell_error(ename, evalue, result.traceback)


def _cell_error(ename: str, evalue: str, before: tuple[str, ...] = ()) -> CellError:
    """Add the line that IPython ends a traceback with, after where the cell stood."""
    return CellError(ename, evalue, (*before, f"{_RED}{ename}{_PLAIN}: {evalue}"))


def _memory(result: CellResult, ceiling: Limits) -> tuple[str, str, str]:
    limit = result.limits.memory_bytes
    peak = result.usage.peak_memory_bytes
    seen = f" (peak {format_size(peak)})" if peak is not None else ""
    if peak is not None and peak < limit * 0.9:
        total = format_size(total_memory_bytes(ceiling))
        reason = f"the session's variables and files and this cell needed more than {total}{seen}"
        return "MemoryLimitExceeded", reason, "delete variables and files you no longer need"
    return (
        "MemoryLimitExceeded",
        f"the cell needed more than {format_size(limit)} of memory{seen}",
        advice.memory(result.limits, ceiling),
    )


def _wall_time(result: CellResult, ceiling: Limits) -> tuple[str, str, str]:
    limit = format_duration(result.limits.wall_time_s)
    used = format_duration(result.usage.wall_s)
    return (
        "WallTimeLimitExceeded",
        f"the cell ran longer than {limit} (it was stopped after {used}){_denied(result)}",
        advice.wall_time(result.limits, ceiling),
    )


def _cpu_time(result: CellResult, ceiling: Limits) -> tuple[str, str, str]:
    limit = format_duration(result.limits.cpu_time_s)
    used = format_duration(result.usage.cpu_s)
    reason = f"the cell used more than {limit} of processor time (it had used {used})"
    return (
        "CpuTimeLimitExceeded",
        f"{reason}{_denied(result)}",
        advice.cpu_time(result.limits, ceiling),
    )


def _denied(result: CellResult) -> str:
    """Tell what the limit of processes refused to a cell that went on all the same."""
    denied = result.usage.denied_forks
    limit = result.limits.processes
    return f", and its limit `processes` of {limit} refused {denied} more" if denied else ""


def _processes(result: CellResult, ceiling: Limits) -> tuple[str, str, str]:
    limit, denied = result.limits.processes, result.usage.denied_forks
    reason = (
        f"the cell had {limit} processes and threads, was refused {denied} more, and its process"
    )
    advised = advice.processes(result.limits, ceiling)
    return "ProcessLimitExceeded", f"{reason} its process then {_end(result)}", advised


def _disk(result: CellResult, ceiling: Limits) -> tuple[str, str, str]:
    limit = format_size(result.limits.disk_bytes)
    reason = f"the session's files filled the {limit} they may take, and the cell's process"
    advised = advice.disk(result.limits, ceiling)
    return "DiskLimitExceeded", f"{reason} then {_end(result)}", advised


def _crashed(result: CellResult, _ceiling: Limits) -> tuple[str, str, str]:
    peak = result.usage.peak_memory_bytes
    seen = f" (peak memory {format_size(peak)})" if peak is not None else ""
    return "CellCrashed", f"the cell's process {_end(result)}{seen}", ""


def _exited(result: CellResult, _ceiling: Limits) -> tuple[str, str, str]:
    code = "an unknown exit code" if result.exit_code is None else f"exit code {result.exit_code}"
    return (
        "CellExited",
        f"the cell ended its own process with {code}",
        "to stop a cell early raise an exception instead",
    )


def _end(result: CellResult) -> str:
    if result.signal is not None:
        return f"died of {signal_text(result.signal)}"
    if result.exit_code is not None:
        return f"ended with exit code {result.exit_code}"
    return "stopped answering"


_WORDS: dict[Outcome, Callable[[CellResult, Limits], tuple[str, str, str]]] = {
    Outcome.MEMORY: _memory,
    Outcome.WALL_TIME: _wall_time,
    Outcome.CPU_TIME: _cpu_time,
    Outcome.PROCESSES: _processes,
    Outcome.DISK: _disk,
    Outcome.CRASHED: _crashed,
    Outcome.EXITED: _exited,
}


def signal_text(number: int) -> str:
    """Name a signal, `SIGSEGV (Segmentation fault)`."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    said = signal.strsignal(number)
    return f"{name} ({said})" if said else name


def figures(result: CellResult, *, image: str) -> Json:
    """Give what a reply's metadata carries under `sandbox`."""
    usage = result.usage
    return {
        "outcome": result.outcome.value,
        "committed": result.committed,
        "resident": result.resident,
        "wall_s": round(usage.wall_s, 6),
        "cpu_s": round(usage.cpu_s, 6),
        "peak_memory_bytes": usage.peak_memory_bytes,
        "peak_processes": usage.peak_processes,
        "disk_bytes": usage.disk_bytes,
        "output_bytes": usage.output_bytes,
        "image": image,
        "container_id": result.container_id,
        "limits": asdict(result.limits),
    }


def status_rows(limits: Limits, usage: Usage | None) -> list[tuple[str, str, str]]:
    """Pair each limit with what the session used of it so far; `-` where nobody counts."""
    used = usage or Usage()

    def size(value_bytes: int | None) -> str:
        return "-" if usage is None or value_bytes is None else format_size(value_bytes)

    cpu = "-" if usage is None else format_duration(used.cpu_s)
    wall = "-" if usage is None else format_duration(used.wall_s)
    processes = "-" if used.peak_processes is None else str(used.peak_processes)
    rate = limits.io_bytes_per_s
    return [
        ("memory", format_size(limits.memory_bytes), size(used.peak_memory_bytes)),
        ("cpus", f"{limits.cpus:g}", "-"),
        ("cpu_time", format_duration(limits.cpu_time_s), cpu),
        ("wall_time", format_duration(limits.wall_time_s), wall),
        ("processes", str(limits.processes), processes),
        ("disk", format_size(limits.disk_bytes), size(used.disk_bytes)),
        ("output", format_size(limits.output_bytes), size(used.output_bytes)),
        ("open_files", str(limits.open_files), "-"),
        ("io", "none" if rate is None else f"{format_size(rate)}/s", "-"),
    ]


def status_bundle(limits: Limits, usage: Usage | None, *, image: str) -> Json:
    """Give the table of `%sandbox` as a MIME bundle, text and HTML."""
    head = ("limit", "of each cell", "session so far")
    rows = status_rows(limits, usage)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    titles = "".join(f"<th>{title}</th>" for title in head)
    name = html.escape(image)
    return {
        "text/plain": "\n".join((f"image {image}", *lines)),
        "text/html": (
            f"<table><caption>image {name}</caption>"
            f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
        ),
    }
