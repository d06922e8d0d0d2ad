"""The process that acts for subordinate ids: it gives files to them, or removes theirs.

It enters a user namespace, waits for its ids, and is root there over the files of these ids only.
Folders of layers do not change, which is why paths below them are safe here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.owned_copy import copy_owned
from sandbox_kernel.image.owned_space import GO, READY
from sandbox_kernel.image.store_files import remove_tree
from sandbox_kernel.linux import libc

_KEPT = libc.cap_mask((libc.CAP_CHOWN, libc.CAP_DAC_OVERRIDE, libc.CAP_FOWNER, libc.CAP_FSETID))


def main() -> None:
    """Do what the JSON object in `argv[1]` says, and answer with one on fd 1."""
    order = json.loads(sys.argv[1])
    try:
        _enter()
        answer = _perform(order)
    except ImageError as error:
        answer = {"error": error.message}
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        answer = {"error": f"{where}{error.strerror}"}
    data = json.dumps(answer).encode()
    while data:
        data = data[os.write(1, data) :]


def _enter() -> None:
    """Become root of a user namespace whose ids the parent writes; it has no other rights."""
    libc.unshare(libc.CLONE_NEWUSER)
    os.write(1, READY)
    if os.read(0, 1) != GO:  # the parent could not, or is dead
        os._exit(1)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    libc.capset(_KEPT, _KEPT, 0)
    libc.set_no_new_privs()
    os.umask(0)


def _perform(order: dict[str, Any]) -> dict[str, Any]:
    if order["do"] == "copy":
        counted = copy_owned(order["source_fd"], order["target_fd"], _has_id)
        return {"entries": counted.entries, "size_bytes": counted.size_bytes}
    if order["do"] == "remove":
        os.fchdir(order["above_fd"])
        os.chmod(order["name"], 0o700)
        remove_tree(Path(order["name"]))
    return {}


def _has_id(uid: int, gid: int) -> bool:
    """Tell whether both are ids of this namespace."""
    return _in_map(uid, "uid") and _in_map(gid, "gid")


def _in_map(number: int, kind: str) -> bool:
    lines = Path(f"/proc/self/{kind}_map").read_text("ascii").splitlines()
    fields = (tuple(map(int, line.split())) for line in lines)
    return any(first <= number < first + count for first, _, count in fields)
