"""User namespaces with the three mappings there can be: a high range, a subordinate one, one id.

The engine writes a high range itself, as root of the host. The other two are an ordinary user's;
they serve here to tell him what else his host would allow.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import libc, probe_acts, probe_child

FIRST_ID = 1 << 30
"""Where the ids of sessions begin on the host; far above those of users and of containers."""
ID_COUNT = 1024

Mapping = Callable[[int], None]
"""Maps the ids of the new user namespace that a process is in."""


def map_high_range(pid: int) -> None:
    """Map 0 and the ids after it to a range that no user has."""
    _write(pid, f"0 {FIRST_ID} {ID_COUNT}\n", f"0 {FIRST_ID} {ID_COUNT}\n")


def map_one(pid: int) -> None:
    """Map 0 to this process' user, which everybody may."""
    Path(f"/proc/{pid}/setgroups").write_text("deny", encoding="ascii")
    _write(pid, f"0 {os.geteuid()} 1\n", f"0 {os.getegid()} 1\n")


def map_subordinate(pid: int) -> None:
    """Map 0 and the ids after it to the user's range in /etc/subuid and /etc/subgid."""
    for tool, table in (("newuidmap", "/etc/subuid"), ("newgidmap", "/etc/subgid")):
        if shutil.which(tool) is None:
            raise HostError(f"there is no {tool}")
        start, count = subordinate_range(_table(table), table)
        argv = [tool, str(pid), "0", str(start), str(min(count, ID_COUNT))]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise HostError(f"{tool} failed: {done.stderr.strip() or done.returncode}")


def subordinate_range(text: str, table: str) -> tuple[int, int]:
    """Give the first range of this user, start and count; raises HostError if there is none."""
    uid = os.geteuid()
    owners = {str(uid)}
    try:
        owners.add(pwd.getpwuid(uid).pw_name)
    except KeyError:
        pass  # a user without a name, as containers have them
    for line in text.splitlines():
        owner, _, rest = line.strip().partition(":")
        start, _, count = rest.partition(":")
        if owner in owners and start.isdigit() and count.isdigit():
            return int(start), int(count)
    raise HostError(f"{table} has no range for {' or '.join(sorted(owners))}")


def _table(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _write(pid: int, uids: str, gids: str) -> None:
    for name, text in (("uid_map", uids), ("gid_map", gids)):
        path = f"/proc/{pid}/{name}"
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, path.replace(str(pid), "PID")) from error
        finally:
            os.close(fd)


def as_root_of(mapping: Mapping, act: probe_child.Act, *, flags: int = 0) -> str:
    """Run an act as root of a new user namespace, and in what else `flags` makes new."""

    def begin() -> str:
        if mapping is not map_one:  # where setgroups is denied, so that no group can be left
            os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        return act()

    return probe_child.call(begin, flags=libc.CLONE_NEWUSER | flags, prepare=mapping)


def idmapped_folder(folder: str) -> str:
    """Show `folder` with its owner as the cell's user, as a session shows the notebook's."""
    libc.unshare(libc.CLONE_NEWNS)
    ready, go = os.pipe()
    pid = libc.clone(libc.CLONE_NEWUSER)
    if pid == 0:
        os.close(go)
        os.read(ready, 1)  # until the parent has taken the namespace, or died
        os._exit(0)
    os.close(ready)
    try:
        line = f"{os.stat(folder).st_uid} {FIRST_ID + 1000} 1\n"
        _write(pid, line, line)
        userns_fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        return probe_acts.idmapped(folder, userns_fd)
    finally:
        os.close(go)
        os.waitpid(pid, 0)
