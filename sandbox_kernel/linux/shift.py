"""Show files of the host under other ids: a mount through the map of a user namespace.

See mount_setattr(2), ID-mapped mounts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sandbox_kernel.linux import idmap, libc
from sandbox_kernel.linux.idmap import Extent, IdMap


@contextmanager
def shift(uids: tuple[Extent, ...], gids: tuple[Extent, ...]) -> Iterator[int]:
    """Give a user namespace with this map, as a descriptor; raises OSError, for ordinary users."""
    ready, go = os.pipe()
    pid = libc.clone(libc.CLONE_NEWUSER)
    if pid == 0:
        os.close(go)
        os.read(ready, 1)  # until the parent has taken the namespace, or died
        os._exit(0)
    os.close(ready)
    try:
        idmap.write(pid, IdMap("high", uids, gids))
        userns_fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(go)
        os.waitpid(pid, 0)
    try:
        yield userns_fd
    finally:
        os.close(userns_fd)


def show_through(tree_fd: int, userns_fd: int, *, below: bool) -> None:
    """Show a detached clone through such a map, with `below` also the mounts inside of it.

    Raises OSError (EINVAL) for a file system that cannot do it.
    """
    libc.mount_setattr(
        "",
        dir_fd=tree_fd,
        flags=libc.AT_EMPTY_PATH | (libc.AT_RECURSIVE if below else 0),
        attr_set=libc.MOUNT_ATTR_IDMAP,
        userns_fd=userns_fd,
    )
