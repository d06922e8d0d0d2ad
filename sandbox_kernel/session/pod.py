"""The pod of a session: its processes and cgroups, and what can be done with a guest in them.

Here is how; when is decided in `session`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator

from sandbox_kernel.container.failure import REMEDIES
from sandbox_kernel.errors import (
    ConfigError,
    GuestGone,
    HostError,
    LaunchError,
    ProtocolError,
    SandboxError,
    SessionLost,
)
from sandbox_kernel.guest.wire import Frame
from sandbox_kernel.linux.cgroup import Cgroup, CgroupTree, session_name
from sandbox_kernel.linux.idmap import IdMap
from sandbox_kernel.model import (
    Json,
    Limits,
    SessionSpec,
    Usage,
    head_beside,
    total_memory_bytes,
)
from sandbox_kernel.session.background import aside
from sandbox_kernel.session.disks import DiskTraffic, limits_io
from sandbox_kernel.session.guest import Guest, status_of
from sandbox_kernel.session.place import Builder, Place
from sandbox_kernel.session.start import Started, allow_open_files, start
from sandbox_kernel.session.supervisor import RESTART_HINT, Supervisor
from sandbox_kernel.units import format_size

log = logging.getLogger("sandbox_kernel.session")

BOOT_TIMEOUT_S = 60.0
FORK_TIMEOUT_S = 10.0
ENTER_TIMEOUT_S = 10.0
"""A guest that was tampered with may never answer, and the next cell waits for as long."""
MONITOR_TIMEOUT_S = 5.0
NO_OPAQUE_FOLDERS = (
    "Before Linux 6.6 a folder of an earlier cell, or of the notebook, that held files cannot be "
    "deleted: delete its files and leave the folder, or use another name."
)
HEADS_PROCESSES = 16
"""A head, one that is about to replace it, a pristine one, and what they fork at the moment."""


class Pod:
    """Init, the heads' cgroup and the builder of places; closed by `kill`."""

    def __init__(self, spec: SessionSpec) -> None:
        self.spec = spec
        self._cgroups = contextlib.ExitStack()
        self._forked: dict[int, Guest] = {}
        self._fork_number = 0
        self._booted_once = False
        self._guests: list[Guest] = []
        self._closed = False
        self._disk_bytes = spec.limits.disk_bytes
        self._ids: IdMap | None = None
        self._deletes_folders = True
        allow_open_files(spec.ceiling.open_files)
        tree = CgroupTree.acquire()
        tree.sweep()
        with contextlib.ExitStack() as stack:
            name = session_name(spec.session_id)
            cgroup = stack.enter_context(tree.session(name, io=limits_io(spec)))
            ceiling = spec.ceiling
            if "memory" not in spec.waived:
                cgroup.limit(memory_bytes=total_memory_bytes(ceiling))
            if "cpu_time" not in spec.waived and not cgroup.counts_cpu:
                raise HostError(
                    "this host cannot limit cpu_time: it does not count the time of a cgroup",
                    hint="see `sandbox-kernel doctor`",
                )
            init = self._init = stack.enter_context(cgroup.child("init"))
            self._heads = stack.enter_context(cgroup.child("heads"))
            # A head only forks; one that a hostile cell has tampered with shall do little else.
            if "processes" not in spec.waived:
                self._heads.limit(processes=HEADS_PROCESSES)
            if "cpus" not in spec.waived:
                self._heads.limit(cpus=ceiling.cpus)
            self._traffic = DiskTraffic(spec, cgroup)
            self._traffic.limit(self._heads, ceiling)
            self.cgroup: Cgroup = cgroup
            self._started: Started = start(spec, cgroup, init)
            self._cgroups = stack.pop_all()
        self.supervisor = Supervisor(self._started.control)
        self.builder = Builder(self.supervisor, self._started.builder, cgroup, init)

    @property
    def ids(self) -> IdMap:
        """Which ids of the host the session's users are; known once it has booted."""
        if self._ids is None:
            raise SessionLost("the session has not begun")
        return self._ids

    @property
    def failure(self) -> SandboxError | None:
        """Why the pod is dead, if it is."""
        return self.supervisor.failure

    def end_if_lost(self, error: SandboxError) -> None:
        """End the pod after an error that tells it is lost, or where a cgroup of its is gone.

        Its processes were moved out of limits and counters then, and could only be forked there.
        """
        if self.failure is None and isinstance(error, SessionLost):
            self.supervisor.lose(error)
        for group in (self.cgroup, self._init, self._heads):
            if self.failure is None and not group.exists():
                what = f"somebody has removed the cgroup {group.paths[0]} of the session"
                hint = f"see what cleans up cgroups here; {RESTART_HINT}"
                self.supervisor.lose(SessionLost(what, hint=hint))

    async def boot(self, on_lost: Callable[[], None]) -> Guest:
        """Give the first head, once init and it are up; raises LaunchError, SessionLost."""
        self.supervisor.attach(on_lost)
        self._booted_once = True
        head = self._guest(self._started.head)
        head = await self._booted(head, self.supervisor.expect("started"), layer=0)
        self._traffic.limit_remains()
        return head

    async def boot_again(self) -> tuple[Guest, int]:
        """Give a second pristine head, and its layer."""
        layer = self.builder.number_layer()
        ours, theirs = socket.socketpair()
        head = self._guest(ours)
        with theirs:
            started = self.supervisor.expect("started", key=layer)
            self.supervisor.send({"op": "boot", "layer": layer}, (theirs.fileno(),))
        return await self._booted(head, started, layer=layer), layer

    async def _booted(self, head: Guest, started: asyncio.Future[Json], *, layer: int) -> Guest:
        head.output.close()
        try:
            answer = await asyncio.wait_for(started, BOOT_TIMEOUT_S)
            if (why := answer.get("failed")) is not None:
                raise LaunchError(why["step"], why["cause"], hint=why["hint"])
            self._ids = IdMap.from_json(answer["ids"])
            if (why := answer["ids_why"]) and layer == 0:
                log.info("cells and heads have one user id, signals are guarded: %s", why)
            self._deletes_folders = bool(answer["keeps_attributes"])
            await head.link.expect("parked", timeout_s=BOOT_TIMEOUT_S)
            head.identify()
            self._heads.add(head.pid)
            self._verify(head, *self._head_ids)
        except (SandboxError, ProcessLookupError, TimeoutError) as error:
            head.close()
            # Init's word about the step that failed says more than the end of the link.
            if self.failure is None and isinstance(error, LaunchError):
                raise
            what = f"the first guest does not come up: {error}"
            raise self.failure or SessionLost(what, hint=RESTART_HINT) from None
        return head

    async def fork(self, parent: Guest, *, live: bool = False) -> Guest:
        """Fork a guest; `live` tells that threads of the parent are left behind.

        The child has a link and pipes of its own, and is held by a pidfd.
        """
        ours, theirs = socket.socketpair()
        child = self._guest(ours)
        self._fork_number += 1
        self._forked[self._fork_number] = child
        with theirs:
            fds = (theirs.fileno(), *child.output.write_ends)
            parent.link.send({"op": "fork", "id": self._fork_number, "live": live}, fds)
        child.output.close_write_ends()
        try:
            await child.link.expect("hello", timeout_s=FORK_TIMEOUT_S)
            child.identify()
        except GuestGone as error:
            child.close()
            if self.failure is not None:
                raise self.failure from error
            if parent.is_head and parent.link.failure is None:
                hint = f"{REMEDIES[errno.EAGAIN]}; restart the kernel if that does not help"
                raise HostError("the session's head could not be forked", hint=hint) from error
            raise ProtocolError("a guest could not be forked") from error
        except BaseException:
            child.close()
            raise
        return child

    def _guest(self, sock: socket.socket) -> Guest:
        guest = Guest(sock)
        guest.link.on_child_exit = self._hear
        self._guests = [known for known in self._guests if not known.closed] + [guest]
        # A head that was replaced has told nobody how its last fork ended, and never will.
        self._forked = {number: it for number, it in self._forked.items() if not it.closed}
        return guest

    def _hear(self, frame: Frame) -> None:
        """Hear from a guest how a fork of it ended; a lie changes no more than a verdict's text."""
        numbers = [frame.body.get(name) for name in ("id", "code", "status")]
        if not all(type(number) is int for number in numbers):
            raise ProtocolError("a guest did not say which child ended how")
        number, code, status = map(int, map(str, numbers))
        child = self._forked.pop(number, None)
        if child is not None:
            child.set_status(code, status)

    def limit(self, place: Place, limits: Limits) -> None:
        """Set a place's limits."""
        waived = self.spec.waived
        place.cgroup.limit(
            memory_bytes=None if "memory" in waived else limits.memory_bytes,
            cpus=None if "cpus" in waived else limits.cpus,
            processes=None if "processes" in waived else limits.processes,
        )
        self._traffic.limit(place.cgroup, limits)

    async def enter(self, child: Guest, place: Place) -> tuple[str, ...]:
        """Move a child into a place; give its notes about what could not be carried along."""
        try:
            place.cgroup.add(child.pid)
        except ProcessLookupError:
            raise ProtocolError("a child died before it was placed") from None
        with self._gate(child, "enter"):
            child.link.send({"op": "enter"}, place.namespace_fds)
            notes = await self._ready(child)
            self._verify(child, self.spec.image.uid, self.spec.image.gid)
        return notes

    def explain(self, reply: Json) -> tuple[str, ...]:
        """Say what an exception of the user's code has to do with this host, if it has."""
        if self._deletes_folders or not str(reply.get("evalue")).startswith(f"[Errno {errno.EIO}]"):
            return ()
        return (NO_OPAQUE_FOLDERS,)

    @contextlib.contextmanager
    def _gate(self, guest: Guest, kind: str) -> Iterator[None]:
        """Let a guest through init's gate, and shut it again if it did not go through."""
        self.supervisor.send({"op": "gate", "pid": guest.pid_inside, "kind": kind})
        try:
            yield
        except BaseException:
            # The pid may be another process' soon.
            with contextlib.suppress(SessionLost):
                self.supervisor.send({"op": "gate", "pid": guest.pid_inside, "kind": "shut"})
            guest.link.kill()
            raise

    async def _ready(self, child: Guest) -> tuple[str, ...]:
        frame = await child.link.expect("ready", timeout_s=ENTER_TIMEOUT_S)
        notes = frame.body.get("notes")
        return tuple(str(n)[:500] for n in notes[:20]) if isinstance(notes, list) else ()

    async def graft(self, guest: Guest, place: Place, mount_namespace: int) -> tuple[str, ...]:
        """Give a guest that goes on with its threads the root and the cgroup of a new place.

        Threads keep a process out of `setns`, so the new root is moved into its mount namespace.
        """
        place.cgroup.add(guest.pid)
        body = {"op": "graft", "layer": place.layer}
        answer = self.supervisor.expect("grafted", key=place.layer)
        self.supervisor.send(body, (place.namespace_fds[0], mount_namespace))
        if "error" in (reply := await answer):
            raise ProtocolError(f"a resident guest got no new root: {reply['error']}")
        guest.link.send({"op": "switch"})
        return await self._ready(guest)

    async def park(self, child: Guest) -> None:
        """Make a guest a head: another user, the heads' cgroup, its end reported by init."""
        try:
            self._heads.add(child.pid)
        except ProcessLookupError:
            raise ProtocolError("a guest died before it was parked") from None
        with self._gate(child, "park"):
            child.link.send({"op": "park"})
            await child.link.expect("parked", timeout_s=ENTER_TIMEOUT_S)
            self._verify(child, *self._head_ids)
        child.output.close()

    @property
    def _head_ids(self) -> tuple[int, int]:
        """User and group of heads: those of cells where there are no other."""
        image = self.spec.image
        if self.ids.is_alone:
            return image.uid, image.gid
        return (head_beside(image.uid),) * 2

    def _verify(self, guest: Guest, uid: int, gid: int) -> None:
        """Check that a guest is who it should be by now, with no capability in effect.

        It passed the gate by itself, and a hostile one may have stopped half-way. Raises
        ProtocolError.
        """
        uids = [str(self.ids.outside_uid(uid))] * 4
        gids = [str(self.ids.outside_gid(gid))] * 4
        try:
            fields = status_of(guest.pid)
        except OSError as error:
            raise ProtocolError(f"a guest is gone: {error.strerror}") from error
        for name, value in {"Uid": uids, "Gid": gids, "CapEff": ["0" * 16]}.items():
            if fields.get(name) != value:
                raise ProtocolError(f"a guest has {name} {fields.get(name)} where {value} is due")

    def end_strangers(self) -> None:
        """Kill what is in the heads' cgroup and no guest: a head that was tampered with forks."""
        known = {guest.pid for guest in self._guests if not guest.closed}
        if 0 in known:  # one is just being forked, and has not said who it is
            return
        for pid in self._heads.processes():
            if pid not in known:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def watch(self, guest: Guest) -> None:
        """Have init report the end of a guest whose parent is about to be killed."""

        def reaped(code: int, status: int) -> None:
            guest.set_status(code, status)

        self.supervisor.reaped[guest.pid_inside] = reaped
        self.supervisor.send({"op": "watch", "pid": guest.pid_inside})

    def usage(self, disk_bytes: int) -> Usage:
        """Give what all processes of the session used: CPU time in all, memory now."""
        counted = self.cgroup.usage()
        return Usage(
            cpu_s=counted.cpu_s,
            peak_memory_bytes=counted.memory_bytes,
            peak_processes=len(self.cgroup.processes()),
            disk_bytes=disk_bytes,
        )

    async def resize(self, disk_bytes: int) -> None:
        """Set how much the files of all layers may take; raises ConfigError below what they do."""
        if disk_bytes == self._disk_bytes:
            return
        answer = await self.supervisor.ask({"op": "resize", "disk_bytes": disk_bytes}, "resized")
        if "error" in answer:
            used = format_size(int(answer["used"]))
            raise ConfigError(
                f"disk={format_size(disk_bytes)} is below what the session's files take",
                hint=f"they take {used}; delete some, or give more",
            )
        self._disk_bytes = disk_bytes

    def discard(self, *layers: int) -> None:
        """Throw the files of layers away."""
        if self.failure is None and layers:
            self.supervisor.send({"op": "discard", "layers": layers})

    async def discarded(self, layer: int) -> None:
        """Throw the files of a layer away, and wait until init has taken note of it."""
        body = {"op": "discard", "layers": [layer]}
        await self.supervisor.ask(body, "discarded", key=layer)

    async def drop(self, place: Place) -> None:
        """Kill what is in a place and throw it and its files away."""
        await aside(place.close)
        self.discard(place.layer)

    def kill(self) -> None:
        """End every process and remove every cgroup; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self.supervisor.close()
        if not self._booted_once:  # else a guest has the socket, and closes it
            self._started.head.close()
        for guest in self._guests:
            guest.close()
        # The channel's end ends init, and with it everything; this is for an init that hangs.
        with contextlib.suppress(HostError):
            self.cgroup.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._started.monitor.wait(MONITOR_TIMEOUT_S)
        self.builder.close()
        try:
            self._cgroups.close()
        except HostError as error:  # every other trace is gone by now
            if any(map(os.path.exists, self.cgroup.paths)):  # the monitor could not do it either
                log.warning("%s; the next kernel that starts here removes it", error)
