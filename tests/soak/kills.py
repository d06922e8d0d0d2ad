"""Parts of a session killed at random moments: nothing may be left, and the next cell must run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jupyter_client.manager import KernelManager

from tests.integration import leaks
from tests.kernel import traces
from tests.kernel.live import NAME, Live
from tests.soak.cells import FLOOD, SETUP, TICK, Kind, deck
from tests.soak.census import Host, Vitals, settled, wait_s
from tests.soak.endurance import rows_of_host
from tests.soak.findings import Problems, Row, counted, none_left
from tests.soak.notebook import SLOW_S, end_of

PARTS = {
    "init": "sandbox-init",
    "monitor": "sandbox-monitor",
    "builder": "sandbox-builder",
    "stage": "sandbox-stage",
}
"""The names that these processes give themselves."""
KERNEL_EVERY = 5
"""One kill in so many is the kernel's own, which must be started anew then."""
START_S, CELLS_S = 0.6, 0.25
"""How long a start and some cells take: the moments of kills lie in there."""
LOST = frozenset(("SessionLost", "LaunchError", "HostError"))
"""How a cell may end whose session was killed: by name, and the next runs."""
TRIES = 5


@dataclass
class Kills:
    """A kernel whose parts are killed, and a new one when it was the kernel."""

    host: Host
    seed: int
    advance: Callable[[str, int, int], None]
    problems: Problems = field(default_factory=Problems)
    hit: Counter[str] = field(default_factory=Counter)
    left_open: Counter[str] = field(default_factory=Counter)
    _live: Live | None = None
    _young: Vitals | None = None

    def run(self, count: int) -> Iterator[Row]:
        """Kill so often; give what is asked for and whether it was so."""
        before = self.host.look()
        chance, kinds = random.Random(self.seed), deck(self.seed)
        orphans: set[str] = set()
        try:
            for number in range(count):
                self.advance("kills", number, count)
                if number % KERNEL_EVERY == 0:
                    self._end_kernel()
                    orphans |= self._kill_kernel(chance)
                    self._await_gone("kernel")
                else:
                    self._kill_part(chance, kinds)
            self._end_kernel()
        finally:
            if self._live is not None:
                self._live.end()
        struck = ", ".join(f"{count} {part}" for part, count in self.hit.most_common())
        yield counted(f"kills: {struck}", count, self.problems)
        left = sorted(self.left_open.elements())
        for what, number in self.left_open.items():
            self.problems.add(f"killed sessions left open {what}", str(number))
        yield none_left("descriptors of kernels whose sessions were killed", 0, left)
        yield none_left("cgroups that no later start has swept", 0, sorted(orphans & _existing()))
        yield from rows_of_host(self.host, before, count, self.problems)

    # ---- the kernel

    def _kernel(self) -> Live:
        if self._live is None:
            self._live = self.host.home.start()
            self.host.kernels.add(self._live.pid)
            self._live.ok(SETUP)
            self._live.run(FLOOD.text)  # the first large message starts a thread of ZeroMQ's
            self._young = settled(self._live.pid)
        return self._live

    def _end_kernel(self) -> None:
        """End a kernel that has outlived its sessions, and note what it has open too much."""
        live, young, self._live = self._live, self._young, None
        if live is None or young is None:
            return
        self._go_on(live, "nothing")
        self.left_open += settled(live.pid, like=young).open - young.open
        live.end()

    def _kill_kernel(self, chance: random.Random) -> set[str]:
        """Kill a kernel while it starts or works; give the cgroups that it had."""
        with contextlib.ExitStack() as stack:
            live = unready(self.host)
            stack.callback(live.end)
            self.host.kernels.add(live.pid)
            wait_s(chance.uniform(0, START_S + CELLS_S))
            groups = set(leaks.session_cgroups(live.pid))
            victims = [live.pid]
            if chance.random() < 0.3:  # as somebody does who sees only names in a list
                victims += named(live.pid, "sandbox-monitor")
            for pid in victims:
                kill(pid)
            self.hit["kernel and monitor" if len(victims) > 1 else "kernel"] += 1
        return groups

    def _await_gone(self, what: str) -> None:
        def left() -> list[int]:
            below = traces.descendants(os.getpid())
            return [pid for pid in below if leaks.runs(pid)]

        if not leaks.until(lambda: not left()):
            names = [Path(f"/proc/{pid}/comm").read_text() for pid in left()]
            self.problems.add(f"processes outlive the {what}", str(names))

    # ---- the parts

    def _kill_part(self, chance: random.Random, kinds: Iterator[Kind]) -> None:
        live = self._kernel()
        part = chance.choice([*PARTS, "head", "child"])
        asked = [live.send(next(kinds).text) for _ in range(chance.randrange(4))]
        wait_s(chance.uniform(0, CELLS_S))
        victims = find(live.pid, part)
        if not victims:  # there is none of this kind on this host, or not at the moment
            part, victims = "init", find(live.pid, "init")
        for pid in victims:
            kill(pid)
        self.hit[part] += bool(victims)
        ends = [self._end(live, part, msg_id) for msg_id in asked]
        ends += self._go_on(live, part)
        # What is queued behind an error is aborted, as by any kernel.
        lost = [end for end in ends if end in LOST]
        if len(lost) > 1:
            self.problems.add(f"{part} killed: more than one session is lost", str(ends))
        for messages in (live.order, live.sent, live.iopub, live.replies):
            messages.clear()

    def _end(self, live: Live, part: str, msg_id: str) -> str:
        try:
            return end_of(live.result(msg_id, SLOW_S))
        except AssertionError as error:
            self.problems.add(f"{part} killed: a cell has no end", str(error))
            return "none"

    def _go_on(self, live: Live, part: str) -> list[str]:
        """Run cells: one may tell that the session is lost, and those after it must run."""
        ends: list[str] = []
        while ends[-2:] != ["ok", "ok"] and len(ends) < TRIES:
            ends.append(self._end(live, part, live.send(SETUP)))
        allowed = {"ok", *LOST, *(("CellCrashed",) if part == "child" else ())}
        for end in {*ends} - allowed:
            self.problems.add(f"{part} killed: the next cell ended as {end}", str(ends))
        if ends[-2:] != ["ok", "ok"]:
            self.problems.add(f"{part} killed: the next start does not work", str(ends))
        return ends


def unready(host: Host) -> Live:
    """Start a kernel and do not wait until it answers."""
    manager = KernelManager(kernel_name=NAME)
    manager.start_kernel(cwd=str(host.home.workspace))
    client = manager.client()
    client.start_channels()
    for code in (SETUP, TICK.text):
        client.execute(code)
    return Live(manager, client)


def find(kernel: int, part: str) -> list[int]:
    """Give the processes of a kernel's session that play a part."""
    groups = leaks.session_cgroups(kernel)
    if part == "head":
        return sorted(set().union(*(leaks.processes_in(f"{group}/heads") for group in groups)))
    if part == "child":
        return sorted(
            pid
            for group in groups
            for name in _inside(group)
            if name.startswith("cell-")
            for pid in leaks.processes_in(f"{group}/{name}")
            if _name(pid) not in PARTS.values()
        )
    return named(kernel, PARTS[part])


def named(kernel: int, name: str) -> list[int]:
    """Give the descendants of a kernel that call themselves so."""
    return sorted(pid for pid in traces.descendants(kernel) if _name(pid) == name)


def kill(pid: int) -> None:
    """Kill -9 one process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _existing() -> set[str]:
    return {
        f"{folder}/{name}"
        for top in leaks.cgroup_mounts()
        for folder, names, _ in os.walk(top)
        for name in names
        if name.startswith("sandbox-kernel-")
    }


def _inside(group: str) -> list[str]:
    try:
        return os.listdir(group)
    except OSError:
        return []


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
