"""How a limit is raised: the `%%sandbox` line for the next try, or whom to ask."""

from __future__ import annotations

from sandbox_kernel.model import Limits

_UNITS = (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10))


def memory(limits: Limits, ceiling: Limits) -> str:
    """Say how to get more memory."""
    higher = min(2 * limits.memory_bytes, ceiling.memory_bytes)
    return _raise("memory", size_option(higher), is_higher=higher > limits.memory_bytes)


def wall_time(limits: Limits, ceiling: Limits) -> str:
    """Say how to get more time on the clock."""
    higher = min(2 * limits.wall_time_s, ceiling.wall_time_s)
    return _raise("wall_time", seconds_option(higher), is_higher=higher > limits.wall_time_s)


def cpu_time(limits: Limits, ceiling: Limits) -> str:
    """Say how to get more processor time."""
    higher = min(2 * limits.cpu_time_s, ceiling.cpu_time_s)
    return _raise("cpu_time", seconds_option(higher), is_higher=higher > limits.cpu_time_s)


def processes(limits: Limits, ceiling: Limits) -> str:
    """Say how to get more processes and threads."""
    higher = min(2 * limits.processes, ceiling.processes)
    return _raise("processes", str(higher), is_higher=higher > limits.processes)


def disk(limits: Limits, ceiling: Limits) -> str:
    """Say how to get more room for files."""
    higher = min(2 * limits.disk_bytes, ceiling.disk_bytes)
    return _raise("disk", size_option(higher), is_higher=higher > limits.disk_bytes)


def open_files(limits: Limits, ceiling: Limits) -> str:
    """Say how to get more open files."""
    higher = min(2 * limits.open_files, ceiling.open_files)
    return _raise("open_files", str(higher), is_higher=higher > limits.open_files)


def _raise(option: str, value: str, *, is_higher: bool) -> str:
    if not is_higher:
        return (
            "that is the most this kernel allows: use less, "
            f"or ask your teacher or administrator to raise `{option}`"
        )
    return f"to raise it begin the cell with `%%sandbox {option}={value}`"


def size_option(size_bytes: int) -> str:
    """Give a size as a `%%sandbox` line takes it, exactly: `512M`."""
    for letter, factor in _UNITS:
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{letter}"
    return str(size_bytes)


def seconds_option(duration_s: float) -> str:
    """Give a duration as a `%%sandbox` line takes it, `5s`."""
    return f"{duration_s:g}s"
