"""What this host offers of all that a session needs: each thing is tried, none is guessed.

`sandbox-kernel doctor` prints it, tests ask it what may run here, and a kernel whose session does
not come up asks it for the reason. A start that works never runs it. Acts are in `probe_acts`,
remedies in `probe_remedy`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import libc, probe_acts, probe_cgroups, probe_child, probe_ids
from sandbox_kernel.linux.probe_remedy import NEEDS_USER_NAMESPACE, remedy

GROUPS = ("ids", "namespaces", "overlay", "cgroups", "seccomp", "limits")
FRESH_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Finding:
    """One thing that was tried; names of limits are those of `config`."""

    name: str
    group: str
    """One of GROUPS."""
    available: bool
    required: bool
    """Whether a kernel with its defaults cannot run without it."""
    why: str
    """What went wrong; empty where nothing did."""
    remedy: str
    """What to do about it; empty where nothing need be done."""


@dataclass(frozen=True)
class Trial:
    """One thing to try."""

    name: str
    group: str
    act: probe_child.Act
    flags: int = 0
    """What is new for the act beside a user namespace."""
    inside: bool = True
    """Whether it is done as root of a new user namespace, or with the rights of this process."""
    required: bool = True

    def run(self, mapping: probe_ids.Mapping | None) -> Finding:
        """Try it; without a mapping nothing can be done inside a user namespace."""
        try:
            if not self.inside:
                probe_child.call(self.act)
            elif mapping is None:
                why = "it needs a user namespace, which cannot be had"
                return self.finding(why, advice=NEEDS_USER_NAMESPACE)
            else:
                act = functools.partial(probe_ids.as_root_of, mapping, self.act, flags=self.flags)
                probe_child.call(act)
        except OSError as error:
            return self.finding(error.strerror or str(error), error.errno or 0)
        return self.finding("")

    def finding(self, why: str, number: int = 0, advice: str = "") -> Finding:
        """Give the finding; `why` is empty if all went well."""
        if why and not advice:
            advice = remedy(self.name, number)
        return _finding(self.name, self.group, why, advice, required=self.required)


def _finding(name: str, group: str, why: str, advice: str, *, required: bool) -> Finding:
    return Finding(name, group, available=not why, required=required, why=why, remedy=advice)


def _inside(mapping: probe_ids.Mapping) -> probe_child.Act:
    return functools.partial(probe_ids.as_root_of, mapping, probe_acts.own_namespace)


_MAPPINGS = (
    Trial("id_range", "ids", _inside(probe_ids.map_high_range), inside=False),
    Trial("subordinate_ids", "ids", _inside(probe_ids.map_subordinate), inside=False),
    Trial("user_namespace", "namespaces", _inside(probe_ids.map_one), inside=False),
)
_HOST_BINDS = Trial("host_binds", "ids", probe_acts.host_binds, inside=False)
_PROC_FLAGS = libc.CLONE_NEWPID | libc.CLONE_NEWNS


def _trials(folder: str) -> tuple[Trial, ...]:
    new = probe_acts.in_new_namespace
    idmapped = functools.partial(probe_ids.idmapped_folder, folder)
    return (
        Trial("pid_namespace", "namespaces", lambda: "", flags=libc.CLONE_NEWPID),
        Trial("mount_namespace", "namespaces", new(libc.CLONE_NEWNS)),
        Trial("network_namespace", "namespaces", new(libc.CLONE_NEWNET)),
        Trial("ipc_namespace", "namespaces", new(libc.CLONE_NEWIPC)),
        Trial("uts_namespace", "namespaces", new(libc.CLONE_NEWUTS)),
        Trial("cgroup_namespace", "namespaces", new(libc.CLONE_NEWCGROUP)),
        Trial("proc", "namespaces", probe_acts.fresh_proc, flags=_PROC_FLAGS),
        Trial("devpts", "namespaces", probe_acts.terminals),
        Trial("idmapped_mount", "namespaces", idmapped, inside=False),
        Trial("overlay", "overlay", probe_acts.overlay),
        Trial("overlay_volatile", "overlay", probe_acts.overlay_volatile),
        Trial("overlay_whiteout", "overlay", probe_acts.overlay_whiteout),
        Trial("overlay_opaque", "overlay", probe_acts.overlay_opaque, required=False),
        Trial("overlay_layers", "overlay", probe_acts.overlay_layers),
        Trial("no_new_privs", "seccomp", probe_acts.no_new_privileges, inside=False),
        Trial("seccomp", "seccomp", probe_acts.asking_filter),
        Trial("disk", "limits", probe_acts.sized_tmpfs),
        Trial("open_files", "limits", probe_acts.open_files, inside=False),
        Trial("pidfd", "limits", probe_acts.pidfd, inside=False),
    )


def probe(folder: str = ".") -> tuple[Finding, ...]:
    """Try everything; `folder` is where notebooks are.

    Forks, so call it in a process with one thread, else `findings_of_fresh_process`.
    """
    found = _ids()
    mapping = _best_mapping({finding.name for finding in found if finding.available})
    found += [trial.run(mapping) for trial in _trials(os.path.abspath(folder))]
    found += _cgroups()
    return tuple(sorted(found, key=lambda finding: GROUPS.index(finding.group)))


def _ids() -> list[Finding]:
    """Try the ways to map ids, and tell whether this is a user for whom there is no way yet."""
    high, subordinate, one = (trial.run(None) for trial in _MAPPINGS)
    # Subordinate ids are an ordinary user's, so the engine does not need them: it needs the range.
    subordinate = _optional(subordinate)
    binds = _HOST_BINDS.run(None)
    if high.available:  # what the range allows counts, also where one id alone is forbidden
        one = _MAPPINGS[2].finding("")
    allowed = high.available and binds.available
    why = (
        "a session needs a range of ids and bind mounts that root alone can make; root's id is "
        "not among those of any session"
    )
    rootless = _finding("rootless", "ids", why, remedy("rootless", 0), required=not allowed)
    return [high, subordinate, binds, rootless, one]


def _optional(finding: Finding) -> Finding:
    return Finding(**{**asdict(finding), "required": False})


def _best_mapping(available: set[str]) -> probe_ids.Mapping | None:
    if "id_range" in available:
        return probe_ids.map_high_range
    if "subordinate_ids" in available:
        return probe_ids.map_subordinate
    return probe_ids.map_one if "user_namespace" in available else None


_OPTIONAL_CGROUPS = (probe_cgroups.FREEZE, probe_cgroups.SWAP)


def _cgroups() -> list[Finding]:
    names = (*probe_cgroups.NAMES, probe_cgroups.KILL, *_OPTIONAL_CGROUPS)
    try:
        reasons = json.loads(probe_child.call(probe_cgroups.reasons))
    except OSError as error:
        reasons = {name: (error.errno or 0, str(error.strerror), "") for name in names}
    return [_cgroup_finding(name, *reasons[name]) for name in names]


def _cgroup_finding(name: str, number: int, why: str, advice: str) -> Finding:
    if why and not advice:
        advice = remedy(name, number)
    required = name not in _OPTIONAL_CGROUPS
    return _finding(name, "cgroups", why, advice, required=required)


def findings_of_fresh_process(folder: str = ".") -> tuple[Finding, ...]:
    """Run `probe` in a new interpreter, for callers that have threads; takes half a second.

    Raises HostError where that gives nothing.
    """
    root = str(Path(__file__).resolve().parents[2])
    program = (
        f"import sys; sys.path.insert(0, {root!r}); "
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


@functools.cache
def capabilities() -> dict[str, str]:
    """Give each thing by name with the reason why it is missing, or an empty text."""
    findings = findings_of_fresh_process()
    missing = ", ".join(finding.name for finding in lacking(findings))
    whole = f"this host lacks {missing}" if missing else ""
    return {KERNEL: whole} | {finding.name: finding.why for finding in findings}


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


def _remedies(missing: list[Finding]) -> str:
    """Say each remedy once, with what it is for."""
    names: dict[str, list[str]] = {}
    for finding in missing:
        if finding.remedy == NEEDS_USER_NAMESPACE:
            continue  # that one is missing too, and has a remedy of its own
        names.setdefault(finding.remedy, []).append(finding.name)
    return "; ".join(f"{', '.join(of)}: {advice}" for advice, of in names.items())
