"""Run one try in a process of its own, so that nothing of it stays: no namespace, mount or filter.

The process is forked without hooks and answers by one JSON line on a pipe, so the caller should
have one thread (`probe.findings_of_fresh_process` is for those that have more).
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import NoReturn

from sandbox_kernel.errors import HostError, SandboxError
from sandbox_kernel.linux import libc

TIMEOUT_S = 15.0
"""For one try; a machine under load takes milliseconds where an idle one takes microseconds."""

Act = Callable[[], str]
"""Does the thing and gives a text, empty for most; OSError or HostError where it cannot."""


def call(act: Act, *, flags: int = 0, prepare: Callable[[int], None] | None = None) -> str:
    """Run `act` in a child, in new namespaces where `flags` (CLONE_NEW*) says so.

    `prepare` gets the child's pid before the act begins; its errors are the caller's. Gives what
    the act gives, and raises what it raises: OSError (errno 0 where the child died), HostError.
    """
    answer_fd, write_fd = os.pipe()
    wait_fd, go_fd = os.pipe()
    pid = libc.clone(flags) if flags else libc.fork()
    if pid == 0:
        os.close(go_fd)
        os.close(answer_fd)
        _become(act, wait_fd, write_fd)
    os.close(write_fd)
    os.close(wait_fd)
    try:
        if prepare is not None:
            prepare(pid)
        os.write(go_fd, b"g")
        answer = _read(answer_fd)
    finally:
        os.close(go_fd)
        os.close(answer_fd)
        _end(pid)
    return _understand(answer)


def _become(act: Act, wait_fd: int, write_fd: int) -> NoReturn:
    """Wait for the word, act, answer, and never return to the caller's stack."""
    try:
        libc.set_parent_death_signal(signal.SIGKILL)
        if os.read(wait_fd, 1):
            os.write(write_fd, json.dumps(_outcome(act)).encode())
    finally:  # whatever was raised: this process must not go on as its parent
        os._exit(1)


def _outcome(act: Act) -> dict[str, str | int]:
    """Give what the act gave, or how it failed."""
    try:
        return {"value": act()}
    except OSError as error:
        return {"errno": error.errno or 0, "text": _worded(error)}
    except SandboxError as error:
        return {"message": error.message, "hint": error.hint}


def _worded(error: OSError) -> str:
    text = str(error.strerror or error)
    return f"{text} ({error.filename})" if error.filename else text


def _read(fd: int) -> bytes:
    """Read to the end of the pipe; raises TimeoutError."""
    deadline_s = time.monotonic() + TIMEOUT_S
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    chunks: list[bytes] = []
    while True:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise TimeoutError(0, f"no end after {TIMEOUT_S:g} s")
        data = os.read(fd, 65536)
        if not data:
            return b"".join(chunks)
        chunks.append(data)


def _end(pid: int) -> None:
    """Kill what may be left, and reap."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ChildProcessError, ProcessLookupError):
        pass  # SIGCHLD is ignored here, and the child was reaped at once


def _understand(answer: bytes) -> str:
    if not answer:
        raise OSError(0, "the process that tried it died")
    outcome = json.loads(answer)
    if "message" in outcome:
        raise HostError(outcome["message"], hint=outcome["hint"])
    if "text" in outcome:
        raise OSError(outcome["errno"], outcome["text"])
    return str(outcome["value"])
