"""When to merge the layers of a session, and when the merged ones can go.

Old layers keep what later cells have overwritten or deleted, so they are merged when there are
many, and when half of the scratch file system is in use.
"""

from __future__ import annotations

import asyncio

from sandbox_kernel.errors import SandboxError
from sandbox_kernel.session.pod import Pod

DEPTH = 24
"""An overlay mounts in 0.3 ms with 20 lower layers; Linux takes 500 at most."""


class Squasher:
    """Have init merge layers in the background."""

    def __init__(self, pod: Pod, disk_bytes: int) -> None:
        self._pod = pod
        self._half_bytes = disk_bytes // 2
        self._task: asyncio.Task[None] | None = None
        self._obsolete: list[int] = []
        self._since = 0

    def consider(self, depth: int, used_bytes: int) -> None:
        """Begin to merge if it is time; `used_bytes` is what the files of all layers take."""
        busy = self._task is not None and not self._task.done()
        if busy or self._obsolete or depth < 2:
            return
        if depth >= DEPTH or used_bytes >= self._half_bytes:
            self._task = asyncio.create_task(self._squash())

    async def _squash(self) -> None:
        layer = self._pod.builder.number_layer()
        try:
            answer = await self._pod.supervisor.ask(
                {"op": "squash", "layer": layer}, "squashed", key=layer
            )
        except SandboxError:
            return  # the session is going down
        self._since = self._pod.builder.number_layer()
        self._obsolete = [int(number) for number in answer["obsolete"]]

    def advance(self, layer: int) -> None:
        """Throw merged layers away once the newest committed cell was built without them.

        Places are used in the order in which they were built, so whoever comes after was, too.
        """
        if self._obsolete and layer >= self._since:
            self._pod.discard(*self._obsolete)
            self._obsolete = []
