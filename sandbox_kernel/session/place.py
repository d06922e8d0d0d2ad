"""Places for cells: a cgroup with limits and a container, built ahead and held by descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket

from sandbox_kernel.container import control
from sandbox_kernel.errors import GuestGone, HostError, LaunchError, SessionLost
from sandbox_kernel.linux.cgroup import Cgroup
from sandbox_kernel.session.background import aside
from sandbox_kernel.session.supervisor import Supervisor

log = logging.getLogger("sandbox_kernel.session")

BUILD_TIMEOUT_S = 30.0


class Place:
    """One container that nobody is in yet, or one cell is: cgroup, namespaces, layer."""

    def __init__(self, layer: int, cgroup: Cgroup, namespaces: list[int]) -> None:
        self.layer = layer
        self.container_id = secrets.token_hex(6)
        self.cgroup = cgroup
        self.closed = False
        self._namespaces = namespaces

    @property
    def namespace_fds(self) -> tuple[int, ...]:
        """The namespaces, in the order of `container.build.NAMESPACES`."""
        return tuple(self._namespaces)

    def occupy(self, namespaces: list[int]) -> None:
        """Take over the namespaces that were built for it."""
        if self.closed:  # while they were being built
            for fd in namespaces:
                os.close(fd)
            raise SessionLost("the session was closed")
        self._namespaces = namespaces

    def release_namespaces(self) -> None:
        """Let go of the namespaces but the first, of mounts, which a resident guest needs again.

        They live on as long as a process is in them.
        """
        while len(self._namespaces) > 1:
            os.close(self._namespaces.pop())

    def inherit_mounts(self, before: Place) -> None:
        """Take over the mount namespace of the place that a resident guest comes from."""
        while self._namespaces:
            os.close(self._namespaces.pop())
        self._namespaces.append(before._namespaces.pop(0))

    def close(self) -> None:
        """Kill what is inside, let go of everything, remove the cgroup.

        What resists keeps its limits, and goes with the session.
        """
        if self.closed:
            return
        self.closed = True
        while self._namespaces:
            os.close(self._namespaces.pop())
        try:
            self.cgroup.kill()
            self.cgroup.remove()
        except HostError as error:
            log.warning("a container is left for now: %s", error)
        finally:
            self.cgroup.close()


class Builder:
    """Have the builder make containers, each with a new layer and cgroup."""

    def __init__(
        self, supervisor: Supervisor, sock: socket.socket, session_cgroup: Cgroup, home: Cgroup
    ) -> None:
        self._supervisor = supervisor
        self._sock = sock
        self._sock.setblocking(False)
        self._session_cgroup = session_cgroup
        self._home = home
        self._pid: int | None = None
        self._next_layer = 1
        self._places: list[Place] = []
        self._lock = asyncio.Lock()
        self._readable = asyncio.Event()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def close(self) -> None:
        """Close the channel, and every place that is still open."""
        self._closed = True
        if self._loop is not None and not self._loop.is_closed() and self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._readable.set()  # whoever waits finds it closed
        for place in self._places:
            place.close()

    def number_layer(self) -> int:
        """Give the number of a new layer."""
        layer, self._next_layer = self._next_layer, self._next_layer + 1
        return layer

    async def build(self) -> Place:
        """Give a new place on the layers that are committed now; raises LaunchError."""
        async with self._lock:
            layer = self.number_layer()
            cgroup = self._session_cgroup.child(f"cell-{layer}")
            place = Place(layer, cgroup, [])
            self._places = [known for known in self._places if not known.closed] + [place]
            try:
                place.occupy(await self._construct(place, cgroup))
            except BaseException:
                await asyncio.shield(aside(place.close))
                raise
            return place

    async def _construct(self, place: Place, cgroup: Cgroup) -> list[int]:
        """Have the builder build; if it died, with a cell that was killed, have a new one do so."""
        try:
            return await self._try(place, cgroup)
        except GuestGone:
            self._renew()
            return await self._try(place, cgroup)

    def _renew(self) -> None:
        """Have init start a new builder."""
        if self._closed:
            raise SessionLost("the session was closed")
        if self._loop is not None:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._sock, theirs = control.pair()
        self._sock.setblocking(False)
        self._pid = None
        with theirs:
            self._supervisor.send({"op": "builder"}, (theirs.fileno(),))

    async def _try(self, place: Place, cgroup: Cgroup) -> list[int]:
        if self._pid is None:
            self._pid = (await self._next()).pid
        if self._pid is None:
            raise LaunchError("find the builder of containers", "it has no pid")
        try:
            # In the cell's cgroup before it makes the cgroup namespace, or the cell sees a path.
            cgroup.add(self._pid)
            body = {"op": "build", "layer": place.layer, "hostname": place.container_id}
            self._supervisor.send(body)
            packet = await self._next()
        except ProcessLookupError as error:
            raise GuestGone("the builder of containers died") from error
        except HostError as error:
            raise LaunchError("put the builder into the cell's cgroup", str(error)) from error
        with contextlib.closing(packet):
            if packet.op == "failed":
                raise LaunchError(str(packet.body.get("step")), str(packet.body.get("cause")))
            self._come_home(self._pid)
            return packet.take_fds()

    def _come_home(self, pid: int) -> None:
        """Take the builder out of the cell's cgroup; it may have been killed since it answered."""
        try:
            self._home.add(pid)
        except ProcessLookupError:
            pass  # the container stands; the next build finds the builder gone, and renews it
        except HostError as error:
            raise LaunchError("take the builder out of the cell's cgroup", str(error)) from error

    async def _next(self) -> control.Packet:
        if self._sock.fileno() < 0:
            raise SessionLost("the session was closed")
        self._loop = asyncio.get_running_loop()
        self._readable.clear()
        self._loop.add_reader(self._sock.fileno(), self._readable.set)
        try:
            await asyncio.wait_for(self._readable.wait(), BUILD_TIMEOUT_S)
            packet = control.receive(self._sock)
        except TimeoutError:
            raise LaunchError("build a container", f"no end after {BUILD_TIMEOUT_S:g} s") from None
        except (OSError, ValueError) as error:
            raise SessionLost("the session was closed") from error
        finally:
            if self._sock.fileno() >= 0:
                self._loop.remove_reader(self._sock.fileno())
        if packet is None:
            raise GuestGone("the builder of containers died")
        return packet
