"""The scratch file system of a session, which holds all that cells write, as a head shows it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sandbox_kernel.errors import SessionLost
from sandbox_kernel.session.guest import Guest
from sandbox_kernel.session.supervisor import RESTART_HINT

FULL_BYTES = 1 << 16
"""Less than this left is full: Linux refuses a write when some pages are still counted as free."""


@dataclass(frozen=True)
class Scratch:
    """How full it is."""

    used_bytes: int
    is_full: bool
    """Whether it has no room for more, or for another file."""


def look(head: Guest) -> Scratch:
    """Look into the root of a guest; raises SessionLost when that is gone."""
    # An overlay answers with the figures of the file system of its upper: the scratch.
    try:
        info = os.statvfs(f"/proc/{head.pid}/root")
    except OSError as error:
        raise SessionLost("the session's head is gone", hint=RESTART_HINT) from error
    used_bytes = (info.f_blocks - info.f_bfree) * info.f_frsize
    left_bytes = info.f_bfree * info.f_frsize
    # Where files are not counted there is no last one.
    return Scratch(used_bytes, left_bytes < FULL_BYTES or 0 == info.f_ffree < info.f_files)
