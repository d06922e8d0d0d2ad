"""A session: a head that holds the state, and for every request a child in a fresh container.

The order of one execution, most of which lies before it:

    build a place (cgroup, container) -> fork the head -> move the child, let it enter and warm
    -> [the request comes] -> run -> verdict
    -> commit: kill what else the cell started, park the child, it is the head; its files a layer
    -> or roll back: kill everything in the cgroup, drop the layer; the head has not noticed
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from sandbox_kernel.errors import ConfigError, ProtocolError, SandboxError, SessionLost
from sandbox_kernel.guest.wire import Frame
from sandbox_kernel.linux.cgroup import Cgroup, CgroupTree, session_name
from sandbox_kernel.model import (
    CellResult,
    Event,
    Execution,
    Json,
    Limits,
    Outcome,
    SessionSpec,
    Usage,
)
from sandbox_kernel.session.cell import Cell, Verdict
from sandbox_kernel.session.guest import Guest
from sandbox_kernel.session.place import Builder, Place
from sandbox_kernel.session.start import Started, start
from sandbox_kernel.session.supervisor import RESTART_HINT, Supervisor
from sandbox_kernel.units import format_size

Sink = Callable[[Event], None]

BOOT_TIMEOUT_S = 60.0
FORK_TIMEOUT_S = 60.0
ENTER_TIMEOUT_S = 30.0
ASK_TIMEOUT_S = 5.0
MONITOR_TIMEOUT_S = 5.0
ASK_CPU_S = 5.0

log = logging.getLogger("sandbox_kernel.session")


class Prepared:
    """A child that sits in its container and waits for a request."""

    def __init__(self, child: Guest, place: Place, notes: tuple[str, ...]) -> None:
        self.child = child
        self.place = place
        self.notes = notes
        self.pid_inside = 0


class Session:
    """One running session; everything but `begin` and `kill` runs in one asyncio loop."""

    def __init__(self, spec: SessionSpec) -> None:
        self.spec = spec
        self.comms: Mapping[str, str] = {}
        self._tree = CgroupTree.detect()
        self._cgroups = contextlib.ExitStack()
        self._cgroup: Cgroup | None = None
        self._heads: Cgroup | None = None
        self._started: Started | None = None
        self._supervisor: Supervisor | None = None
        self._builder: Builder | None = None
        self._head: Guest | None = None
        self._head_layer = 0
        self._head_layer_counts = True
        self._next: asyncio.Task[Prepared] | None = None
        self._spare: asyncio.Task[Place] | None = None
        self._boot: asyncio.Task[None] | None = None
        self._cell: Cell | None = None
        self._running: Prepared | None = None
        self._fork_number = 0
        self._forked: dict[int, Guest] = {}
        self._disk_limit = spec.ceiling.disk_bytes
        self._disk_used = 0
        self._closed = False
        self._background: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()

    # ---- beginning and end

    def begin(self) -> None:
        """Start the session's processes and return at once; raises HostError, ConfigError."""
        self._tree.sweep()
        cgroup = self._cgroups.enter_context(
            self._tree.session(session_name(self.spec.session_id))
        )
        ceiling = self.spec.ceiling
        cgroup.limit(memory_bytes=2 * ceiling.memory_bytes + ceiling.disk_bytes)
        init = self._cgroups.enter_context(cgroup.child("init"))
        self._heads = self._cgroups.enter_context(cgroup.child("heads"))
        self._cgroup = cgroup
        self._started = start(self.spec, cgroup, init)

    async def ready(self) -> None:
        """Wait until the session can run cells; raises LaunchError, SessionLost."""
        if self._boot is None:
            self._boot = asyncio.create_task(self._finish_boot())
        await asyncio.shield(self._boot)
        assert self._supervisor is not None
        if self._supervisor.failure is not None:
            raise self._supervisor.failure

    async def _finish_boot(self) -> None:
        assert self._started is not None and self._cgroup is not None
        supervisor = self._supervisor = Supervisor(self._started.control)
        supervisor.attach(self._lose)
        head = Guest(self._started.head)
        head.output.close()
        try:
            await asyncio.wait_for(supervisor.expect("started"), BOOT_TIMEOUT_S)
            await head.link.expect("parked", timeout_s=BOOT_TIMEOUT_S)
        except SandboxError:
            head.close()
            # Init's word about the step that failed says more than the end of the link.
            raise supervisor.failure or SessionLost("the first guest died") from None
        head.identify()
        layer = await supervisor.ask({"op": "commit", "layer": 0}, "committed")
        self._become_head(head, layer=0, counts=bool(layer["changed"]))
        self._builder = Builder(supervisor, self._cgroup)
        self._prepare()

    def _become_head(self, head: Guest, *, layer: int, counts: bool) -> None:
        assert self._heads is not None
        self._heads.add(head.pid)
        old, self._head = self._head, head
        old_layer, old_counts = self._head_layer, self._head_layer_counts
        self._head_layer, self._head_layer_counts = layer, counts
        head.link.handler = self._head_says
        head.on_exit(self._head_died)
        if old is not None:
            old.on_exit(lambda: None)
            old.link.handler = None
            old.link.kill()
            old.close()
            if not old_counts:
                self._discard_layer(old_layer)

    def _head_says(self, frame: Frame) -> None:
        """Hear from the head: the exit status of a child, and nothing else."""
        body = frame.body
        number, code, status = body.get("id"), body.get("code"), body.get("status")
        if frame.op != "exited" or not all(type(v) is int for v in (number, code, status)):
            raise ProtocolError("a head said something else than how a child ended")
        child = self._forked.pop(number, None)
        if child is not None:
            child.set_status(code, status)

    def _head_died(self) -> None:
        if self._supervisor is not None:
            self._supervisor._lose(SessionLost("the session's head was killed", hint=RESTART_HINT))

    def _lose(self) -> None:
        """Take it that the session is dead: end what waits, and what is left of it."""
        if self._cell is not None:
            self._cell.fail()
        self.kill()

    async def close(self) -> None:
        """End the session and remove every trace of it; may be called twice."""
        self.kill()
        for task in (self._boot, self._next, self._spare, *self._background):
            if task is not None:
                with contextlib.suppress(SandboxError, asyncio.CancelledError):
                    await task

    def kill(self) -> None:
        """Do the same at once, without a loop; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._supervisor is not None:
            self._supervisor.close()
        elif self._started is not None:
            self._started.control.close()
        if self._head is not None:
            self._head.on_exit(lambda: None)
            self._head.close()
        # The end of init has ended everything; what is in the cgroups is just leaving.
        self._cgroups.close()
        if self._started is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._started.monitor.wait(MONITOR_TIMEOUT_S)

    # ---- preparing the next child

    def _prepare(self) -> None:
        if self._closed:
            return
        self._next = asyncio.create_task(self._prepare_next())
        self._next.add_done_callback(_retrieve)

    async def _prepare_next(self) -> Prepared:
        place = await self._take_place()
        try:
            return await self._place_child(place)
        except BaseException:
            await self._drop_place(place)
            raise

    async def _take_place(self) -> Place:
        assert self._builder is not None
        spare, self._spare = self._spare, None
        if spare is not None:
            return await spare
        return await self._builder.build()

    async def _place_child(self, place: Place) -> Prepared:
        assert self._supervisor is not None and self._head is not None
        self._set_limits(place.cgroup, self.spec.ceiling)
        child = await self._fork(self._head)
        try:
            place.cgroup.add(child.pid)
            pid_inside = child.identify()
            self._supervisor.send({"op": "gate", "pid": pid_inside, "kind": "enter"})
            child.link.send({"op": "enter"}, place.namespace_fds)
            frame = await child.link.expect("ready", timeout_s=ENTER_TIMEOUT_S)
            place.release_namespaces()
            notes = frame.body.get("notes")
            texts = tuple(str(n)[:500] for n in notes[:20]) if isinstance(notes, list) else ()
            prepared = Prepared(child, place, texts)
            prepared.pid_inside = pid_inside
        except ProcessLookupError as error:
            child.close()
            raise ProtocolError("a child died before it was placed") from error
        except BaseException:
            child.close()
            raise
        return prepared

    async def _fork(self, parent: Guest) -> Guest:
        ours, theirs = socket.socketpair()
        child = Guest(ours)
        self._fork_number += 1
        self._forked[self._fork_number] = child
        with theirs:
            fds = (theirs.fileno(), *child.output.write_ends)
            parent.link.send({"op": "fork", "id": self._fork_number}, fds)
        child.output.close_write_ends()
        try:
            await child.link.expect("hello", timeout_s=FORK_TIMEOUT_S)
        except BaseException:
            child.close()
            raise
        return child

    def _set_limits(self, cgroup: Cgroup, limits: Limits) -> None:
        cgroup.limit(
            memory_bytes=limits.memory_bytes, cpus=limits.cpus, processes=limits.processes
        )

    async def _drop_place(self, place: Place) -> None:
        await asyncio.to_thread(place.close)
        self._discard_layer(place.layer)

    def _discard_layer(self, layer: int) -> None:
        if self._supervisor is not None and self._supervisor.failure is None:
            self._supervisor.send({"op": "discard", "layer": layer})

    async def _take(self) -> Prepared:
        """Give a child that is ready; one more try if the one at hand has died meanwhile."""
        await self.ready()
        for _ in range(2):
            if self._next is None:
                self._prepare()
            assert self._next is not None
            task, self._next = self._next, None
            try:
                prepared = await task
            except ProtocolError as error:
                log.warning("a prepared child was lost: %s", error)
                continue
            if prepared.child.link.failure is None:
                return prepared
            prepared.child.close()
            await self._drop_place(prepared.place)
        raise SessionLost("no child of the session's head comes up", hint=RESTART_HINT)

    # ---- requests

    async def execute(self, execution: Execution, limits: Limits, sink: Sink) -> CellResult:
        """Run one cell; every event has been given when it returns.

        Raises ConfigError for a disk limit below what is in use, SessionLost, LaunchError.
        """
        body = {
            "op": "execute",
            "code": execution.code,
            "silent": execution.silent,
            "store_history": execution.store_history,
            "user_expressions": execution.user_expressions,
            "allow_stdin": execution.allow_stdin,
            "execution_count": execution.execution_count,
            "cell_id": execution.cell_id,
            "parent": execution.parent,
            "open_files": limits.open_files,
        }
        async with self._lock:
            return await self._run(body, (), limits, sink)

    async def comm(
        self, msg_type: str, content: Json, metadata: Json, buffers: list[bytes], sink: Sink
    ) -> CellResult:
        """Hand a comm message to its handler; its state is kept if the handler succeeds."""
        body = {"op": "comm", "msg_type": msg_type, "content": content, "metadata": metadata}
        body["open_files"] = self.spec.ceiling.open_files
        async with self._lock:
            return await self._run(body, tuple(buffers), self.spec.ceiling, sink)

    async def ask(self, msg_type: str, content: Json) -> Json:
        """Answer a completion or inspection from a child that is thrown away."""
        async with self._lock:
            prepared = await self._take()
            try:
                prepared.child.link.send({"op": "ask", "msg_type": msg_type, "content": content})
                frame = await prepared.child.link.expect("answer", timeout_s=ASK_TIMEOUT_S)
            finally:
                prepared.child.close()
                await self._drop_place(prepared.place)
                self._prepare()
        answer = frame.body.get("content")
        if not isinstance(answer, dict):
            raise ProtocolError("an answer is no object")
        return answer

    async def _run(
        self, body: Json, buffers: tuple[bytes, ...], limits: Limits, sink: Sink
    ) -> CellResult:
        await self._set_disk(limits.disk_bytes)
        prepared = await self._take()
        assert self._builder is not None
        if limits != self.spec.ceiling:
            self._set_limits(prepared.place.cgroup, limits)
        self._spare = asyncio.create_task(self._builder.build())
        self._spare.add_done_callback(_retrieve)
        cell = Cell(
            prepared.child, prepared.place.cgroup, limits, grace_s=self.spec.grace_s, sink=sink
        )
        self._cell, self._running = cell, prepared
        try:
            verdict = await cell.run(body, buffers)
            return await self._conclude(prepared, cell, verdict, limits)
        finally:
            self._cell = self._running = None

    async def _conclude(
        self, prepared: Prepared, cell: Cell, verdict: Verdict, limits: Limits
    ) -> CellResult:
        assert self._supervisor is not None
        if self._supervisor.failure is not None:
            prepared.child.close()
            raise self._supervisor.failure
        notes = (*prepared.notes, *verdict.notes)
        if verdict.committed:
            usage = await self._commit(prepared, cell)
            self.comms = dict(verdict.comms)
        else:
            usage = await self._roll_back(prepared, cell)
        self._prepare()
        return CellResult(
            outcome=verdict.outcome,
            committed=verdict.committed,
            usage=usage,
            limits=limits,
            container_id=prepared.place.container_id,
            reply=verdict.reply,
            traceback=verdict.traceback,
            exit_code=verdict.exit_code,
            signal=verdict.signal,
            notes=notes,
        )

    async def _commit(self, prepared: Prepared, cell: Cell) -> Usage:
        """Make the child the head and its files a layer; nothing else of the cell stays."""
        assert self._supervisor is not None and self._heads is not None
        child, place = prepared.child, prepared.place
        others = [pid for pid in place.cgroup.processes() if pid != child.pid]
        self._heads.add(child.pid)
        if others:
            place.cgroup.kill()
        layer = self._supervisor.ask(
            {"op": "commit", "layer": place.layer}, "committed", key=place.layer
        )
        self._supervisor.send({"op": "gate", "pid": prepared.pid_inside, "kind": "park"})
        child.link.send({"op": "park"})
        await child.link.expect("parked", timeout_s=ENTER_TIMEOUT_S)
        committed = await layer
        usage = self._finish_usage(place.cgroup, cell, child, int(committed["disk_bytes"]))
        child.output.close()
        if others:
            await asyncio.to_thread(place.close)
        else:
            place.close()
        self._watch(prepared)
        changed = bool(committed["changed"])
        self._become_head(child, layer=place.layer, counts=changed)
        if changed:
            await self._drop_spare()
        return usage

    def _watch(self, prepared: Prepared) -> None:
        """Have init report the end of a process whose parent is about to be killed."""
        assert self._supervisor is not None
        child = prepared.child

        def reaped(status: int) -> None:
            child.set_status(0, status)

        self._supervisor.reaped[prepared.pid_inside] = reaped
        self._supervisor.send({"op": "watch", "pid": prepared.pid_inside})

    async def _roll_back(self, prepared: Prepared, cell: Cell) -> Usage:
        """Kill everything in the cell's container and drop its files."""
        assert self._supervisor is not None
        child, place = prepared.child, prepared.place
        place.cgroup.kill()
        discarded = await self._supervisor.ask(
            {"op": "discard", "layer": place.layer}, "discarded", key=place.layer
        )
        usage = self._finish_usage(place.cgroup, cell, child, int(discarded["disk_bytes"]))
        child.close()
        await asyncio.to_thread(place.close)
        return usage

    def _finish_usage(self, cgroup: Cgroup, cell: Cell, child: Guest, disk_bytes: int) -> Usage:
        child.output.drain()
        child.output.stop()
        counted = cgroup.usage()
        used, self._disk_used = max(disk_bytes - self._disk_used, 0), disk_bytes
        return Usage(
            wall_s=cell.wall_s,
            cpu_s=counted.cpu_s,
            peak_memory_bytes=counted.peak_memory_bytes,
            peak_processes=counted.peak_processes,
            disk_bytes=used,
            output_bytes=child.output.bytes_seen,
        )

    async def _drop_spare(self) -> None:
        """Throw away the container that was built ahead: it lacks the files just committed."""
        spare, self._spare = self._spare, None
        if spare is not None:
            try:
                place = await spare
            except SandboxError:
                return
            self._in_background(self._drop_place(place))

    def _in_background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(_retrieve)

    async def _set_disk(self, disk_bytes: int) -> None:
        if disk_bytes == self._disk_limit:
            return
        await self.ready()
        assert self._supervisor is not None
        answer = await self._supervisor.ask({"op": "resize", "disk_bytes": disk_bytes}, "resized")
        if "error" in answer:
            used = format_size(int(answer["used"]))
            raise ConfigError(
                f"disk={format_size(disk_bytes)} is below what the session's files take",
                hint=f"they take {used}; delete some, or give more",
            )
        self._disk_limit = disk_bytes

    def interrupt(self) -> None:
        """Interrupt the running cell, and kill it if it has not stopped after the grace."""
        if self._cell is not None:
            self._cell.stop(Outcome.INTERRUPTED)

    def answer(self, value: str) -> None:
        """Answer the last `InputRequest` of the running cell."""
        if self._running is not None:
            self._running.child.link.send({"op": "input_reply", "value": value})

    def usage(self) -> Usage:
        """Give what the session used so far: CPU time in all, memory and processes now."""
        if self._cgroup is None or self._closed:
            return Usage()
        counted = self._cgroup.usage()
        return Usage(
            cpu_s=counted.cpu_s,
            peak_memory_bytes=counted.memory_bytes,
            peak_processes=len(self._cgroup.processes()),
            disk_bytes=self._disk_used,
        )


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Look at a task's exception, so that asyncio does not report one that is handled later."""
    if not task.cancelled():
        task.exception()
