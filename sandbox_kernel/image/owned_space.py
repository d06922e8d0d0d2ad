"""Work that needs the ids of an ordinary user's subordinate ranges: done by a child that has them.

In a user namespace with these ids he is root over the files that belong to them; outside of it he
may neither give a file to one of them nor empty a folder of theirs. The child is exec'ed, since
the callers have threads, and enters a namespace of its own, for which this process has newuidmap
write the maps.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from sandbox_kernel.errors import HostError, ImageError
from sandbox_kernel.image.child import started
from sandbox_kernel.linux import idmap
from sandbox_kernel.linux.idmap import IdMap, Wanted
from sandbox_kernel.linux.tree_names import FOLDER_FLAGS

READY = b"r"
"""The child is in its namespace and waits for the maps; an error begins otherwise."""
GO = b"g"
_ALL = Wanted(0, 0, 1 << 32)
"""The user himself is root, and every id of his ranges has a number."""
_CHILD = "sandbox_kernel.image.owned_child"


def remove_mapped(path: Path, ids: IdMap | None = None) -> None:
    """Remove a folder that holds files of subordinate ids; raises ImageError where it cannot."""
    try:
        if ids is None:
            ids = idmap.find_subordinate(os.geteuid(), os.getegid(), _ALL)
        above_fd = os.open(path.parent, FOLDER_FLAGS)
        try:
            perform({"do": "remove", "above_fd": above_fd, "name": path.name}, ids, above_fd)
        finally:
            os.close(above_fd)
    except (HostError, ImageError) as error:
        raise ImageError(
            f"{path} holds files of other ids, and cannot be removed: {error.message}",
            hint=f"{error.hint or 'see /etc/subuid and /etc/subgid'}; or as root: rm -r {path}",
        ) from error


def perform(order: dict[str, Any], ids: IdMap, *fds: int) -> dict[str, Any]:
    """Have a child with these ids do one thing, with the descriptors that the order names.

    Gives its answer. Raises ImageError, also where the child cannot be started or get its ids.
    """
    with started(_CHILD, order, fds) as child:
        answer = _converse(child, ids)
    if "error" in answer:
        raise ImageError(answer["error"])
    return answer


def _converse(child: subprocess.Popen[bytes], ids: IdMap) -> dict[str, Any]:
    assert child.stdin is not None  # noqa: S101 - it was started with pipes
    assert child.stdout is not None  # noqa: S101
    assert child.stderr is not None  # noqa: S101
    first = child.stdout.read(1)
    if first == READY:
        try:
            idmap.write(child.pid, ids)
        except HostError as error:
            raise ImageError(error.message, hint=error.hint) from error
        except OSError as error:
            raise ImageError(f"{error.filename} cannot be written: {error.strerror}") from error
        os.write(child.stdin.fileno(), GO)
        first = b""
    said = first + child.stdout.read()
    try:
        answer: dict[str, Any] = json.loads(said)
    except ValueError:
        words = child.stderr.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ImageError(
            f"the process that acts for subordinate ids ended: {words[:500]}"
        ) from None
    return answer
