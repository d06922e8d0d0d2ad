"""Exec the monitor of a session or of a job, and tell it what to start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_kernel.container import control
from sandbox_kernel.container.failure import REMEDIES
from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import idclaim

_PROGRAM = (
    "import sys; sys.path.insert(0, {root!r}); "
    "from sandbox_kernel.container.monitor import main; main({fd})"
)


@dataclass(frozen=True)
class Begun:
    """A monitor as it starts, and the caller's end of the control channel to init."""

    monitor: subprocess.Popen[bytes]
    control: socket.socket


def begin(body: dict[str, Any], fds: Sequence[int], *, held: Sequence[int] = ()) -> Begun:
    """Exec the monitor with a start message; returns at once.

    `fds` go to init; `held` stay open as long as the monitor lives, as the lease of an image does.
    Raises HostError where it cannot be started, and where root has no ids for it.
    """
    claims: list[int] = []
    ours, theirs = control.pair()
    try:
        if os.geteuid() == 0:
            claimed = idclaim.claim(body["id_count"])
            body |= {"first_id": claimed.first_id, "id_count": claimed.size}
            claims.append(claimed.fd)
        root = str(Path(__file__).resolve().parents[2])
        monitor = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM.format(root=root, fd=theirs.fileno())],
            pass_fds=(theirs.fileno(), *claims, *held),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # A group of its own: Jupyter kills the kernel's whole group, and the monitor cleans up.
            start_new_session=True,
            env={"LANG": "C.UTF-8"},
        )
        control.send(ours, body, tuple(fds))
    except OSError as error:
        ours.close()
        raise HostError(
            f"the monitor of a container cannot be started: {error.strerror}",
            hint=REMEDIES.get(error.errno or 0, "see `sandbox-kernel doctor`"),
        ) from error
    except BaseException:  # whatever it is, nobody has the socket yet
        ours.close()
        raise
    finally:
        theirs.close()
        for fd in claims:
            os.close(fd)
    return Begun(monitor, ours)
