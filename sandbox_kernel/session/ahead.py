"""What is made ahead of the next request: a container that is empty, a child that sits in one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from sandbox_kernel.errors import HostError, LaunchError, SandboxError, SessionLost
from sandbox_kernel.model import Json, Limits
from sandbox_kernel.session.background import Background
from sandbox_kernel.session.guest import Guest
from sandbox_kernel.session.place import Place
from sandbox_kernel.session.pod import Pod
from sandbox_kernel.session.squasher import Squasher

log = logging.getLogger("sandbox_kernel.session")

PRIME_TIMEOUT_S = 15.0


def prime_request(limits: Limits) -> tuple[Json, Limits]:
    """Give the frame that has a guest load what completions need, and what that may take.

    It runs the user's interpreter, which may make it last: a client waits for its completion.
    """
    body = {"op": "prime", "open_files": limits.open_files}
    return body, replace(limits, wall_time_s=min(limits.wall_time_s, PRIME_TIMEOUT_S))


@dataclass
class Prepared:
    """A guest that sits in a place and waits for a request."""

    child: Guest
    place: Place
    notes: tuple[str, ...] = ()
    fragile: tuple[str, ...] = ()
    """Native pools of a resident guest that a fork of it would miss."""

    @property
    def is_ready(self) -> bool:
        """Tell whether the guest lives, and nobody has moved it out of the place's limits."""
        return self.child.link.failure is None and self.place.cgroup.holds(self.child.pid)


@dataclass
class Fork:
    """A child that a cell's guest forks before it parks."""

    child: asyncio.Task[Guest]
    moved: asyncio.Event
    """Set when the child has left the cell's cgroup, or is dead."""

    async def abandon(self) -> None:
        """Kill the child: what it is a fork of was not committed."""
        self.moved.set()
        with contextlib.suppress(SandboxError):
            (await self.child).retire()


class Ahead:
    """Build places on the layers that are committed, and let children enter them.

    `is_waiting` tells whether a request waits for the next child.
    """

    def __init__(self, pod: Pod, background: Background, is_waiting: Callable[[], bool]) -> None:
        self._pod = pod
        self._background = background
        self._is_waiting = is_waiting
        self._squasher = Squasher(pod, pod.spec.limits.disk_bytes)
        self._spare: asyncio.Task[Place] | None = None
        self._layered: asyncio.Task[bool] | None = None

    def tidy_up(self, prove: Callable[[], None]) -> None:
        """Do what no request has to wait for; where one waits it is done once that runs.

        That is: let the head before the last go (`prove`), build the container after the next.
        """
        if self._pod.failure is not None:
            return
        prove()
        if self._spare is None:
            self._spare = self._background.start(self._pod.builder.build())

    async def take_place(self) -> Place:
        """Give a container that nobody is in, with the session's limits."""
        spare, self._spare = self._spare, None
        if spare is not None:
            try:
                return await self._limited(await spare)
            except (HostError, LaunchError) as error:  # as of then; it may be otherwise by now
                log.warning("a container that was built ahead is lost: %s", error)
        return await self._limited(await self._pod.builder.build())

    async def _limited(self, place: Place) -> Place:
        if place.closed:
            raise SessionLost("the session was closed")
        try:
            self._pod.limit(place, self._pod.spec.limits)
        except BaseException:
            await self._pod.drop(place)
            raise
        return place

    async def _drop_spare(self) -> None:
        """Throw away the container that was built ahead: it lacks the files just committed."""
        spare, self._spare = self._spare, None
        if spare is not None:
            with contextlib.suppress(SandboxError):
                self._background.start(self._pod.drop(await spare))

    def commit_layer(self, layer: int) -> None:
        """Begin to commit the files of a cell."""
        self._layered = self._background.start(self._commit(layer))

    async def layered(self) -> bool:
        """Wait until the files of the last cell are committed; tell whether there are any."""
        return self._layered is not None and await self._layered

    async def _commit(self, layer: int) -> bool:
        answer = await self._pod.supervisor.ask(
            {"op": "commit", "layer": layer}, "committed", key=layer
        )
        changed = bool(answer["changed"])
        if changed:
            await self._drop_spare()
            self._squasher.consider(int(answer["depth"]), int(answer["disk_bytes"]))
        self._squasher.advance(layer)
        return changed

    async def place_fork(self, forked: Fork) -> Prepared:
        """Place a child that the cell before forked while it was about to park."""
        try:
            await self.layered()
            return await self.place(forked.child)
        finally:
            forked.moved.set()

    async def place(self, forking: asyncio.Task[Guest]) -> Prepared:
        """Let a child enter a place that is built while it is forked; ends it where that fails."""
        try:
            place = await self.take_place()
            try:
                child = await forking
                notes = await self._pod.enter(child, place)
            except BaseException:
                await self._pod.drop(place)
                raise
        except BaseException:
            with contextlib.suppress(SandboxError):
                (await forking).close()
            raise
        place.release_namespaces()
        if not self._is_waiting():  # time to get ready for a request
            child.link.send({"op": "warm"})
        return Prepared(child, place, notes)
