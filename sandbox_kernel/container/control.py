"""The control channel between the kernel and init: one JSON object a packet, fds beside it.

Both ends are ours, yet init lives next to hostile code, so the kernel checks what it reads.
A SEQPACKET socket keeps the boundaries and tells when the other end is gone: an empty packet.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from typing import Any

MAX_PACKET_BYTES = 160 * 1024
MAX_FDS = 16
_CREDENTIALS = struct.Struct("3i")
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)


class Packet:
    """One message: the object, the descriptors that came along, and the sender's pid.

    `pid` is in the receiver's pid namespace, and None unless the socket has SO_PASSCRED.
    """

    def __init__(self, body: dict[str, Any], fds: list[int], pid: int | None) -> None:
        self.body = body
        self.fds = fds
        self.pid = pid

    @property
    def op(self) -> str:
        """The verb of the message."""
        return str(self.body.get("op", ""))

    def take_fds(self) -> list[int]:
        """Give the descriptors, which are the caller's from now on."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


def pair() -> tuple[socket.socket, socket.socket]:
    """Give a connected pair whose first end learns the pid of who sends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_PACKET_BYTES)
    return ours, theirs


def send(sock: socket.socket, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send one message; raises OSError when the other end is gone."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(body).encode()], ancillary)


def receive(sock: socket.socket) -> Packet | None:
    """Give the next message, or None when the other end is gone.

    Raises BlockingIOError on a non-blocking socket without a message, ValueError on bytes that
    are no JSON object.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(
            MAX_PACKET_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:
        return None
    packet = Packet({}, *_unpack(ancillary))
    if not data:
        packet.close()
        return None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if flags & socket.MSG_TRUNC or not isinstance(body, dict):
        packet.close()
        raise ValueError("a packet on the control channel is no JSON object")
    packet.body = body
    return packet


def _unpack(ancillary: list[tuple[int, int, bytes]]) -> tuple[list[int], int | None]:
    fds: list[int] = []
    pid = None
    for level, kind, data in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
            fds.extend(received)
        elif kind == socket.SCM_CREDENTIALS and len(data) == _CREDENTIALS.size:
            pid = _CREDENTIALS.unpack(data)[0]
    return fds, pid
