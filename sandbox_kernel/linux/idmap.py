"""Which ids of the host a session's users are: the map of its outermost user namespace.

Three kinds there are. Root gives a session a `high` range of its own. An ordinary user maps his
`subordinate` ids of /etc/subuid and /etc/subgid by the setuid tools newuidmap and newgidmap; where
that does not work a `single` id is left, his own. In both of his own id stands for CELL_UID, so
that a cell reads and writes the notebook's folder as he does. See user_namespaces(7), subuid(5).

Imports little: it runs in the monitor, whose start users wait for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux.idmap_tables import NEEDED, Range, ranges, read, taken_ids, user_name
from sandbox_kernel.model import CELL_UID

__all__ = ["ID_COUNT", "Extent", "IdMap", "Wanted", "choose", "high", "nested", "ranges", "single"]
__all__ += ["find_subordinate", "subordinate", "tools", "write"]

Extent = tuple[int, int, int]
"""First id inside, first id outside, count: one line of /proc/PID/uid_map."""
ID_COUNT = NEEDED + 1
"""How many ids a session has; those of root, of cells and of heads are in use."""
TOOL_TIMEOUT_S = 10.0
"""newuidmap asks for the user's name, and a directory server may be slow."""

INSTALL_TOOLS = "install them: apt install uidmap, or dnf install shadow-utils"
NO_NEW_PRIVILEGES = (
    "no_new_privs is set, so no setuid program works: take NoNewPrivileges=yes out of the unit "
    "that starts Jupyter, in a container allow privilege escalation"
)


@dataclass(frozen=True)
class Wanted:
    """Which ids a user namespace shall have, by their numbers inside."""

    uid: int = CELL_UID
    """Who stands for an ordinary user himself; mapped in any case, as is the group."""
    gid: int = CELL_UID
    count: int = ID_COUNT
    """The ids from 0 on that there shall be."""


SESSION = Wanted()


@dataclass(frozen=True)
class IdMap:
    """The map of a session's outermost user namespace, as its creator sees the outside."""

    kind: str
    """`high`, `subordinate` or `single`; `nested` for a map inside of one of these."""
    uids: tuple[Extent, ...]
    gids: tuple[Extent, ...]

    @property
    def root(self) -> int:
        """Give the user id of init inside: 0, or the only one there is."""
        return self.uids[0][0] if self.is_alone else 0

    @property
    def is_alone(self) -> bool:
        """Tell whether there is one user id only, which cells and heads then share."""
        return sum(count for _, _, count in self.uids) == 1

    def outside_uid(self, inside: int) -> int:
        """Give the user id of the outside; raises HostError for one that is not mapped."""
        return _outside(self.uids, inside, "user")

    def outside_gid(self, inside: int) -> int:
        """Give the group id of the outside; raises HostError for one that is not mapped."""
        return _outside(self.gids, inside, "group")

    def as_json(self) -> dict[str, Any]:
        """Give the map as lists and numbers."""
        return {"kind": self.kind, "uids": list(self.uids), "gids": list(self.gids)}

    @staticmethod
    def from_json(body: dict[str, Any]) -> IdMap:
        """Take what `as_json` gave, from a process of ours."""
        uids, gids = (
            tuple((int(inside), int(outside), int(count)) for inside, outside, count in body[name])
            for name in ("uids", "gids")
        )
        return IdMap(str(body["kind"]), uids, gids)


def _outside(extents: tuple[Extent, ...], inside: int, what: str) -> int:
    for first, outside, count in extents:
        if first <= inside < first + count:
            return outside + inside - first
    raise HostError(f"{what} id {inside} is not mapped in the session's user namespace")


def high(first_id: int, wanted: Wanted = SESSION) -> IdMap:
    """Map all ids of a session to a range of the host that no user has."""
    uids, gids = (_upwards(first_id, own, wanted.count) for own in (wanted.uid, wanted.gid))
    return IdMap("high", uids, gids)


def _upwards(first_id: int, own: int, count: int) -> tuple[Extent, ...]:
    if own < count:
        return ((0, first_id, count),)
    # The range has no more than `count`, so one beyond takes the place of the last.
    return ((0, first_id, count - 1), (own, first_id + count - 1, 1))


def single(uid: int, gid: int, wanted: Wanted = SESSION) -> IdMap:
    """Map the cell's user to this one, and nobody else."""
    return IdMap("single", ((wanted.uid, uid, 1),), ((wanted.gid, gid, 1),))


def subordinate(
    own: tuple[int, int],
    uid_ranges: tuple[Range, ...],
    gid_ranges: tuple[Range, ...],
    wanted: Wanted = SESSION,
) -> IdMap:
    """Map the cell's user to this one, and the other ids to the ranges in their order.

    `own` are his user and group id. Raises HostError where the ranges are too small.
    """
    uids = _around(wanted.uid, own[0], uid_ranges, wanted.count)
    gids = _around(wanted.gid, own[1], gid_ranges, wanted.count)
    return IdMap("subordinate", uids, gids)


def _around(inside: int, own: int, ranges: tuple[Range, ...], count: int) -> tuple[Extent, ...]:
    # Who has fewer than a build would like has fewer: what needs more then fails by its name.
    total = sum(size for _, size in ranges)
    count = max(ID_COUNT, min(count, total + (1 if inside < count else 0)))
    below = tuple(_spread(0, min(inside, count), ranges, skip=0))
    above = tuple(_spread(inside + 1, count, ranges, skip=inside)) if inside < count else ()
    return (*below, (inside, own, 1), *above)


def _spread(first: int, end: int, ranges: tuple[Range, ...], *, skip: int) -> Iterator[Extent]:
    """Lay the ids inside, from `first` to before `end`, over the ranges without `skip` ids."""
    for start, count in ranges:
        skipped = min(skip, count)
        skip -= skipped
        used = min(count - skipped, end - first)
        if used:
            yield (first, start + skipped, used)
            first += used
    if first < end:
        total = sum(count for _, count in ranges)
        raise HostError(f"{total} subordinate ids are less than {NEEDED}")


def nested(idmap: IdMap) -> IdMap:
    """Give the map of a namespace inside of this one that has the same ids."""
    # Line by line, since no line may reach over two of the map outside (user_namespaces(7)).
    uids, gids = (
        tuple((inside, inside, count) for inside, _, count in extents)
        for extents in (idmap.uids, idmap.gids)
    )
    return IdMap("single" if idmap.is_alone else "nested", uids, gids)


def tools() -> tuple[str, str]:
    """Give the paths of newuidmap and newgidmap; raises HostError where one is missing."""
    found = tuple(_on_path(name) for name in ("newuidmap", "newgidmap"))
    uid_tool, gid_tool = found
    if uid_tool and gid_tool:
        return uid_tool, gid_tool
    missing = "newgidmap" if uid_tool else "newuidmap"
    raise HostError(f"there is no {missing}", hint=INSTALL_TOOLS)


def _on_path(name: str) -> str:
    """Find a program; shutil does it too, but is slow to import."""
    for folder in [*os.environ.get("PATH", "").split(":"), "/usr/bin"]:
        path = f"{folder}/{name}"
        if os.path.isabs(folder) and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return ""


def choose(euid: int, egid: int, wanted: Wanted = SESSION) -> tuple[IdMap, str]:
    """Give the best map of an ordinary user, and why it is not the subordinate one (or nothing).

    Whether the tools do it shows only when `write` runs them.
    """
    try:
        return find_subordinate(euid, egid, wanted), ""
    except HostError as error:
        return single(euid, egid, wanted), str(error)


def find_subordinate(euid: int, egid: int, wanted: Wanted = SESSION) -> IdMap:
    """Give the map to this user's ranges of this host; raises HostError where it has none."""
    tools()
    name = user_name(euid)
    found = []
    for table, people, own in (
        ("/etc/subuid", "/etc/passwd", euid),
        ("/etc/subgid", "/etc/group", egid),
    ):
        taken = {own, *taken_ids(read(people))}
        found.append(ranges(read(table), table=table, uid=euid, name=name, taken=taken))
    return subordinate((euid, egid), found[0], found[1], wanted)


def write(pid: int, idmap: IdMap) -> None:
    """Write the maps of a process in a new user namespace, once for all.

    After an error one of the two may be there: for another map make a new namespace. Raises
    OSError with the path at fault, for subordinate ids HostError with the failing tool's words.
    """
    if idmap.kind == "subordinate":
        uid_tool, gid_tool = tools()
        _run_tool(gid_tool, pid, idmap.gids)
        _run_tool(uid_tool, pid, idmap.uids)
        _verify(pid, idmap)
        return
    if idmap.kind == "single":
        # Without rights over groups a map of them is allowed only to those who give up setgroups.
        _put(f"/proc/{pid}/setgroups", "deny")
    for kind, extents in (("uid", idmap.uids), ("gid", idmap.gids)):
        lines = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in extents)
        _put(f"/proc/{pid}/{kind}_map", lines)


def _put(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(fd)


def _run_tool(tool: str, pid: int, extents: tuple[Extent, ...]) -> None:
    argv = [tool, str(pid), *(str(number) for extent in extents for number in extent)]
    read_fd, write_fd = os.pipe()
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, write_fd, 2),
    ]
    try:
        child = os.posix_spawn(tool, argv, {"LC_ALL": "C"}, file_actions=actions)
    except OSError as error:
        os.close(read_fd)
        raise HostError(f"{tool} cannot be run: {error.strerror}", hint=INSTALL_TOOLS) from error
    finally:
        os.close(write_fd)
    try:
        words = _words(read_fd, child)
    except TimeoutError as error:
        # A setuid program keeps its caller as real user, who may therefore kill it.
        os.kill(child, 9)
        raise HostError(
            f"{tool} does not end after {TOOL_TIMEOUT_S:g} s",
            hint="see whether a directory server of users hangs: id USER",
        ) from error
    finally:
        os.close(read_fd)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        raise HostError(f"{tool} failed: {words or f'status {status}'}", hint=_why(tool))


def _words(fd: int, child: int) -> str:
    """Read what a tool writes in one line, and wait until it ends; raises TimeoutError."""
    import select  # noqa: PLC0415 - of use to ordinary users only
    import time  # noqa: PLC0415 - as above

    deadline_s = time.monotonic() + TOOL_TIMEOUT_S
    pidfd = os.pidfd_open(child)
    text = b""
    try:
        for watched in (fd, pidfd):
            poll = select.poll()
            poll.register(watched, select.POLLIN)
            while (left_s := deadline_s - time.monotonic()) > 0 and poll.poll(left_s * 1000):
                chunk = os.read(fd, 4096) if watched == fd else b""
                text = (text + chunk)[-1024:]
                if not chunk:
                    break
            else:
                raise TimeoutError
    finally:
        os.close(pidfd)
    return " ".join(text.decode("utf-8", "replace").split())


def _why(tool: str) -> str:
    """Give the remedy for a setuid program that did not get its rights, else where to look."""
    if "\nNoNewPrivs:\t1\n" in read("/proc/self/status"):
        return NO_NEW_PRIVILEGES
    if os.statvfs(tool).f_flag & os.ST_NOSUID:
        return f"{tool} lies on a file system that is mounted nosuid: mount it without"
    return f"see that {tool} is setuid root (or has cap_setuid): install package uidmap anew"


def _verify(pid: int, idmap: IdMap) -> None:
    """Read the maps back: a tool of that name might have said yes and done nothing."""
    for kind, extents in (("uid", idmap.uids), ("gid", idmap.gids)):
        path = f"/proc/{pid}/{kind}_map"
        lines = [tuple(int(field) for field in line.split()) for line in read(path).splitlines()]
        if sorted(lines) != sorted(extents):
            raise HostError(
                f"new{kind}map wrote another map than it was told to", hint=INSTALL_TOOLS
            )
