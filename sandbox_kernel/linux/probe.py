"""What this host offers of all that a session needs: each thing is tried, none is guessed.

`sandbox-kernel doctor` prints it, tests ask it what may run here, and a kernel whose session does
not come up asks it for the reason. A start that works never runs it. What is tried is listed in
`probe_trials`, acts are in `probe_acts`, remedies in `probe_remedy`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import idmap, probe_cgroups, probe_child, probe_trials
from sandbox_kernel.linux.probe_ids import FIRST_ID, Ground
from sandbox_kernel.linux.probe_remedy import NEEDS_USER_NAMESPACE, POINTERS, remedy
from sandbox_kernel.linux.probe_trials import Finding

__all__ = ["GROUPS", "Finding", "Ids", "capabilities", "explain", "ids_of", "probe", "unmet"]

GROUPS = ("ids", "namespaces", "overlay", "cgroups", "seccomp", "limits")
FRESH_TIMEOUT_S = 60.0
ROOT, ORDINARY = "root", "ordinary"


def user() -> str:
    """Tell whose sessions this process makes: `root`'s, or those of an `ordinary` user."""
    return ROOT if os.geteuid() == 0 else ORDINARY


def probe(folder: str = ".") -> tuple[Finding, ...]:
    """Try everything; `folder` is where notebooks are.

    Forks, so call it in a process with one thread, else `findings_of_fresh_process`.
    """
    folder = os.path.abspath(folder)
    if user() == ROOT:
        ground, findings = _ground_of_root()
        own = probe_trials.of_root(folder)
    else:
        ground, findings = _ground_of_user()
        own = probe_trials.of_user(folder)
    findings += [trial.run(ground) for trial in (*own, *probe_trials.of_all())]
    findings += _cgroups()
    return tuple(sorted(findings, key=lambda finding: GROUPS.index(finding.group)))


def _ground_of_root() -> tuple[Ground | None, list[Finding]]:
    """Take a range; where there is none, the other things are tried on a single id."""
    high = probe_trials.HIGH.run(None)
    if high.available:
        return Ground(idmap.high(FIRST_ID)), [high, probe_trials.SINGLE.finding("")]
    single = probe_trials.SINGLE.run(None)
    return (_single() if single.available else None), [high, single]


def _ground_of_user() -> tuple[Ground | None, list[Finding]]:
    """Take the ids of the user's ranges, else his own."""
    single = probe_trials.SINGLE.run(None)
    if not single.available:
        why = "it needs a user namespace, which cannot be had"
        subordinate = probe_trials.SUBORDINATE.finding(why, advice=NEEDS_USER_NAMESPACE)
        return None, [subordinate, single]
    subordinate = probe_trials.SUBORDINATE.run(None)
    if not subordinate.available:
        return _single(), [subordinate, single]
    return Ground(idmap.find_subordinate(os.geteuid(), os.getegid())), [subordinate, single]


def _single() -> Ground:
    return Ground(idmap.single(os.geteuid(), os.getegid()))


@dataclass(frozen=True)
class Ids:
    """Which ids the sessions of this user have here."""

    kind: str
    """`high`, `subordinate` or `single` as in `idmap`; `none` where there can be no session."""
    why: str
    """Why they are no better ones; empty for the best that this user may have."""


def ids_of(findings: Iterable[Finding]) -> Ids:
    """Read from what was found which ids there are."""
    by_name = {finding.name: finding for finding in findings}
    if "id_range" in by_name:
        high = by_name["id_range"]
        return Ids("high" if high.available else "none", high.why)
    if not by_name["user_namespace"].available:
        return Ids("none", by_name["user_namespace"].why)
    subordinate = by_name["subordinate_ids"]
    return Ids("subordinate" if subordinate.available else "single", subordinate.why)


_OPTIONAL_CGROUPS = (probe_cgroups.FREEZE, probe_cgroups.SWAP, probe_cgroups.IO)


def _cgroups() -> list[Finding]:
    try:
        reasons = json.loads(probe_child.call(probe_cgroups.reasons))
    except OSError as error:
        reason = (error.errno or 0, str(error.strerror), "")
        reasons = dict.fromkeys(probe_cgroups.ALL, reason)
    except HostError as error:
        reasons = dict.fromkeys(probe_cgroups.ALL, (0, error.message, error.hint))
    return [_cgroup_finding(name, *reasons[name]) for name in probe_cgroups.ALL]


def _cgroup_finding(name: str, number: int, why: str, advice: str) -> Finding:
    if why and not advice:
        advice = remedy(name, number)
    required = name not in _OPTIONAL_CGROUPS
    return probe_trials.found(name, "cgroups", why, advice, required=required)


def findings_of_fresh_process(folder: str = ".") -> tuple[Finding, ...]:
    """Run `probe` in a new interpreter, for callers that have threads; takes half a second.

    Raises HostError where that gives nothing.
    """
    # -S saves the time of reading site-packages, so the path of this process is handed over.
    root = str(Path(__file__).resolve().parents[2])
    places = [root, *(place for place in sys.path if os.path.isabs(place))]
    program = (
        f"import sys; sys.path[:] = {places!r}; "
        "from sandbox_kernel.linux.probe import print_findings; print_findings(sys.argv[1])"
    )
    argv = [sys.executable, "-I", "-S", "-c", program, folder]
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=FRESH_TIMEOUT_S, check=True, stdin=subprocess.DEVNULL
        )
        return tuple(Finding(**fields) for fields in json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise HostError(
            f"this host cannot be examined: {error}", hint="run `sandbox-kernel doctor`"
        ) from error


def print_findings(folder: str) -> None:
    """Write the findings to fd 1 as JSON, for `findings_of_fresh_process`."""
    text = json.dumps([asdict(finding) for finding in probe(folder)])
    with os.fdopen(os.dup(1), "w", encoding="ascii") as out:
        out.write(text)


KERNEL = "kernel"
"""All that a kernel with its defaults needs, as one capability."""


_ONLY = {
    ROOT: ("id_range", "idmapped_mount", "idmapped_image"),
    ORDINARY: ("subordinate_ids", "workspace"),
}
"""What only the sessions of one kind of user are made of, so that it is not tried for others."""


@functools.cache
def capabilities() -> dict[str, str]:
    """Give each thing by name with the reason why it is missing, or an empty text."""
    findings = findings_of_fresh_process()
    missing = ", ".join(finding.name for finding in lacking(findings))
    whole = f"this host lacks {missing}" if missing else ""
    known = {finding.name: finding.why for finding in findings}
    others = dict.fromkeys(_ONLY[ORDINARY if user() == ROOT else ROOT], "not of use to this user")
    return {KERNEL: whole} | others | known


def lacking(findings: Iterable[Finding], waived: frozenset[str] = frozenset()) -> list[Finding]:
    """Give what a kernel needs and this host does not have, without what was waived by name."""
    return [
        finding
        for finding in findings
        if finding.required and not finding.available and finding.name not in waived
    ]


def unmet(waived: frozenset[str] = frozenset(), *, folder: str = ".") -> HostError | None:
    """Give the error that names what this host cannot enforce; None if there is nothing.

    Blocks for half a second: in a loop call it by a thread.
    """
    missing = lacking(findings_of_fresh_process(folder), waived)
    if not missing:
        return None
    text = "; ".join(f"{finding.name}: {finding.why}" for finding in missing)
    return HostError(f"this host cannot enforce {text}", hint=_remedies(missing))


def explain(waived: frozenset[str] = frozenset(), *, folder: str = ".") -> str:
    """Give the remedies for what this host lacks, in one line; empty if it lacks nothing.

    Blocks as `unmet` does. Never raises: it is asked when something else has gone wrong.
    """
    try:
        missing = lacking(findings_of_fresh_process(folder), waived)
    except HostError as error:
        return str(error)
    return _remedies(missing)


def _remedies(missing: Sequence[Finding]) -> str:
    """Say each remedy once, with what it is for."""
    names: dict[str, list[str]] = {}
    for finding in missing:
        if finding.remedy in POINTERS:
            continue
        names.setdefault(finding.remedy, []).append(finding.name)
    return "; ".join(f"{', '.join(of)}: {advice}" for advice, of in names.items())
