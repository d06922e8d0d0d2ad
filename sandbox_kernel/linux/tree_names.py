"""How layers look on disk: whiteouts, opaque folders, and owners that an ordinary user records.

A layer is a folder that overlayfs takes as a lower one, mounted with `userxattr`.
"""

from __future__ import annotations

import os
import stat

OPAQUE = b"user.overlay.opaque"
"""Set to `y` on a folder: nothing of the layers below shows in it (kernel, overlayfs.rst)."""
OWNER = b"user.sandbox-kernel.owner"
"""`UID:GID` of the image, where the file belongs to the user who unpacked it."""
MODE = b"user.sandbox-kernel.mode"
"""The mode in octal with the set-id bits that the file was not given."""
OURS = b"user.sandbox-kernel."
CAPABILITY = b"security.capability"
MAX_ID = 0xFFFFFFFE
"""The highest user or group: one more means "leave as it is" to chown(2)."""
SET_ID_BITS = stat.S_ISUID | stat.S_ISGID
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_whiteout(info: os.stat_result) -> bool:
    """Tell whether this is overlayfs's mark of a removed name: a character device 0:0."""
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


def is_opaque(fd: int) -> bool:
    """Tell whether the open folder hides what the layers below have in it."""
    try:
        return os.getxattr(fd, OPAQUE) == b"y"
    except OSError:  # not set, or a file system without such attributes
        return False


def recorded_owner(value: bytes) -> tuple[int, int]:
    """Give user and group of an `OWNER` attribute; raises ValueError."""
    uid, _, gid = value.partition(b":")
    if not (uid.isdigit() and gid.isdigit() and len(uid) <= 10 and len(gid) <= 10):
        raise ValueError(f"{value[:40]!r} is no UID:GID")
    if max(int(uid), int(gid)) > MAX_ID:
        raise ValueError(f"{value[:40]!r} is out of range")
    return int(uid), int(gid)


def recorded_mode(value: bytes, mode: int) -> int:
    """Give the permissions with the recorded set-id bits, if the others are as they were then.

    A program that changed the mode since has dropped these bits, as chmod(2) does.
    """
    try:
        recorded = int(value, 8)
    except ValueError:
        return mode
    return recorded & 0o7777 if recorded & 0o1777 == mode & 0o1777 else mode
