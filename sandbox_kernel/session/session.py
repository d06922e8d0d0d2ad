"""A session: a head that holds the state, and for every request a child in a fresh container.

The order of one execution, most of which lies before it:

    build a place (cgroup, container) -> fork the head -> move the child, let it enter and warm
    -> [the request comes] -> run -> verdict
    -> commit: kill what else the cell started, park the child, it is the head; its files a layer
    -> or roll back: kill everything in the cgroup, drop the layer; the head has not noticed

A child whose threads outlive its cell cannot be forked faithfully. The session is resident then:
the child goes on itself in the next place, and a fork of it, made before, is what a roll back
returns to (`resident`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from sandbox_kernel.errors import ConfigError, ProtocolError, SandboxError, SessionLost
from sandbox_kernel.guest.wire import Frame
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
from sandbox_kernel.session import resident
from sandbox_kernel.session.cell import Cell, Verdict
from sandbox_kernel.session.guest import Guest
from sandbox_kernel.session.place import Place
from sandbox_kernel.session.pod import Pod
from sandbox_kernel.session.squasher import Squasher
from sandbox_kernel.session.supervisor import RESTART_HINT
from sandbox_kernel.units import format_size

Sink = Callable[[Event], None]

ASK_TIMEOUT_S = 5.0
FORKS = 8
"""What is forked of a guest on the session's behalf may go beyond the cell's limit."""

log = logging.getLogger("sandbox_kernel.session")


@dataclass
class Prepared:
    """A guest that sits in a place and waits for a request."""

    child: Guest
    place: Place
    notes: tuple[str, ...] = ()
    fragile: tuple[str, ...] = ()
    """Native pools of a resident guest that a fork of it would miss."""


@dataclass
class Fork:
    """A child that a cell's guest forks before it parks."""

    child: asyncio.Task[Guest]
    moved: asyncio.Event
    """Set when the child has left the cell's cgroup, or is dead."""


class Session:
    """One running session; everything but `begin` and `kill` runs in one asyncio loop."""

    def __init__(self, spec: SessionSpec) -> None:
        self.spec = spec
        self.comms: Mapping[str, str] = {}
        self._begun: Pod | None = None
        self._head: Guest | None = None
        self._head_layer: int | None = None
        """The layer of the head if it added no files: to be thrown away with the head."""
        self._resident: Prepared | None = None
        self._next: asyncio.Task[Prepared] | None = None
        self._spare: asyncio.Task[Place] | None = None
        self._forked: Fork | None = None
        self._layered: asyncio.Task[bool] | None = None
        self._settled: asyncio.Task[None] | None = None
        self._boot: asyncio.Task[None] | None = None
        self._cell: Cell | None = None
        self._running: Prepared | None = None
        self._notes: tuple[str, ...] = ()
        self._disk_limit = spec.limits.disk_bytes
        self._disk_used = 0
        self._background: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()

    # ---- beginning and end

    @property
    def _pod(self) -> Pod:
        if self._begun is None:
            raise SessionLost("the session was closed")
        return self._begun

    def begin(self) -> None:
        """Start the session's processes and return at once; raises HostError, ConfigError."""
        self._begun = Pod(self.spec)

    async def ready(self) -> None:
        """Wait until the session can run cells; raises LaunchError, SessionLost."""
        if self._boot is None:
            self._boot = asyncio.create_task(self._finish_boot())
        await asyncio.shield(self._boot)
        if self._pod.failure is not None:
            raise self._pod.failure

    async def _finish_boot(self) -> None:
        pod = self._pod
        head = await pod.boot(self._lose)
        self._squasher = Squasher(pod, self.spec.ceiling.disk_bytes)
        layer = await pod.supervisor.ask({"op": "commit", "layer": 0}, "committed")
        self._become_head(head, None if layer["changed"] else 0)
        self._prepare()

    def _become_head(self, head: Guest, empty_layer: int | None) -> None:
        """Let a parked guest hold the state from now on, and end the one that did."""
        old, old_layer = self._head, self._head_layer
        self._head, self._head_layer = head, empty_layer
        head.link.handler = _refuse
        head.on_exit(self._head_died)
        if old is not None:
            old.retire()
            self._pod.end_strangers()
            if old_layer is not None:
                self._pod.discard(old_layer)

    def _head_died(self) -> None:
        self._pod.supervisor.lose(SessionLost("the session's head was killed", hint=RESTART_HINT))

    def _lose(self) -> None:
        """Take it that the session is dead: end what waits, and what is left of it."""
        if self._cell is not None:
            self._cell.fail()
        self.kill()

    async def close(self) -> None:
        """End the session and remove every trace of it; may be called twice."""
        self.kill()
        tasks = (self._boot, self._next, self._spare, self._layered, self._settled)
        for task in (*tasks, *self._background):
            if task is not None:
                with contextlib.suppress(SandboxError, asyncio.CancelledError, OSError):
                    await task

    def kill(self) -> None:
        """Do the same at once, without a loop; may be called twice."""
        pod = self._begun
        if pod is None:
            return
        for guest in (self._head, self._resident.child if self._resident else None):
            if guest is not None:
                guest.on_exit(lambda: None)
        pod.kill()

    # ---- preparing the next child

    def _prepare(self) -> None:
        """Begin to prepare a child for the next request; a resident guest needs but a place."""
        if self._pod.failure is None and self._resident is None:
            self._next = self._start(self._prepare_next())
        elif self._forked is not None:
            self._forked.moved.set()

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        task.add_done_callback(_retrieve)
        return task

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._start(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _settle_down(self) -> None:
        """Wait until the cell before is committed."""
        if self._settled is not None:
            await self._settled

    async def _prepare_next(self) -> Prepared:
        forked, self._forked = self._forked, None
        if forked is not None:
            prepared = await self._place_fork(forked)
        else:
            await self._settle_down()
            assert self._head is not None
            prepared = await self._place(await self._pod.fork(self._head))
        await self._settle_down()
        if self._spare is None:
            self._spare = self._start(self._pod.builder.build())
        return prepared

    async def _place_fork(self, forked: Fork) -> Prepared:
        """Place a child that the cell before forked while it was about to park."""
        try:
            child = await forked.child
            assert self._layered is not None
            await self._layered
            return await self._place(child)
        finally:
            forked.moved.set()

    async def _place(self, child: Guest) -> Prepared:
        """Let a child enter a new place; closes it when that fails."""
        try:
            place = await self._take_place()
            try:
                self._pod.limit(place, self.spec.limits)
                notes = await self._pod.enter(child, place)
            except BaseException:
                await self._pod.drop(place)
                raise
        except BaseException:
            child.close()
            raise
        place.release_namespaces()
        if not self._lock.locked():  # no request is waiting: time to get ready for one
            child.link.send({"op": "warm"})
        return Prepared(child, place, notes)

    async def _take_place(self) -> Place:
        spare, self._spare = self._spare, None
        if spare is not None:
            return await spare
        return await self._pod.builder.build()

    async def _drop_spare(self) -> None:
        """Throw away the container that was built ahead: it lacks the files just committed."""
        spare, self._spare = self._spare, None
        if spare is not None:
            with contextlib.suppress(SandboxError):
                self._in_background(self._pod.drop(await spare))

    async def _take(self) -> Prepared:
        """Give a guest that is ready; one more try if the one at hand has died meanwhile."""
        await self.ready()
        await self._settle_down()
        if self._resident is not None:
            return await self._take_resident(self._resident)
        for _ in range(2):
            if self._next is None:
                self._prepare()
            assert self._next is not None
            task, self._next = self._next, None
            try:
                prepared: Prepared = await task
            except ProtocolError as error:
                log.warning("a prepared child was lost: %s", error)
                continue
            if prepared.child.link.failure is None:
                return prepared
            prepared.child.close()
            await self._pod.drop(prepared.place)
        raise SessionLost("no child of the session's head comes up", hint=RESTART_HINT)

    async def _take_resident(self, before: Prepared) -> Prepared:
        """Let the resident guest go on in a new place, after a fork of it became the head."""
        place = await self._take_place()
        try:
            self._pod.limit(place, self.spec.limits)
            head = await resident.checkpoint(self._pod, before.child)
            self._become_head(head, None)
            notes = await resident.move_on(self._pod, before.child, before.place, place)
        except BaseException:
            await self._pod.drop(place)
            raise
        return Prepared(before.child, place, notes, before.fragile)

    # ---- requests

    async def execute(self, execution: Execution, limits: Limits, sink: Sink) -> CellResult:
        """Run one cell; every event has been given when it returns.

        Raises ConfigError for a disk limit below what is in use, SessionLost, LaunchError.
        """
        body: Json = {
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
        body: Json = {"op": "comm", "msg_type": msg_type, "content": content, "metadata": metadata}
        body["open_files"] = self.spec.limits.open_files
        async with self._lock:
            return await self._run(body, tuple(map(bytes, buffers)), self.spec.limits, sink)

    async def ask(self, msg_type: str, content: Json) -> Json:
        """Answer a completion or inspection from a fork that is thrown away."""
        async with self._lock:
            await self.ready()
            if self._resident is not None:
                fork = await self._pod.fork(self._resident.child, live=True)
                prepared = await self._place(fork)
            else:
                prepared = await self._take()
            try:
                prepared.child.link.send({"op": "ask", "msg_type": msg_type, "content": content})
                frame = await prepared.child.link.expect("answer", timeout_s=ASK_TIMEOUT_S)
            finally:
                prepared.child.close()
                await self._pod.drop(prepared.place)
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
        if limits != self.spec.limits:
            self._pod.limit(prepared.place, limits)
        cell = Cell(
            prepared.child, prepared.place.cgroup, limits, grace_s=self.spec.grace_s, sink=sink
        )
        self._cell, self._running = cell, prepared
        was_resident = self._resident is not None
        try:
            verdict = await cell.run(body, buffers)
            if self._pod.failure is not None:
                prepared.child.close()
                raise self._pod.failure
            usage = await self._conclude(prepared, cell, verdict)
        finally:
            self._cell = self._running = None
        self._prepare()
        carried, self._notes = self._notes, ()
        return CellResult(
            outcome=verdict.outcome,
            committed=verdict.committed,
            usage=usage,
            limits=limits,
            container_id=prepared.place.container_id,
            resident=was_resident,
            reply=verdict.reply,
            traceback=verdict.traceback,
            exit_code=verdict.exit_code,
            signal=verdict.signal,
            notes=(*prepared.notes, *verdict.notes, *carried),
        )

    async def _conclude(self, prepared: Prepared, cell: Cell, verdict: Verdict) -> Usage:
        """See to it that nothing of the cell runs on; commit or roll back behind the reply."""
        if not verdict.committed:
            return await self._roll_back(prepared, cell)
        self.comms = dict(verdict.comms)
        cgroup = prepared.place.cgroup
        await resident.kill_others(cgroup, prepared.child)
        usage = self._measure(prepared, cell)
        if "processes" not in self.spec.waived:  # a fork is due, also of a cell with many threads
            cgroup.limit(processes=self.spec.ceiling.processes + FORKS)
        forked = None
        if verdict.alone and not verdict.threads:  # the next child, while this one parks
            forked = Fork(self._start(self._pod.fork(prepared.child)), asyncio.Event())
        self._forked = forked
        self._layered = self._start(self._layer(prepared))
        self._settled = self._start(self._settle(prepared, verdict, forked))
        return usage

    async def _layer(self, prepared: Prepared) -> bool:
        """Commit the files of a cell; tell whether there are any."""
        layer = prepared.place.layer
        answer = await self._pod.supervisor.ask(
            {"op": "commit", "layer": layer}, "committed", key=layer
        )
        changed = bool(answer["changed"])
        if changed:
            await self._drop_spare()
            self._squasher.consider(int(answer["depth"]), int(answer["disk_bytes"]))
        self._squasher.advance(layer)
        return changed

    async def _settle(self, prepared: Prepared, verdict: Verdict, forked: Fork | None) -> None:
        """Commit; a guest that does not play its part is thrown away, and the head stays."""
        try:
            await self._keep(prepared, verdict, forked)
        except (ProtocolError, SessionLost) as error:
            if self._pod.failure is not None:
                raise
            self._notes = (f"The variables are as they were before the last cell: {error}.",)
            prepared.child.close()
            await self._pod.drop(prepared.place)

    async def _keep(self, prepared: Prepared, verdict: Verdict, forked: Fork | None) -> None:
        """Make the child the head, or keep it as it is; its files become a layer."""
        child, place, pod = prepared.child, prepared.place, self._pod
        assert self._layered is not None
        child.on_exit(lambda: None)
        if verdict.threads:  # a fork would lose them: the child itself goes on
            if self._resident is None:
                pod.watch(child)  # its parent, the head, is about to be replaced
            self._resident = Prepared(child, place, (), verdict.fragile)
            child.on_exit(self._resident_died)
            await self._layered
            return
        head = child
        if forked is not None:
            await pod.park(child)
            pod.watch(child)
        else:  # its threads are such as a fork may lose; but a head has one thread
            head = await resident.checkpoint(pod, child)
            child.retire()
        self._resident = None
        self._become_head(head, None if await self._layered else place.layer)
        if forked is not None:
            await forked.moved.wait()  # until then the fork is in this cell's cgroup
        place.close()

    def _resident_died(self) -> None:
        """Return to the head: a thread of the resident guest has killed it between two cells."""
        if self._resident is None:
            return
        gone, self._resident = self._resident, None
        gone.child.close()
        self._notes = (
            "A thread that an earlier cell left running crashed. "
            "The variables are as they were before that cell.",
        )
        self._in_background(asyncio.to_thread(gone.place.close))
        self._prepare()

    async def _roll_back(self, prepared: Prepared, cell: Cell) -> Usage:
        """Kill everything in the cell's container and drop its files."""
        child, place = prepared.child, prepared.place
        place.cgroup.kill()
        usage = self._measure(prepared, cell)
        self._pod.discard(place.layer)
        child.on_exit(lambda: None)
        child.close()
        await asyncio.to_thread(place.close)
        if self._resident is not None:
            self._resident = None
            if prepared.fragile:
                assert self._head is not None
                self._notes = await resident.rehydrate(self._pod, self._head, self._adopt)
        return usage

    def _adopt(self, head: Guest, layer: int | None) -> None:
        self._become_head(head, layer)

    def _measure(self, prepared: Prepared, cell: Cell) -> Usage:
        output = prepared.child.output
        output.drain()
        output.stop()
        counted = prepared.place.cgroup.usage()
        assert self._head is not None
        disk_bytes = self._pod.files_bytes(self._head)
        used, self._disk_used = max(disk_bytes - self._disk_used, 0), disk_bytes
        return Usage(
            wall_s=cell.wall_s,
            cpu_s=counted.cpu_s,
            peak_memory_bytes=counted.peak_memory_bytes,
            peak_processes=counted.peak_processes,
            disk_bytes=used,
            output_bytes=output.bytes_seen,
        )

    async def _set_disk(self, disk_bytes: int) -> None:
        if disk_bytes == self._disk_limit:
            return
        await self.ready()
        answer = await self._pod.supervisor.ask(
            {"op": "resize", "disk_bytes": disk_bytes}, "resized"
        )
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
        if self._begun is None or self._begun.failure is not None:
            return Usage()
        cgroup = self._begun.cgroup
        counted = cgroup.usage()
        return Usage(
            cpu_s=counted.cpu_s,
            peak_memory_bytes=counted.memory_bytes,
            peak_processes=len(cgroup.processes()),
            disk_bytes=self._disk_used,
        )


def _refuse(frame: Frame) -> None:
    raise ProtocolError(f"a head said {frame.op[:40]!r} though nobody asked")


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Look at a task's exception, so that asyncio does not report one that is handled later."""
    if not task.cancelled():
        task.exception()
