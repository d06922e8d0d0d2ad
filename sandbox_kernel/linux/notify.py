"""Answer system calls that a filter holds (seccomp_unotify(2)).

`libc.seccomp_load` gives the listener. Runs on Python 3.9, as `libc` does, which exports this too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import struct
from typing import NamedTuple

# _IOC numbers of linux/seccomp.h; the structures have 80, 24 and 8 bytes.
_NOTIF_RECV = 0xC0502100
_NOTIF_SEND = 0xC0182101
_NOTIF_ID_VALID = 0x40082102
_NOTIF_SET_FLAGS = 0x40082104
_NOTIF_SYNC_WAKE_UP = 1
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_RESPONSE_CONTINUE = 1


class Notification(NamedTuple):
    """A system call that waits for an answer; `pid` is 0 or as the listener's reader sees it.

    Arguments are the raw 64-bit registers; what they point to may change at any time.
    """

    id: int
    pid: int
    number: int
    args: tuple[int, ...]


def notify_synchronously(listener_fd: int) -> None:
    """Have the kernel wake the other side on the same CPU (Linux 6.6); no matter if it cannot."""
    with contextlib.suppress(OSError):  # EINVAL or ENOTTY before
        fcntl.ioctl(listener_fd, _NOTIF_SET_FLAGS, _NOTIF_SYNC_WAKE_UP)


def notify_receive(listener_fd: int) -> Notification | None:
    """Take the next system call that waits; blocks, so call it when the fd polls readable.

    Return None if the caller died or a signal came in between, which is normal.
    """
    buffer = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener_fd, _NOTIF_RECV, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    id_, pid, _flags, number, _arch, _ip, *args = _NOTIFICATION.unpack(buffer)
    return Notification(id_, pid, number, tuple(args))


def notify_respond(
    listener_fd: int, notification_id: int, *, error: int = 0, proceed: bool = False
) -> None:
    """Answer a system call: let it `proceed`, or make it return `error` (0: success, undone).

    A caller that died meanwhile (ENOENT) is ignored.
    """
    flags = _RESPONSE_CONTINUE if proceed else 0
    response = bytearray(_RESPONSE.pack(notification_id, 0, 0 if proceed else -error, flags))
    try:
        fcntl.ioctl(listener_fd, _NOTIF_SEND, response)
    except OSError as failure:
        if failure.errno != errno.ENOENT:
            raise


def notify_valid(listener_fd: int, notification_id: int) -> bool:
    """Tell whether the caller still waits, hence whether its pid still means it."""
    try:
        fcntl.ioctl(listener_fd, _NOTIF_ID_VALID, struct.pack("=Q", notification_id))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True
