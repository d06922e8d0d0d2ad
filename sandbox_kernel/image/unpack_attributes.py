"""Give files the owner, mode, attributes and time that the tar says, or record what it says."""

from __future__ import annotations

import errno
import os

from sandbox_kernel.image.unpack_headers import Entry
from sandbox_kernel.image.unpack_rules import Owners, refused
from sandbox_kernel.linux.tree_names import CAPABILITY, MODE, OURS, OWNER, SET_ID_BITS

_USER = b"user."
_OVERLAY = b".overlay."
_XATTR_NAME_BYTES = 255
_XATTR_BYTES = 1 << 16


class Attributes:
    """Sets attributes in one of the two ways of `Owners`, and counts what it leaves out."""

    def __init__(self, owners: Owners) -> None:
        self._real = owners is Owners.REAL
        self.dropped = 0

    def check(self, entry: Entry) -> None:
        """Keep of the entry's extended attributes those that a layer may have.

        Raises ImageError for those of overlayfs, which would lie about other layers, and ours.
        """
        kept = {}
        for key, value in entry.xattrs.items():
            if _OVERLAY in key or key.startswith(OURS):
                raise refused(entry.name, f"it carries the attribute {key.decode('latin1')!a}")
            if len(key) > _XATTR_NAME_BYTES or len(value) > _XATTR_BYTES or b"\0" in key:
                raise refused(entry.name, "it carries an attribute that is too long")
            if (key.startswith(_USER) and entry.kind in {b"0", b"5"}) or (
                key == CAPABILITY and self._real and entry.kind == b"0"
            ):
                kept[key] = value
            else:
                self.dropped += 1
        entry.xattrs = kept

    def set_on(self, fd: int, entry: Entry) -> None:
        """Set all of an open file or folder; raises OSError, ImageError."""
        uid, gid, mode = entry.uid, entry.gid, entry.mode
        if self._real:
            if uid or gid:
                os.fchown(fd, uid, gid)
        else:
            if uid or gid:
                os.setxattr(fd, OWNER, b"%d:%d" % (uid, gid))
            if mode & SET_ID_BITS:
                os.setxattr(fd, MODE, b"%o" % mode)
                mode &= ~SET_ID_BITS
        for key, value in entry.xattrs.items():
            try:
                os.setxattr(fd, key, value)
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.E2BIG, errno.EINVAL, errno.ERANGE}:
                    raise
                reason = f"its attribute {key.decode('latin1')!a} cannot be set: "
                raise refused(entry.name, reason + str(error.strerror)) from None
        # After chown(2), which takes set-id bits and capabilities away.
        os.fchmod(fd, mode)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def set_at(self, name: bytes, folder_fd: int, entry: Entry) -> None:
        """Set all of what cannot be opened: a symbolic link or a FIFO; raises OSError.

        Neither can carry attributes of users, so there an owner is not recorded.
        """
        if self._real and (entry.uid or entry.gid):
            os.chown(name, entry.uid, entry.gid, dir_fd=folder_fd, follow_symlinks=False)
        if entry.kind == b"6":  # set-id bits too: nobody can execute it
            os.chmod(name, entry.mode, dir_fd=folder_fd)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(name, ns=times, dir_fd=folder_fd, follow_symlinks=False)
