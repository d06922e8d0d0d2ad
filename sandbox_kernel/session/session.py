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
import logging
from collections.abc import Callable, Mapping

from sandbox_kernel.errors import HostError, LaunchError, ProtocolError, SandboxError, SessionLost
from sandbox_kernel.model import (
    CellResult,
    CommMessage,
    Event,
    Execution,
    Json,
    Limits,
    Outcome,
    SessionSpec,
    Usage,
)
from sandbox_kernel.session import resident, scratch
from sandbox_kernel.session.account import Account
from sandbox_kernel.session.ahead import Ahead, Fork, Prepared, prime_request
from sandbox_kernel.session.background import Background, aside
from sandbox_kernel.session.cell import Cell, comm_body, execute_body
from sandbox_kernel.session.heads import HEAD_SPOILT, Heads
from sandbox_kernel.session.hints import Hints
from sandbox_kernel.session.pod import Pod
from sandbox_kernel.session.supervisor import RESTART_HINT
from sandbox_kernel.session.verdict import Verdict

Sink = Callable[[Event], None]

ASK_TIMEOUT_S = 5.0
ATTEMPTS = 4
FORKS = 8
"""What is forked of a guest on the session's behalf may go beyond the cell's limit."""

log = logging.getLogger("sandbox_kernel.session")


class Session:
    """One running session; everything but `begin` and `kill` runs in one asyncio loop."""

    def __init__(self, spec: SessionSpec) -> None:
        self.spec = spec
        self.comms: Mapping[str, str] = {}
        self._begun: Pod | None = None
        self._begun_heads: Heads | None = None
        self._resident: Prepared | None = None
        self._primed = False
        self._next: asyncio.Task[Prepared] | None = None
        self._forked: Fork | None = None
        self._settled: asyncio.Task[None] | None = None
        self._boot: asyncio.Task[None] | None = None
        self._cell: Cell | None = None
        self._running: Prepared | None = None
        self._notes: tuple[str, ...] = ()
        self._account = Account()
        self._background = Background()
        self._lock = asyncio.Lock()

    @property
    def _pod(self) -> Pod:
        if self._begun is None:
            raise SessionLost("the session was closed")
        return self._begun

    @property
    def _heads(self) -> Heads:
        if self._begun_heads is None:
            raise SessionLost("the session is not up")
        return self._begun_heads

    def begin(self) -> None:
        """Start the session's processes and return at once; raises HostError, ConfigError."""
        self._begun = Pod(self.spec)

    async def ready(self) -> None:
        """Wait until the session can run cells; raises LaunchError, SessionLost."""
        if self._boot is None:
            self._boot = self._background.start(self._finish_boot())
        await asyncio.shield(self._boot)
        if self._pod.failure is not None:
            raise self._pod.failure

    async def _finish_boot(self) -> None:
        pod = self._pod
        head = await pod.boot(self._lose)
        self._ahead = Ahead(pod, self._background, self._lock.locked)
        layer = await pod.supervisor.ask({"op": "commit", "layer": 0}, "committed")
        self._begun_heads = Heads(pod, self._note_return)
        self._heads.become(head, 0, has_files=layer["changed"])
        self._prepare()

    def _note_return(self) -> None:
        self._notes = (HEAD_SPOILT,)

    def _lose(self) -> None:
        """Take it that the session is dead: end what waits, and what is left of it."""
        self.kill()

    async def close(self) -> None:
        """End the session and remove every trace of it; may be called twice."""
        self.kill()
        await self._background.join()

    def kill(self) -> None:
        """Do the same at once, without a loop; may be called twice."""
        pod = self._begun
        if pod is None:
            return
        if self._cell is not None:
            self._cell.fail(pod.failure or SessionLost("the session was closed"))
        if self._forked is not None:
            self._forked.moved.set()
        if self._begun_heads is not None:
            self._begun_heads.release()
        if self._resident is not None:
            self._resident.child.on_exit(lambda: None)
        pod.kill()

    def _prepare(self) -> None:
        """Begin to prepare a child for the next request; a resident guest needs but a place."""
        if self._pod.failure is None and self._resident is None:
            self._next = self._background.start(self._prepare_next())
        elif self._forked is not None:
            self._forked.moved.set()

    async def _settle_down(self) -> None:
        """Wait until the cell before is committed."""
        if self._settled is not None:
            await self._settled

    async def _prepare_next(self) -> Prepared:
        forked, self._forked = self._forked, None
        if forked is not None:
            prepared = await self._ahead.place_fork(forked)
        else:
            await self._settle_down()
            fork = self._background.start(self._pod.fork(self._heads.current))
            prepared = await self._ahead.place(fork)
        await self._settle_down()
        if not self._lock.locked():
            self._ahead.tidy_up(self._heads.prove)
        return prepared

    async def _take(self) -> Prepared:
        """Give a guest that is ready; some more tries if the one at hand has died meanwhile."""
        await self.ready()
        await self._settle_down()
        if (live := self._resident) is not None:
            try:
                return await self._take_resident(live)
            except (ProtocolError, SessionLost):
                if self._pod.failure is not None:
                    raise
                self._resident_died()  # this very moment
        for left in reversed(range(ATTEMPTS)):
            task, self._next = self._next, None
            try:
                prepared = await (task or self._prepare_next())
            except (ProtocolError, HostError, LaunchError) as error:
                log.warning("a prepared child was lost: %s", error)
                is_new = isinstance(error, LaunchError) and task is None  # not of a moment ago
                if is_new or (not left and isinstance(error, HostError)):
                    raise
                if left < ATTEMPTS - 1 and isinstance(error, ProtocolError):
                    self._heads.go_back()
                continue
            if prepared.is_ready:
                return prepared
            await self._abandon(prepared)
        raise SessionLost("no child of the session's head comes up", hint=RESTART_HINT)

    async def _abandon(self, prepared: Prepared) -> None:
        """Throw away a guest that is not where it should be, or whose cell did not end as due."""
        if self._resident is not None and self._resident.child is prepared.child:
            self._resident = None
        prepared.child.retire()
        await self._pod.drop(prepared.place)

    async def _take_resident(self, before: Prepared) -> Prepared:
        """Let the resident guest go on in a new place, after a fork of it became the head."""
        place = await self._ahead.take_place()
        try:
            head = await resident.checkpoint(self._pod, before.child)
            self._heads.adopt(head, None)
            notes = await resident.move_on(self._pod, before.child, before.place, place)
        except BaseException:
            await self._pod.drop(place)
            raise
        return Prepared(before.child, place, notes, before.fragile)

    async def execute(self, execution: Execution, limits: Limits, sink: Sink) -> CellResult:
        """Run one cell; every event has been given when it returns.

        Raises ConfigError for a disk limit below what is in use, SessionLost, LaunchError.
        """
        async with self._lock:
            return await self._run(execute_body(execution, limits), (), limits, sink)

    async def comm(self, message: CommMessage, sink: Sink) -> CellResult:
        """Hand a comm message to its handler; its state is kept if the handler succeeds."""
        limits = self.spec.limits
        async with self._lock:
            return await self._run(comm_body(message, limits), message.buffers, limits, sink)

    async def ask(self, msg_type: str, content: Json) -> Json:
        """Answer a completion or inspection from a fork that is thrown away."""
        async with self._lock:
            await self.ready()
            if msg_type == "complete_request" and not self._primed:
                self._primed = True
                body, limits = prime_request(self.spec.limits)
                await self._run(body, (), limits, lambda _: None)
            await self._settle_down()
            if self._resident is not None:
                fork = self._pod.fork(self._resident.child, live=True)
                prepared = await self._ahead.place(self._background.start(fork))
            else:
                prepared = await self._take()
            try:
                prepared.child.link.send({"op": "ask", "msg_type": msg_type, "content": content})
                frame = await prepared.child.link.expect("answer", timeout_s=ASK_TIMEOUT_S)
            finally:
                await self._abandon(prepared)
                self._prepare()
        answer = frame.body.get("content")
        if not isinstance(answer, dict):
            raise ProtocolError("an answer is no object")
        return answer

    async def _run(
        self, body: Json, buffers: tuple[bytes, ...], limits: Limits, sink: Sink
    ) -> CellResult:
        """Run one request; a fault that leaves no session to go on with is SessionLost."""
        await self.ready()
        try:
            await self._pod.resize(limits.disk_bytes)
            return await self._run_prepared(body, buffers, limits, sink)
        except SandboxError as error:
            # What the pod died of is what counts, not what followed from it.
            self._pod.end_if_lost(error)
            if (failure := self._pod.failure) is not None and failure is not error:
                raise failure from error
            raise

    async def _run_prepared(
        self, body: Json, buffers: tuple[bytes, ...], limits: Limits, sink: Sink
    ) -> CellResult:
        prepared = await self._take()
        hints = Hints(limits, self.spec.ceiling, lambda: scratch.look(self._heads.current))
        cell = Cell(
            prepared.child, prepared.place.cgroup, hints, grace_s=self.spec.grace_s, sink=sink
        )
        self._cell, self._running = cell, prepared
        was_resident = self._resident is not None
        try:
            if limits != self.spec.limits:
                self._pod.limit(prepared.place, limits)
            # When this is called the request is sent.
            asyncio.get_running_loop().call_soon(self._ahead.tidy_up, self._heads.prove)
            verdict = await cell.run(body, buffers)
            usage = await self._conclude(prepared, cell, verdict)
        except SandboxError:
            await self._abandon(prepared)
            raise
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
            notes=(*prepared.notes, *verdict.notes, *carried, *self._pod.explain(verdict.reply)),
        )

    async def _conclude(self, prepared: Prepared, cell: Cell, verdict: Verdict) -> Usage:
        """See to it that nothing of the cell runs on; commit or roll back behind the reply."""
        if not verdict.committed:
            return await self._roll_back(prepared, cell)
        self.comms = dict(verdict.comms)
        cgroup = prepared.place.cgroup
        await resident.kill_others(cgroup, prepared.child)
        usage = self._account.of_cell(self._pod, self._heads.current, prepared, cell)
        if verdict.threads:  # a fork would lose them: the guest itself goes on
            if self._resident is None:
                self._pod.watch(prepared.child)  # its parent, the head, is about to be replaced
            self._resident = Prepared(prepared.child, prepared.place, (), verdict.fragile)
            prepared.child.on_exit(self._resident_died)
        else:
            self._resident = None
            prepared.child.on_exit(lambda: None)
        if "processes" not in self.spec.waived:  # a fork is due, also of a cell with many threads
            cgroup.limit(processes=self.spec.ceiling.processes + FORKS)
        forked = None
        if verdict.alone and not verdict.threads:  # the next child, while this one parks
            forked = Fork(self._background.start(self._pod.fork(prepared.child)), asyncio.Event())
        self._forked = forked
        self._ahead.commit_layer(prepared.place.layer)
        self._settled = self._background.start(self._settle(prepared, verdict, forked))
        return usage

    async def _settle(self, prepared: Prepared, verdict: Verdict, forked: Fork | None) -> None:
        """Commit; a guest that does not play its part is thrown away, and the head stays."""
        try:
            await self._keep(prepared, verdict, forked)
        except SandboxError as error:
            self._pod.end_if_lost(error)
            if self._pod.failure is not None:
                raise
            self._notes = (f"Files and variables are as they were before the last cell: {error}.",)
            if forked is not None:
                await forked.abandon()
            await self._abandon(prepared)

    async def _keep(self, prepared: Prepared, verdict: Verdict, forked: Fork | None) -> None:
        """Make the child the head, or keep it as it is; its files become a layer."""
        child, place, pod = prepared.child, prepared.place, self._pod
        if verdict.threads:
            await self._ahead.layered()
            return
        head = child
        if forked is not None:
            await pod.park(child)
            pod.watch(child)
        else:  # its threads are such as a fork may lose; but a head has one thread
            head = await resident.checkpoint(pod, child)
            child.retire()
        self._heads.become(head, place.layer, has_files=await self._ahead.layered())
        if forked is not None:
            await forked.moved.wait()  # until then the fork is in this cell's cgroup
        place.close()

    def _resident_died(self) -> None:
        """Return to the head: a thread of the resident guest has killed it between two cells."""
        if self._resident is None:
            return
        gone, self._resident = self._resident, None
        gone.child.close()
        self._notes = (resident.THREAD_CRASHED,)
        self._background.start(aside(gone.place.close))
        self._prepare()

    async def _roll_back(self, prepared: Prepared, cell: Cell) -> Usage:
        """Kill everything in the cell's container and drop its files."""
        child, place = prepared.child, prepared.place
        place.cgroup.kill()
        usage = self._account.of_cell(self._pod, self._heads.current, prepared, cell)
        await self._pod.discarded(place.layer)  # or we learn that init is dead, too
        child.on_exit(lambda: None)
        child.close()
        await aside(place.close)
        if self._resident is not None:
            self._resident = None
            if prepared.fragile:
                heads = self._heads
                self._notes = await resident.rehydrate(self._pod, heads.current, heads.adopt)
        return usage

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
        return self._account.in_all(self._begun)
