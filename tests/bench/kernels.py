"""Start and stop the kernels under test, and weigh their processes.

Both kernels go through the same door, jupyter_client's KernelManager, with the same context and
the same options, so that a difference between them is a difference of the kernels.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import zmq
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from jupyter_client.manager import KernelManager

from tests.bench.measure import BenchError, Probe

if TYPE_CHECKING:
    from collections.abc import Iterator

RECONNECT_MS = 5
"""libzmq's default of 100 ms would round every start up to the next tenth of a second."""

ROOMY = (
    "--SandboxConfig.memory=4G",
    "--SandboxConfig.disk=1G",
    "--SandboxConfig.output=64M",
)
"""What a sandboxed kernel is started with, so that no limit is hit: the array alone takes 1 GB."""


@dataclass(frozen=True)
class KernelChoice:
    """A kernel by the name of its spec, and the arguments that are added to its command."""

    name: str
    extra_arguments: tuple[str, ...] = ()


@dataclass
class RunningKernel:
    """A kernel that answers, with the client that measures it."""

    choice: KernelChoice
    probe: Probe
    pid: int
    ready_s: float
    """From the call that starts the process to the reply to kernel_info."""
    _release: contextlib.ExitStack = field(repr=False)

    def stop(self) -> None:
        """Shut the kernel down and release everything that belongs to it."""
        self._release.close()


def choose(name: str, *, extra_arguments: tuple[str, ...] = ()) -> KernelChoice:
    """Find a kernelspec; a sandboxed kernel gets roomy limits, except for those that are given.

    Raises BenchError if no such kernelspec is installed.
    """
    try:
        spec = KernelSpecManager().get_kernel_spec(name)
    except NoSuchKernel:
        remedy = "run `sandbox-kernel install --sys-prefix`, or choose another with --kernel"
        raise BenchError(f"no kernel named {name!r} is installed ({remedy})") from None
    roomy = ROOMY if any("sandbox_kernel" in word for word in spec.argv) else ()
    return KernelChoice(name, with_defaults(extra_arguments, roomy))


def with_defaults(given: tuple[str, ...], defaults: tuple[str, ...]) -> tuple[str, ...]:
    """Put those `--name=value` in front that are not given; traitlets takes no name twice."""
    names = {argument.partition("=")[0] for argument in given}
    return tuple(word for word in defaults if word.partition("=")[0] not in names) + given


def start(choice: KernelChoice, *, patience_s: float = 60.0) -> RunningKernel:
    """Start a kernel and wait until it answers on shell and iopub; raises BenchError."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        log = stack.enter_context(tempfile.TemporaryFile())
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.destroy, linger=0)
        context.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        manager = KernelManager(kernel_name=choice.name, context=context)

        begin_s = time.perf_counter()
        stack.callback(_shut_down, manager)
        manager.start_kernel(
            extra_arguments=list(choice.extra_arguments), cwd=folder, stdout=log, stderr=log
        )
        client = manager.client()
        stack.callback(client.stop_channels)
        client.start_channels(stdin=False, hb=False)
        probe = Probe(client, alive=manager.is_alive, patience_s=patience_s)
        try:
            ready_s = probe.greet() - begin_s
            probe.await_iopub()
        except BenchError as error:
            raise BenchError(f"{choice.name} did not start: {error}{_last_words(log)}") from error
        pid = getattr(manager.provisioner, "pid", None)
        if not isinstance(pid, int):
            raise BenchError(f"the provisioner of {choice.name} does not tell the kernel's pid")
        return RunningKernel(choice, probe, pid, ready_s, stack.pop_all())


def _shut_down(manager: KernelManager) -> None:
    if manager.has_kernel:
        manager.shutdown_kernel()


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return "".join(f"\n  {line}" for line in lines[-8:])


@dataclass(frozen=True)
class Weight:
    """What a session's processes weigh; `unreadable` of them did not let us look."""

    pss_bytes: int
    processes: int
    unreadable: int


def weigh(kernel_pid: int) -> Weight:
    """Add up the proportional set sizes of all processes of a kernel's session."""
    sizes = [_pss_bytes(pid) for pid in sorted(session_processes(kernel_pid))]
    known = [size for size in sizes if size is not None]
    return Weight(sum(known), len(sizes), len(sizes) - len(known))


def session_processes(kernel_pid: int) -> set[int]:
    """Find a kernel, its descendants, and whatever lives in its session's cgroup.

    The cgroup catches those that were re-parented, out of the tree.
    """
    mark = f"sandbox-kernel-{kernel_pid}-"
    parents: dict[int, int] = {}
    found = {kernel_pid}
    for pid, folder in _processes():
        # A process may end while we look at it.
        with contextlib.suppress(OSError):
            parents[pid] = parent_of((folder / "stat").read_text("utf-8", "replace"))
            if mark in (folder / "cgroup").read_text("utf-8", "replace"):
                found.add(pid)
    return with_descendants(found, parents)


def with_descendants(roots: set[int], parents: dict[int, int]) -> set[int]:
    """Close a set of pids under descent; `parents` maps each pid to its parent's."""
    found = set(roots)
    fresh = found
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


def parent_of(stat_line: str) -> int:
    """Read the parent's pid from /proc/PID/stat, whose second field may hold anything."""
    return int(stat_line.rpartition(")")[2].split()[1])


def _processes() -> Iterator[tuple[int, Path]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            yield int(folder.name), folder


def _pss_bytes(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None
