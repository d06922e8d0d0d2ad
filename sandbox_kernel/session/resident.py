"""Resident mode: a guest whose threads outlive its cell goes on, and is forked only to go back.

What differs from the normal way: its network, IPC, UTS and cgroup namespaces stay those of its
first cell; cgroup, limits and root file system are new for every cell all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

from sandbox_kernel.errors import ProtocolError, SandboxError
from sandbox_kernel.linux.cgroup import Cgroup
from sandbox_kernel.session.background import aside
from sandbox_kernel.session.guest import Guest
from sandbox_kernel.session.place import Place
from sandbox_kernel.session.pod import Pod

CARRY_TIMEOUT_S = 120.0
THREAD_CRASHED = (
    "A thread that an earlier cell left running crashed. "
    "The variables are as they were before that cell."
)


async def checkpoint(pod: Pod, guest: Guest) -> Guest:
    """Fork a resident guest and park the fork: the state as of now, without the threads."""
    guest.link.handler = None
    head = await pod.fork(guest, live=True)
    try:
        await pod.park(head)
        pod.watch(head)
    except BaseException:
        head.close()
        raise
    return head


async def move_on(pod: Pod, guest: Guest, before: Place, place: Place) -> tuple[str, ...]:
    """Move a resident guest into a new place; the one before goes, with its cgroup."""
    mount_namespace = before.namespace_fds[0]
    notes = await pod.graft(guest, place, mount_namespace)
    place.inherit_mounts(before)
    await aside(before.close)
    return notes


async def kill_others(cgroup: Cgroup, guest: Guest) -> None:
    """Kill every process of a cell but its guest, and wait until they are gone."""
    while others := [pid for pid in cgroup.processes() if pid != guest.pid]:
        # Frozen, nothing can fork away while it is being killed; SIGKILL works on the frozen.
        await aside(cgroup.freeze)
        try:
            others = [pid for pid in cgroup.processes() if pid != guest.pid]
            pidfds = [fd for pid in others if (fd := _pidfd(pid)) is not None]
            for pidfd in pidfds:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            cgroup.thaw()
        await _gone(pidfds)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


async def _gone(pidfds: list[int]) -> None:
    loop = asyncio.get_running_loop()
    for pidfd in pidfds:
        gone = asyncio.Event()
        loop.add_reader(pidfd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)


async def rehydrate(
    pod: Pod, head: Guest, adopt: Callable[[Guest, int | None], None]
) -> tuple[str, ...]:
    """Carry the variables of a head whose native pools are dead into a pristine one, by pickle.

    Both ends run in containers of their own; what the one writes the other reads, the kernel
    never. On failure the head stays. Gives sentences for the user.
    """
    try:
        pristine, pristine_layer = await pod.boot_again()
    except SandboxError as error:
        return (f"{LOST_POOLS} They could not be started again: {error}",)
    try:
        fresh, layer, notes = await _carry(pod, head, pristine)
    except SandboxError as error:
        return (f"{LOST_POOLS} The variables could not be carried over to new ones: {error}",)
    finally:
        pristine.retire()
        pod.discard(pristine_layer)
    adopt(fresh, layer)
    return notes


LOST_POOLS = "Threads of a library were lost with the killed cell, so its functions may hang."


async def _carry(
    pod: Pod, head: Guest, pristine: Guest
) -> tuple[Guest, int | None, tuple[str, ...]]:
    async with contextlib.AsyncExitStack() as stack:
        source_place = await pod.builder.build()
        stack.push_async_callback(pod.drop, source_place)
        target_place = await pod.builder.build()
        pod.limit(source_place, pod.spec.limits)
        pod.limit(target_place, pod.spec.limits)
        source = await pod.fork(head)
        stack.callback(source.close)
        await pod.enter(source, source_place)
        target = await pod.fork(pristine)
        try:
            await pod.enter(target, target_place)
            notes = await _transfer(source, target)
            layer = await pod.supervisor.ask(
                {"op": "commit", "layer": target_place.layer}, "committed", key=target_place.layer
            )
            fresh = await checkpoint(pod, target)
        except BaseException:
            target.close()
            await pod.drop(target_place)
            raise
        target.retire()
        await aside(target_place.close)
    return fresh, None if layer["changed"] else target_place.layer, notes


async def _transfer(source: Guest, target: Guest) -> tuple[str, ...]:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        source.link.send({"op": "dump"}, (write_end,))
        target.link.send({"op": "load"}, (read_end,))
    finally:
        os.close(read_end)
        os.close(write_end)
    loaded = target.link.expect("loaded", timeout_s=CARRY_TIMEOUT_S)
    dumped = source.link.expect("dumped", timeout_s=CARRY_TIMEOUT_S)
    sentences: list[str] = []
    for frame in (await dumped, await loaded):
        left_out = frame.body.get("left_out")
        if not isinstance(left_out, list):
            raise ProtocolError("a guest did not say what it left out")
        sentences += [str(item)[:300] for item in left_out[:50]]
    head = "Threads of a library were lost with the killed cell; the variables were carried over."
    if sentences:
        head += " Not carried over: " + "; ".join(sentences) + "."
    return (head,)
