"""Run jobs in the guest: the host's end of a virtio port. The other end is guest/agent.py."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PORTS = 4
"""How many jobs the guest runs at once: one a port."""
CHUNK_BYTES = 1 << 16
Taker = Callable[[str, bytes], None]
"""Takes what a job writes: the name of the stream, and bytes."""
GRACE_S = 30.0
"""How much longer than its own time-out a job's answer is waited for."""


class GuestError(Exception):
    """The guest does not answer, is not there, or has crashed."""


@dataclass(frozen=True)
class Job:
    """A program for a user's login session in the guest."""

    user: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = ""
    stdin: bytes = b""
    timeout_s: float = 600.0


@dataclass
class Ended:
    """How a job ended, and what it wrote if nobody took it."""

    status: int = 0
    timed_out: bool = False
    stdout: bytes = b""
    stderr: bytes = b""

    def take(self, stream: str, data: bytes) -> None:
        """Keep what a stream gave."""
        if stream == "stdout":
            self.stdout += data
        else:
            self.stderr += data

    @property
    def text(self) -> str:
        """Give both streams as text, for a message."""
        return (self.stdout + self.stderr).decode("utf-8", "replace")


def run(folder: Path, job: Job, take: Taker | None = None) -> Ended:
    """Run a job over a free port of the guest in `folder`; raises GuestError."""
    ended = Ended()
    take = take or ended.take
    with _free_port(folder) as path, contextlib.closing(_connect(path)) as link:
        key = secrets.token_hex(8)
        request = {**asdict(job), "id": key, "stdin": base64.b64encode(job.stdin).decode()}
        deadline_s = time.monotonic() + job.timeout_s + GRACE_S
        link.settimeout(job.timeout_s + GRACE_S)
        # The empty line ends what a client that was killed may have begun.
        with _plain_errors():
            link.sendall(b"\n" + json.dumps(request).encode() + b"\n")
        for answer in _answers(link, key, deadline_s):
            if "stream" in answer:
                take(answer["stream"], base64.b64decode(answer["data"]))
            else:
                ended.status, ended.timed_out = answer["status"], answer["timed_out"]
                return ended
    raise GuestError("the guest ended while it ran a job")


def _answers(link: socket.socket, key: str, deadline_s: float) -> Iterator[dict[str, Any]]:
    pending = b""
    while True:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise GuestError("the guest does not answer in time")
        link.settimeout(left_s)
        with _plain_errors():
            data = link.recv(CHUNK_BYTES)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            # What is left of the answer to a client before this one may be cut.
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if answer.get("id") == key:
                    yield answer


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise GuestError("the guest does not answer in time") from error
    except OSError as error:
        raise GuestError(f"the guest is gone: {error}") from error


@contextlib.contextmanager
def _free_port(folder: Path) -> Iterator[Path]:
    """Take a port that no other client holds; the last is waited for if all are taken."""
    for number in range(PORTS):
        with (folder / f"port{number}.lock").open("w") as lock:
            last = number == PORTS - 1
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if last else fcntl.LOCK_NB))
            except BlockingIOError:
                continue
            yield folder / f"port{number}"
            return


def _connect(path: Path) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(os.fspath(path))
    except OSError as error:
        link.close()
        raise GuestError(f"no guest listens at {path}: {error.strerror}") from error
    return link
