"""How an execution ended, told from what the host itself saw.

In this order: an OOM kill that the cell's cgroup counted, a time limit that this side enforced, a
broken protocol, the guest's word that it is done, a limit that refused something to a cell that
then died, the status it died with. An exit status alone is never a success, and never names a
limit: `os._exit(0)` proves nothing, nor does `os._exit(137)`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sandbox_kernel.errors import ProtocolError
from sandbox_kernel.model import Json, Outcome
from sandbox_kernel.session.guest import ExitStatus
from sandbox_kernel.session.said import Done

CUT = (Outcome.WALL_TIME, Outcome.CPU_TIME)
"""Reasons to stop a cell that roll it back however it ends then."""


@dataclass(frozen=True)
class Verdict:
    """How an execution ended."""

    outcome: Outcome
    committed: bool
    reply: Json
    traceback: tuple[str, ...] = ()
    exit_code: int | None = None
    signal: int | None = None
    notes: tuple[str, ...] = ()
    threads: tuple[str, ...] = ()
    fragile: tuple[str, ...] = ()
    alone: bool = True
    comms: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Seen:
    """What this side saw of an execution that has ended."""

    oom_kills: int
    """Processes of the cell that Linux killed for memory, as its cgroup counts them."""
    stopping: Outcome | None = None
    """Why it was interrupted, if it was."""
    failure: ProtocolError | None = None
    done: Done | None = None
    status: ExitStatus | None = None
    refusal: Outcome | None = None
    """The limit that refused it something, if one did."""
    traceback: tuple[str, ...] = ()


def judge(seen: Seen) -> Verdict:
    """Tell how an execution ended."""
    if seen.oom_kills > 0:
        return _rolled_back(seen, Outcome.MEMORY)
    if seen.stopping in CUT:
        return _rolled_back(seen, seen.stopping)
    if seen.failure is not None:
        return _rolled_back(seen, Outcome.CRASHED, notes=(str(seen.failure),))
    if seen.done is not None:
        return _committed(seen.done, was_interrupted=seen.stopping is Outcome.INTERRUPTED)
    if seen.stopping is Outcome.INTERRUPTED:
        return _rolled_back(seen, Outcome.INTERRUPTED)
    return _death(seen)


def _committed(done: Done, *, was_interrupted: bool) -> Verdict:
    outcome = Outcome.OK
    if done.reply["status"] == "error":
        stopped = done.reply.get("ename") in ("KeyboardInterrupt", "CancelledError")
        outcome = Outcome.INTERRUPTED if was_interrupted and stopped else Outcome.ERROR
    return Verdict(
        outcome,
        committed=True,
        reply=done.reply,
        threads=done.threads,
        fragile=done.fragile,
        comms=done.comms,
        alone=done.alone,
    )


def _death(seen: Seen) -> Verdict:
    if seen.status is None:
        return _rolled_back(seen, seen.refusal or Outcome.CRASHED)
    code, number = seen.status
    if code == os.CLD_EXITED:
        return _rolled_back(seen, seen.refusal or Outcome.EXITED, exit_code=number)
    return _rolled_back(seen, seen.refusal or Outcome.CRASHED, signal_number=number)


def _rolled_back(
    seen: Seen,
    outcome: Outcome,
    *,
    exit_code: int | None = None,
    signal_number: int | None = None,
    notes: tuple[str, ...] = (),
) -> Verdict:
    return Verdict(
        outcome,
        committed=False,
        reply={},
        traceback=seen.traceback,
        exit_code=exit_code,
        signal=signal_number,
        notes=notes,
    )
