"""The names of sessions' groups: they tell whose a group is, and so which ones are left-overs."""

from __future__ import annotations

import re
from pathlib import Path

from sandbox_kernel.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}")
_SESSION = re.compile(r"sandbox-kernel-(\d+)-(\d+)-.+")


def checked_name(name: str) -> str:
    """Return `name` if it can be a group's; raise ConfigError (no dot: files have one)."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a cgroup",
            hint="use letters, digits, '-' and '_', at most 200",
        )
    return name


def session_name(session_id: str) -> str:
    """Name a session's group after its owner, this process, so that a sweep can tell the dead.

    Pid and start time (in clock ticks since boot) are as /proc shows them.
    """
    text = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    pid = text.partition(" ")[0]
    return checked_name(f"sandbox-kernel-{pid}-{_start_time(text)}-{session_id}")


def is_left_over(name: str, proc: Path) -> bool:
    """Tell whether this is the name of a session whose owner is dead."""
    match = _SESSION.fullmatch(name)
    return match is not None and not _alive(match[1], match[2], proc)


def _alive(pid: str, start_time: str, proc: Path) -> bool:
    """Tell whether the process that was started then is still there."""
    try:
        stat = (proc / pid / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    state = stat.rpartition(")")[2].split()[0]
    # A zombie is dead, though its client has not waited for it yet.
    return state not in "ZX" and _start_time(stat) == int(start_time)


def _start_time(stat: str) -> int:
    """Give field 22 of /proc/PID/stat; the command name in field 2 may hold anything."""
    return int(stat.rpartition(")")[2].split()[19])
