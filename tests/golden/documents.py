"""Documents of `doctor --json` that are kept, one for each kind of host."""

from __future__ import annotations

import getpass
import json
import os
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "doctor"

_VOLATILE = (
    (re.compile(r"sandbox-kernel-\d+-\d+-"), "sandbox-kernel-PID-TICKS-"),
    (re.compile(r"sandbox-kernel-\d+-[0-9a-f]{8}\.scope"), "sandbox-kernel-PID-ID.scope"),
    # The own group's path differs between hosts, and between controllers.
    (
        re.compile(r"/sys/fs/cgroup(?:/[^/\s:]+)*/(?=sandbox-kernel-PID|cgroup\.)"),
        "/sys/fs/cgroup/.../",
    ),
    (re.compile(r"(session-|user-|user@|run-r?)[0-9a-f]+(?=\.)"), r"\1N"),
    (re.compile(r"\[\d+(?:, \d+)*\]"), "[PID]"),
    (re.compile(r"(?<=has no range for ).+"), "USER"),
    (re.compile(r"(?<=echo )[\w-]+:\d+:"), "USER:FIRST:"),
    (re.compile(r"/run/user/\d+"), "/run/user/UID"),
    (re.compile(r"(?<=enable-linger )\d+"), "UID"),
)


def normalised(document: dict[str, Any]) -> dict[str, Any]:
    """Replace what is otherwise on each run: pids, names of groups, users, numbers of sessions."""
    found = [
        {name: _normal(value) if isinstance(value, str) else value for name, value in one.items()}
        for one in document["findings"]
    ]
    return {**document, "ids_why": _normal(document["ids_why"]), "findings": found}


def _normal(text: str) -> str:
    for pattern, replacement in _VOLATILE:
        text = pattern.sub(replacement, text)
    return text


def comparable(document: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Leave out how optional things stand that another Linux of the same kind may have or not.

    Where both documents lack such a thing, what they say of it still counts.
    """
    theirs = {one["name"]: one["available"] for one in other["findings"]}
    found = [
        {"name": one["name"]}
        if _is_of_the_machine(one) and theirs.get(one["name"]) is not one["available"]
        else one
        for one in document["findings"]
    ]
    return {**document, "findings": found}


def _is_of_the_machine(finding: dict[str, Any]) -> bool:
    return not finding["required"] and finding["name"] != "subordinate_ids"


def layout_of_host() -> str:
    """Tell the layout of cgroups, otherwise than doctor does."""
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        return "v2"
    return "hybrid" if os.path.isdir("/sys/fs/cgroup/unified") else "v1"


def kind_of_host() -> str:
    """Name the kind of host that this is for this user, otherwise than doctor does."""
    layout, uid = layout_of_host(), os.geteuid()
    if uid == 0:
        return f"{layout}-root"
    owners = {line.partition(":")[0] for line in _lines("/etc/subuid")}
    kind = "ranged" if owners & {str(uid), getpass.getuser()} else "plain"
    slices = f"/sys/fs/cgroup/user.slice/user-{uid}.slice/user@{uid}.service"
    delegated = " ".join(_lines(f"{slices}/cgroup.controllers")).split()
    no_cpu = "-no-cpu" if layout == "v2" and "cpu" not in delegated else ""
    return f"{layout}-{kind}{no_cpu}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text("utf-8").splitlines()
    except OSError:
        return []


def path_of(kind: str) -> Path:
    """Give the file of a kind."""
    return FOLDER / f"{kind}.json"


def read(kind: str) -> dict[str, Any]:
    """Give the document that is kept."""
    document: dict[str, Any] = json.loads(path_of(kind).read_text("utf-8"))
    return document


def write(kind: str, document: dict[str, Any]) -> None:
    """Keep a document."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    path_of(kind).write_text(text + "\n", "utf-8")
