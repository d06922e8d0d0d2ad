"""Three-cell notebooks on one kernel by nbclient: set x, the bad cell, print x + 1."""

from __future__ import annotations

import atexit
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat import v4

from tests.integration import leaks
from tests.kernel.live import NAME, plain, settings
from tests.kernel.traces import Traces

START_S = 120.0
REST_S = 10.0
"""How long a session may take after a cell until it waits for the next; a guard, not a bar."""


@dataclass(frozen=True)
class Cell:
    """One executed cell: its outputs in the notebook, and the reply."""

    node: nbformat.NotebookNode
    reply: dict[str, Any]

    @property
    def figures(self) -> dict[str, Any]:
        """What the reply's metadata says of the cell's end and use."""
        found: dict[str, Any] = self.reply["metadata"].get("sandbox", {})
        return found

    @property
    def errors(self) -> list[nbformat.NotebookNode]:
        """The errors that the notebook shows."""
        return [out for out in self.node.outputs if out.output_type == "error"]

    def text(self, name: str = "stdout") -> str:
        """Give what the notebook shows of a standard stream."""
        streams = [out for out in self.node.outputs if out.output_type == "stream"]
        return "".join(out.text for out in streams if out.name == name)

    def said(self) -> str:
        """Say all there is, for the message of a failed assertion."""
        trace = "\n".join("\n".join(error.traceback) for error in self.errors)
        content = {k: v for k, v in self.reply["content"].items() if k != "traceback"}
        parts = (str(content)[:2000], str(self.figures), plain(trace)[-3000:])
        return "\n".join((*parts, self.text()[-1000:], self.text("stderr")[-2000:]))


def _shape(pid: int) -> Counter[str]:
    """Count what a session has while it waits: processes, groups, descriptors and files."""
    found: Counter[str] = Counter()
    groups = leaks.session_cgroups(pid)
    found["processes"] = len(leaks.session_processes(pid))
    found["groups"] = len({e.name for group in groups for e in os.scandir(group) if e.is_dir()})
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        # A namespace, a pipe and a cell's group have numbers.
        found[f"fd {re.sub('[0-9]+', 'N', target.removeprefix('/sys/fs/cgroup'))}"] += 1
    found["zombies"] = sum(leaks.state(child) == "Z" for child in _children(pid))
    return found


def _children(pid: int) -> Iterator[int]:
    for task in os.listdir(f"/proc/{pid}/task"):
        text = Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii")
        yield from map(int, text.split())


@dataclass
class Kernel:
    """One kernel, and the notebooks that are run on it one after the other."""

    folder: Path
    temporary: Path
    manager: AsyncKernelManager
    client: Any
    rest: Counter[str] = field(default_factory=Counter)
    mounts: Counter[str] = field(default_factory=leaks.mounts)
    broken: bool = False

    @property
    def pid(self) -> int:
        """The pid of the kernel process."""
        pid: int = self.manager.provisioner.process.pid
        return pid

    def run(self, *sources: str, within_s: float) -> list[Cell]:
        """Execute a notebook with these cells; each must have ended within the time given.

        The time is a guard against a cell that hangs, after which the kernel is of no use.
        """
        cells = [v4.new_code_cell(source) for source in sources]
        names = {"name": NAME, "display_name": ""}
        nb = v4.new_notebook(cells=cells, metadata={"kernelspec": names})
        replies: list[dict[str, Any]] = []

        def keep(*, execute_reply: dict[str, Any], **_more: object) -> None:
            replies.append(execute_reply)

        client = NotebookClient(
            nb,
            km=self.manager,
            timeout=within_s,
            allow_errors=True,
            on_cell_executed=keep,
            resources={"metadata": {"path": str(self.folder)}},
        )
        client.kc = self.client
        self.broken = True
        client.execute()
        self.broken = False
        atexit.unregister(client._cleanup_kernel)  # the kernel goes on, and is ended by `end`
        nbformat.validate(nb)
        return [Cell(cell, reply) for cell, reply in zip(nb.cells, replies, strict=True)]

    def settle(self) -> None:
        """Note how the session looks while it waits."""
        # ZeroMQ's own threads begin with the first message that is too long to be copied.
        self.run("print('x' * (1 << 18))", "import os; os._exit(1)", "1", within_s=60.0)
        assert leaks.until(self._is_ready, REST_S), self.rest

    def _is_ready(self) -> bool:
        """Tell whether the next container is there and has a child in it, and the one after too."""
        before, self.rest = self.rest, _shape(self.pid)
        # init, heads, and the two containers; the kernel has the namespaces of the empty one.
        return self.rest == before and self.rest["groups"] == 4 and self.rest["fd net:[N]"] == 1

    def left_over(self) -> dict[str, Any]:
        """Give what is there beyond what was when the session settled."""
        found: dict[str, Any] = dict(_shape(self.pid) - self.rest)
        found |= leaks.mounts() - self.mounts
        if names := os.listdir(self.temporary):
            found["temporary files"] = names
        return found

    def assert_nothing_left(self) -> None:
        """Assert that the session waits as it did before, with nothing of the cells left."""
        seen: list[dict[str, Any]] = []
        leaks.until(lambda: not seen.append(self.left_over()) and not seen[-1], REST_S)
        assert not seen[-1], seen[-1]

    def end(self) -> None:
        """Shut the kernel down, and see that nothing of it is left."""
        traces = Traces.of(self.pid)
        self.client.stop_channels()
        run_sync(self.manager.shutdown_kernel)(now=self.broken)
        run_sync(self.manager.cleanup_resources)()
        traces.assert_dead(REST_S)


def start(folder: Path, temporary: Path, **values: object) -> Kernel:
    """Start a kernel in a folder, with settings of the kernel's."""
    manager = AsyncKernelManager(kernel_name=NAME)
    run_sync(manager.start_kernel)(cwd=str(folder), extra_arguments=list(settings(**values)))
    client = manager.client()
    client.start_channels()
    kernel = Kernel(folder, temporary, manager, client)
    try:
        run_sync(client.wait_for_ready)(timeout=START_S)
        kernel.settle()
    except BaseException:
        kernel.broken = True
        kernel.end()
        raise
    return kernel
