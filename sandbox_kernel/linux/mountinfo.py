"""Parse /proc/self/mountinfo and /proc/self/cgroup: where this process' own cgroups are.

Pure: text in, values out. See proc_pid_mountinfo(5) and cgroups(7).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DELETED = " (deleted)"
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One mount: the directory `root` of the file system is seen at `mount_point`.

    `source` is the device, or whatever the file system type says instead.
    """

    root: str
    mount_point: str
    options: frozenset[str]
    fs_type: str
    source: str
    super_options: frozenset[str]


@dataclass(frozen=True)
class Hierarchy:
    """A cgroup hierarchy mounted at `mount_point`, and this process' own group in it.

    `controllers` are those bound to a v1 hierarchy; empty for the v2 tree, whose
    `cgroup.controllers` says what is on offer in which group.
    """

    own: str
    controllers: frozenset[str]
    unified: bool
    mount_point: str


def parse_mounts(text: str) -> list[Mount]:
    """Parse mountinfo; lines that are not understood are left out."""
    mounts = []
    for line in text.splitlines():
        left, dash, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if not dash or len(fields) < 6 or len(tail) < 3:
            continue
        mounts.append(
            Mount(
                root=_unescape(fields[3]),
                mount_point=_unescape(fields[4]),
                options=frozenset(fields[5].split(",")),
                fs_type=tail[0],
                source=_unescape(tail[1]),
                super_options=frozenset(tail[2].split(",")),
            )
        )
    return mounts


def mount_of(path: str, mounts: list[Mount]) -> Mount | None:
    """Give the mount that an absolute path without links is on."""
    found = None
    for mount in mounts:
        point = mount.mount_point.rstrip("/")
        inside = path == point or path.startswith(point + "/")
        # Of several at the same place the last one covers the others.
        if inside and (found is None or len(point) >= len(found.mount_point.rstrip("/"))):
            found = mount
    return found


def parse_own(text: str) -> dict[frozenset[str], str]:
    """Parse /proc/self/cgroup: the own path by the hierarchy's controllers, v2 is the empty set."""
    own = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and number.isdigit():
            own[frozenset(filter(None, controllers.split(",")))] = path
    return own


def find_hierarchies(mounts: list[Mount], own: dict[frozenset[str], str]) -> list[Hierarchy]:
    """Combine both: every hierarchy in which the own group can be reached; the v2 tree first.

    A group outside of every mounted part (a cgroup namespace shows it as `/..`), or already
    removed, cannot be reached.
    """
    found = []
    for controllers, path in sorted(own.items(), key=lambda item: sorted(item[0])):
        place = _place(path, _mounts_of(controllers, mounts))
        if place is not None:
            group, point = place
            hierarchy = Hierarchy(group, controllers, unified=not controllers, mount_point=point)
            found.append(hierarchy)
    return found


def _mounts_of(controllers: frozenset[str], mounts: list[Mount]) -> list[Mount]:
    """Give the mounts of one hierarchy, by type for v2 and by super block options for v1."""
    if not controllers:
        return [m for m in mounts if m.fs_type == "cgroup2"]
    return [m for m in mounts if m.fs_type == "cgroup" and controllers <= m.super_options]


def _place(path: str, mounts: list[Mount]) -> tuple[str, str] | None:
    """Find where group `path` is seen, and the mount; writable ones go before read-only ones."""
    if path.endswith(DELETED) or path.startswith("/.."):
        return None
    for mount in sorted(mounts, key=lambda m: "ro" in m.options):
        root = mount.root.rstrip("/")
        if path == root or path.startswith(root + "/"):
            own = mount.mount_point + path[len(root) :]
            return own.rstrip("/"), mount.mount_point.rstrip("/")
    return None


def _unescape(field: str) -> str:
    r"""Undo the kernel's octal escapes (`\040` is a blank)."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)
