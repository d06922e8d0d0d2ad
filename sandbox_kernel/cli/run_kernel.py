"""A kernel of our own for `run`: start it by jupyter_client, run cells on it, end it.

It is the kernel that Jupyter would start, with the same arguments; only the kernelspec is not
installed anywhere.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from queue import Empty
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from sandbox_kernel.errors import SandboxError

START_TIMEOUT_S = 60.0
ALIVE_INTERVAL_S = 1.0
"""How often a silent kernel is looked at."""

Json = dict[str, Any]


class OneSpec(KernelSpecManager):
    """Knows one kernelspec, which is on no disk."""

    def __init__(self, spec: Json) -> None:
        super().__init__()
        self._spec = KernelSpec(**spec)

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Give it, whatever the name."""
        return self._spec


class Kernel:
    """A running kernel and the one client of it."""

    def __init__(self, manager: AsyncKernelManager, client: AsyncKernelClient) -> None:
        self._manager = manager
        self._client = client

    async def language_info(self) -> Json:
        """Give what a notebook's metadata says about the language."""
        reply = await self._client.kernel_info(reply=True, timeout=START_TIMEOUT_S)
        info: Json = reply["content"].get("language_info", {})
        return info

    async def execute(self, code: str, on_message: Callable[[Json], None]) -> Json:
        """Run a cell, hand on what it publishes as it comes, and give the reply.

        Raises SandboxError if the kernel ends.
        """
        msg_id = self._client.execute(code, allow_stdin=False)
        while True:
            message = await self._next(self._client.get_iopub_msg, msg_id)
            if message["msg_type"] != "status":
                on_message(message)
            elif message["content"]["execution_state"] == "idle":
                break
        return await self._next(self._client.get_shell_msg, msg_id)

    async def _next(self, get: Callable[..., Any], msg_id: str) -> Json:
        """Give the next message of a channel that answers `msg_id`."""
        while True:
            try:
                message: Json = await get(timeout=ALIVE_INTERVAL_S)
            except Empty:
                if not await self._manager.is_alive():
                    raise SandboxError(
                        "the kernel ended while a cell was running",
                        hint="run `sandbox-kernel doctor`",
                    ) from None
                continue
            if message["parent_header"].get("msg_id") == msg_id:
                return message

    async def interrupt(self) -> None:
        """Interrupt the running cell; the kernel kills it if it does not stop."""
        await self._manager.interrupt_kernel()


@asynccontextmanager
async def started(spec: Json, folder: Path) -> AsyncIterator[Kernel]:
    """Start a kernel in `folder`; at the end it is gone, whatever happened.

    Raises SandboxError if it does not come up.
    """
    manager = AsyncKernelManager(kernel_spec_manager=OneSpec(spec), kernel_name="sandbox-run")
    try:
        await manager.start_kernel(cwd=str(folder))
        client = manager.client()
        client.start_channels(stdin=False)
        try:
            await client.wait_for_ready(timeout=START_TIMEOUT_S)
            yield Kernel(manager, client)
        finally:
            client.stop_channels()
    except (RuntimeError, OSError) as error:
        raise SandboxError(
            f"the kernel does not start: {error}", hint="run `sandbox-kernel doctor`"
        ) from error
    finally:
        # Not left to a second cancellation: a kernel that nobody ends holds a session.
        await asyncio.shield(_end(manager))


async def _end(manager: AsyncKernelManager) -> None:
    """Ask the kernel to end, and kill it if it does not."""
    if manager.has_kernel:
        await manager.shutdown_kernel()


def without_current_folder(argv: list[str]) -> list[str]:
    """Give a kernel's command line with `-P`.

    `python -m` puts the current folder, which is the notebook's, before all others: a json.py in
    there would run in the kernel's process, outside of any sandbox.
    """
    return argv if "-P" in argv else [sys.executable, "-P", *argv[1:]]
