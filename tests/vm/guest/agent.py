"""Run the jobs that come over one virtio port, each in a login session of its user.

Both sides speak JSON, one object a line, bytes in base64. The host sends a job:
  {"id", "user", "argv", "env", "cwd", "stdin", "timeout_s"}
and is answered by any number of {"id", "stream": "stdout" or "stderr", "data"}, and at last by one
{"id", "status", "timed_out"}. A new job ends the one before, and so does a host that leaves.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import selectors
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 16
LOOK_AGAIN_S = 1.0
CANNOT_RUN = 125

Request = dict[str, Any]


class HostLeft(Exception):
    """Nobody holds the other end of the port."""


class NewerJob(Exception):
    """The host has sent another job; this one ends."""


class Port:
    """The guest's end of a virtio port."""

    def __init__(self, path: str) -> None:
        # A blocking write to a port whose host has left would wait until one comes back.
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._pending = b""
        self._requests: list[Request] = []
        # The driver sends SIGIO when a host comes or leaves.
        signal.signal(signal.SIGIO, lambda *_: None)
        fcntl.fcntl(self.fd, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_ASYNC)

    def wait_for_host(self) -> None:
        """Wait until somebody holds the other end, and forget what was said before."""
        self._pending = b""
        self._requests.clear()
        poll = select.poll()
        poll.register(self.fd, 0)
        # Blocked, the signal is kept for sigtimedwait if it comes between the look and the wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
        while poll.poll(0):
            signal.sigtimedwait({signal.SIGIO}, LOOK_AGAIN_S)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO})

    def read(self) -> None:
        """Take in what the host has sent; raises HostLeft."""
        try:
            data = os.read(self.fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise HostLeft
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            # What a host had begun to say when it left is not JSON.
            with contextlib.suppress(ValueError):
                self._requests.append(json.loads(line))

    @property
    def has_request(self) -> bool:
        """Tell whether a job waits."""
        return bool(self._requests)

    def request(self) -> Request:
        """Wait for a job; of several the last, whose host still listens. Raises HostLeft."""
        while not self._requests:
            select.select([self.fd], [], [])
            self.read()
        last = self._requests[-1]
        self._requests.clear()
        return last

    def write(self, message: dict[str, Any]) -> None:
        """Send one message; raises HostLeft."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        while data:
            if any(mask & select.POLLHUP for _, mask in poll.poll()):
                raise HostLeft
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(self.fd, data) :]


class Job:
    """One program in a login session."""

    def __init__(self, port: Port, request: Request) -> None:
        self.id = request["id"]
        self._port = port
        words = [f"{name}={value}" for name, value in request["env"].items()]
        command = "exec " + shlex.join(["env", "--", *words, *request["argv"]])
        if request["cwd"]:
            command = f"cd {shlex.quote(request['cwd'])} && {command}"
        with os.fdopen(os.memfd_create("stdin"), "w+b") as stdin:
            stdin.write(base64.b64decode(request["stdin"]))
            stdin.seek(0)
            # su asks PAM, and PAM logind, so this is a session like that of any other login.
            self._process = subprocess.Popen(
                ["su", "--login", request["user"], "--command", command],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
            )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._pidfd = os.pidfd_open(self._process.pid)
        self._streams = {
            self._process.stdout.fileno(): "stdout",
            self._process.stderr.fileno(): "stderr",
        }
        self._deadline_s: float = time.monotonic() + request["timeout_s"]
        self.timed_out = False

    def serve(self) -> None:
        """Pass on what it writes until it has ended; raises HostLeft, NewerJob."""
        with selectors.DefaultSelector() as selector:
            for fd in (self._port.fd, self._pidfd, *self._streams):
                selector.register(fd, selectors.EVENT_READ)
            ended = False
            while not ended:
                for key, _ in selector.select(self._patience_s()):
                    if key.fd == self._port.fd:
                        self._listen()
                    elif key.fd == self._pidfd:
                        ended = True
                    elif not self._forward(key.fd):
                        selector.unregister(key.fd)
        # What is in the pipes now is the job's; what a daemon of it may write later is not.
        for fd in self._streams:
            os.set_blocking(fd, False)
            while self._forward(fd):
                pass

    def _patience_s(self) -> float:
        """Give the time that is left; past it, kill."""
        left_s = self._deadline_s - time.monotonic()
        if left_s > 0:
            return left_s
        self.timed_out = True
        self.kill()
        return LOOK_AGAIN_S

    def _listen(self) -> None:
        self._port.read()
        if self._port.has_request:
            raise NewerJob

    def _forward(self, fd: int) -> bool:
        try:
            data = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            return False
        if data:
            text = base64.b64encode(data).decode()
            self._port.write({"id": self.id, "stream": self._streams[fd], "data": text})
        return bool(data)

    def kill(self) -> None:
        """End the session with all that runs in it."""
        with contextlib.suppress(OSError):
            path = Path(f"/proc/{self._process.pid}/cgroup").read_text().split("::", 1)[1].strip()
            if path.startswith("/user.slice/"):
                Path(f"/sys/fs/cgroup{path}/cgroup.kill").write_text("1")
        self._process.kill()

    def close(self) -> int:
        """End it if it has not ended; give the exit status as a shell would."""
        if self._process.poll() is None:
            self.kill()
        status = self._process.wait()
        os.close(self._pidfd)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        return status if status >= 0 else 128 - status


def run(port: Port, request: Request) -> None:
    """Run one job and answer; raises HostLeft."""
    try:
        job = Job(port, request)
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        text = base64.b64encode(f"agent: no job can be made of this: {error!r}\n".encode()).decode()
        port.write({"id": request.get("id"), "stream": "stderr", "data": text})
        port.write({"id": request.get("id"), "status": CANNOT_RUN, "timed_out": False})
        return
    try:
        job.serve()
    except BaseException:
        job.close()
        raise
    port.write({"id": job.id, "status": job.close(), "timed_out": job.timed_out})


def main() -> None:
    """Serve one host after the other."""
    port = Port(sys.argv[1])
    while True:
        port.wait_for_host()
        with contextlib.suppress(HostLeft):
            while True:
                with contextlib.suppress(NewerJob):
                    run(port, port.request())


if __name__ == "__main__":
    main()
