"""What the cells of a session used, and the session in all."""

from __future__ import annotations

from sandbox_kernel.model import Usage
from sandbox_kernel.session import scratch
from sandbox_kernel.session.ahead import Prepared
from sandbox_kernel.session.cell import Cell
from sandbox_kernel.session.guest import Guest
from sandbox_kernel.session.pod import Pod


class Account:
    """The figures of one session; a cell is charged for the files by which they grew."""

    def __init__(self) -> None:
        self._disk_bytes = 0

    def of_cell(self, pod: Pod, head: Guest, prepared: Prepared, cell: Cell) -> Usage:
        """End the output of a cell, and give what it used; `head` is there to see the files."""
        output = prepared.child.output
        output.drain()
        output.stop()
        counted = cell.counted or prepared.place.cgroup.usage()
        disk_bytes = scratch.look(head).used_bytes
        used, self._disk_bytes = max(disk_bytes - self._disk_bytes, 0), disk_bytes
        return Usage(
            wall_s=cell.wall_s,
            cpu_s=counted.cpu_s,
            peak_memory_bytes=counted.peak_memory_bytes,
            peak_processes=counted.peak_processes,
            disk_bytes=used,
            output_bytes=output.bytes_seen,
            denied_forks=cell.hints.denied_forks(counted),
        )

    def in_all(self, pod: Pod) -> Usage:
        """Give what the session used so far: CPU time in all, memory and processes now."""
        return pod.usage(self._disk_bytes)
