"""The kernel's side of building containers, with a builder and cgroups that the test plays."""

from __future__ import annotations

import asyncio
import os
from typing import Any, cast

import pytest

from sandbox_kernel.container import control
from sandbox_kernel.linux.cgroup import Cgroup
from sandbox_kernel.session.place import Builder
from sandbox_kernel.session.supervisor import Supervisor


class Group:
    """A cgroup that a killed process cannot be moved to."""

    def __init__(self, *, gone: bool = False) -> None:
        self.gone = gone

    def child(self, name: str) -> Group:
        return Group()

    def add(self, pid: int) -> None:
        if self.gone:
            raise ProcessLookupError

    def kill(self) -> None: ...

    def remove(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.asyncio
async def test_a_container_stands_though_its_builder_was_killed_behind_the_answer() -> None:
    init, _init_far = control.pair()
    ours, theirs = control.pair()
    group = cast(Cgroup, Group(gone=True))
    builder = Builder(Supervisor(init), ours, cast(Cgroup, Group()), group)
    control.send(theirs, {"op": "here"})
    building = asyncio.create_task(builder.build())
    await asyncio.sleep(0)
    far_ends = [os.pipe() for _ in range(5)]
    try:
        control.send(theirs, {"op": "built"}, tuple(write for _, write in far_ends))
    finally:
        for _, write in far_ends:
            os.close(write)
    place = await building
    assert len(place.namespace_fds) == 5
    place.close()
    for read, _ in far_ends:
        assert os.read(read, 1) == b""  # nobody holds the other end any more
        os.close(read)
    builder.close()
    _close(init, _init_far, theirs)


def _close(*ends: Any) -> None:
    for end in ends:
        end.close()
