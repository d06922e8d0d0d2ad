"""Run one program in a container, with hard limits, and take in what it wrote as a layer.

This is how RUN runs, and how an image is asked about its Python. The container is of the same make
as a cell's: `container.job` is the inside, this the outside.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sandbox_kernel.container import control
from sandbox_kernel.container.begin import begin
from sandbox_kernel.container.job import Program
from sandbox_kernel.errors import HostError, LaunchError
from sandbox_kernel.image import host
from sandbox_kernel.linux.cgroup import Cgroup, CgroupTree, session_name
from sandbox_kernel.linux.cgroup_group import CgroupUsage
from sandbox_kernel.model import Bind, Image, Layers

BUILD_IDS = 65536
"""Images name users up to nobody, 65534."""
END_TIMEOUT_S = 60.0
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - a path inside the container
_FOLDERS = (
    ("/dev", 0o755, 0, 0),
    ("/dev/pts", 0o755, 0, 0),
    (SHARED_MEMORY, 0o1777, 0, 0),
    ("/proc", 0o555, 0, 0),
)

Output = Callable[[str, bytes], None]
"""Takes the name of a stream, `stdout` or `stderr`, and what was written to it."""
TakeLayer = Callable[[BinaryIO], None]
"""Reads a tar to its end, in a thread of its own."""


@dataclass(frozen=True)
class JobLimits:
    """What one step may use; all are hard limits, None for one that is waived."""

    memory_bytes: int | None = 2 << 30
    """Memory of its processes; what it writes comes on top, since it is kept in memory too."""
    cpus: float | None = None
    processes: int | None = 4096
    wall_time_s: float = 3600.0
    disk_bytes: int = 4 << 30


@dataclass(frozen=True)
class Job:
    """A program, and the container that it runs in."""

    program: Program
    layers: Layers
    network: str = "none"
    """`none`, or `host` for the network of this machine."""
    binds: tuple[Bind, ...] = ()
    tmpfs: tuple[tuple[str, int], ...] = ()
    """Folders in memory: path, and size in bytes or 0 for no limit of its own."""
    machine: Image | None = None
    """This machine's image, where its folders are shown over the layers."""
    limits: JobLimits = field(default_factory=JobLimits)


@dataclass(frozen=True)
class Ran:
    """How a job ended; at most one of the three reasons is set."""

    code: int | None = None
    signal: int | None = None
    limit: str = ""
    """The limit that ended it: `memory` or `wall_time`."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_memory_bytes: int | None = None
    fork_denials: int = 0
    """How often the limit of processes refused one."""

    @property
    def succeeded(self) -> bool:
        """Tell whether it exited by itself, with 0."""
        return self.code == 0 and not self.limit


def run(job: Job, output: Output, take_layer: TakeLayer | None = None) -> Ran:
    """Run a job to its end; what it wrote goes to `take_layer` if it succeeded.

    Raises LaunchError where the container or the program could not be started, HostError for a
    limit that cannot be enforced.
    """
    tree = CgroupTree.acquire()
    tree.sweep()
    with contextlib.ExitStack() as stack:
        name = session_name(f"job-{secrets.token_hex(6)}")
        cgroup = stack.enter_context(tree.session(name))
        init = stack.enter_context(cgroup.child("init"))
        step = stack.enter_context(cgroup.child("step"))
        limits = job.limits
        memory = limits.memory_bytes
        step.limit(
            memory_bytes=None if memory is None else memory + limits.disk_bytes,
            cpus=limits.cpus,
            processes=limits.processes,
        )
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-kernel-job-")))
        body = _start_message(job, _names(files, job.network), cgroup, init)
        return _Watch(stack, job, step, output, take_layer).follow(body)


def _names(folder: Path, network: str) -> tuple[Bind, ...]:
    """Write the files that tell hosts and resolver, which no layer shall have; give their binds."""
    binds = []
    for path, text in host.NAMES:
        file = folder / path.rpartition("/")[2]
        file.write_text(text)
        file.chmod(0o644)
        binds.append(Bind(str(file), path))
    if network == "host":
        binds = [Bind(os.path.realpath(path), path) for path, _ in host.NAMES]
    return tuple(binds)


def _start_message(
    job: Job, names: tuple[Bind, ...], cgroup: Cgroup, init: Cgroup
) -> dict[str, Any]:
    machine = job.machine or Image("", ())
    binds = (*machine.binds, *names, *job.binds)
    shadowed = {path for path, _ in host.NAMES}
    folders = [*machine.folders, *_FOLDERS]
    folders += [(path, 0o1777, 0, 0) for path, _ in job.tmpfs]
    return {
        "job": job.program.as_json(),
        "binds": [[bind.source, bind.target, bind.read_only] for bind in binds],
        "bound": [bind.target for bind in binds],
        "targets": [[bind.target, os.path.isdir(bind.source)] for bind in binds],
        "folders": [list(folder) for folder in folders],
        "tmpfs": [[SHARED_MEMORY, 0], *map(list, job.tmpfs)],
        "files": [list(file) for file in machine.files if file[0] not in shadowed],
        "links": [list(link) for link in machine.links],
        "layers": list(job.layers.names),
        "layers_folder": job.layers.folder,
        "cell_uid": 0,
        "cell_gid": 0,
        "id_count": BUILD_IDS,
        "network": job.network,
        "workspace": "",
        "workspace_mode": "none",
        "workspace_owner": 0,
        "workspace_group": 0,
        "first_id": None,
        "disk_bytes": job.limits.disk_bytes,
        "hostname": "buildkitsandbox",
        "takes_other_users": cgroup.takes_other_users,
        "cgroups": list(cgroup.paths),
        "init_cgroups": list(init.paths),
    }


class _Watch:
    """The outside of one job: its streams, its channels, its clock."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        job: Job,
        cgroup: Cgroup,
        output: Output,
        take_layer: TakeLayer | None,
    ) -> None:
        self._stack = stack
        self._job = job
        self._cgroup = cgroup
        self._output = output
        self._take_layer = take_layer
        self._selector = stack.enter_context(selectors.DefaultSelector())
        self._ended: Mapping[str, Any] = {}
        self._usage: CgroupUsage | None = None
        self._packed = False
        self._limit = ""
        self._failure: LaunchError | None = None
        self._taking: threading.Thread | None = None
        self._taking_failed: list[BaseException] = []

    def follow(self, body: dict[str, Any]) -> Ran:
        """Start it and stay with it to its end."""
        began_s = time.monotonic()
        monitor = self._start(body)
        deadline_s = began_s + self._job.limits.wall_time_s
        while self._selector.get_map():
            left_s = None if self._limit or self._ended else deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                self._limit = "wall_time"
                self._cgroup.kill()
                continue
            for key, _ in self._selector.select(left_s):
                key.data(key.fileobj)
        self._wait(monitor)
        if self._failure is not None:
            raise self._failure
        usage = self._usage
        if usage is None:
            raise LaunchError("run a step", "its container was killed")
        if usage.oom_kills or usage.oom_events:
            self._limit = self._limit or "memory"
        return Ran(
            code=self._ended.get("code"),
            signal=self._ended.get("signal"),
            limit="" if self._packed else self._limit,
            wall_s=time.monotonic() - began_s,
            cpu_s=usage.cpu_s,
            peak_memory_bytes=usage.peak_memory_bytes,
            fork_denials=usage.fork_denials,
        )

    def _start(self, body: dict[str, Any]) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as theirs:
            fds = []
            for stream in ("stdout", "stderr"):
                ours_fd, theirs_fd = os.pipe()
                pipe = self._stack.enter_context(open(ours_fd, "rb", buffering=0))
                self._watch(pipe, _for_stream(self, stream))
                theirs.callback(os.close, theirs_fd)
                fds.append(theirs_fd)
            caller, caller_theirs = control.pair()
            theirs.callback(caller_theirs.close)
            self._watch(caller, self._hear_program)
            tar, tar_theirs = os.pipe()
            tar_file = self._stack.enter_context(open(tar, "rb"))
            theirs.callback(os.close, tar_theirs)
            begun = begin(body, (*fds, caller_theirs.fileno(), tar_theirs))
        self._watch(begun.control, self._hear_init)
        if self._take_layer is not None and self._job.program.epoch_s is not None:
            self._taking = threading.Thread(target=self._take, args=(tar_file,), daemon=True)
            self._taking.start()
        return begun.monitor

    def _watch(self, file: Any, act: Callable[[Any], None]) -> None:
        self._stack.callback(file.close)
        self._selector.register(file, selectors.EVENT_READ, act)

    def _close(self, file: Any) -> None:
        self._selector.unregister(file)
        file.close()

    def read_stream(self, name: str, file: BinaryIO) -> None:
        """Pass on what came over a stream."""
        if data := file.read(65536):
            self._output(name, data)
        else:
            self._close(file)

    def _hear_program(self, sock: socket.socket) -> None:
        """Hear from the process that becomes the program: here it is, and what failed."""
        packet = control.receive(sock)
        if packet is None:
            self._close(sock)
            return
        with contextlib.closing(packet):
            if packet.op == "failed":
                self._fail(packet)
            elif packet.pid is not None:
                self._cgroup.add(packet.pid)
                control.send(sock, {"op": "go"})

    def _hear_init(self, sock: socket.socket) -> None:
        packet = control.receive(sock)
        if packet is None:
            self._close(sock)
            return
        with contextlib.closing(packet):
            if packet.op == "ended":
                self._ended = {k: v for k, v in packet.body.items() if isinstance(v, int)}
                self._usage = self._cgroup.usage()
                control.send(sock, {"op": "go"})
            elif packet.op == "packed":
                self._packed = True
            elif packet.op == "failed":
                self._fail(packet)

    def _fail(self, packet: control.Packet) -> None:
        step, cause, hint = (str(packet.body.get(k, "")) for k in ("step", "cause", "hint"))
        self._failure = LaunchError(step, cause, hint=hint)

    def _take(self, tar: BinaryIO) -> None:
        try:
            if self._take_layer is not None:
                self._take_layer(tar)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for this
            self._taking_failed.append(error)
            while tar.read(1 << 20):  # or init would wait for ever
                pass

    def _wait(self, monitor: subprocess.Popen[bytes]) -> None:
        try:
            monitor.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise HostError("a job's container does not end") from None
        if self._taking is not None:
            self._taking.join()
        if self._taking_failed and self._packed:
            raise self._taking_failed[0]


def _for_stream(watch: _Watch, name: str) -> Callable[[BinaryIO], None]:
    return lambda file: watch.read_stream(name, file)
