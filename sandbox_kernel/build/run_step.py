"""RUN: one command in a container of its own, and what it changed as a layer."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.config import (
    SCRIPT_FOLDER,
    Process,
    StageState,
    process,
    proxy_environment,
)
from sandbox_kernel.build.layer import Layer, layer_of_tar
from sandbox_kernel.build.mounts import Mount
from sandbox_kernel.build.options import BuildOptions
from sandbox_kernel.build.run import Job, Ran, run
from sandbox_kernel.build.shown import Shown, as_written
from sandbox_kernel.container.job import Program
from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.accounts import Account, find_account
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.view import View
from sandbox_kernel.model import Bind, Image, Layers
from sandbox_kernel.units import format_duration, format_size

# What programs say that look for a host and have no network.
_NO_NETWORK = re.compile(
    rb"name resolution|could not resolve|network is unreachable|getaddrinfo|newconnectionerror"
    rb"|temporary failure resolving|name or service not known|unable to resolve|bad address",
    re.IGNORECASE,
)
_TAIL_BYTES = 16384


@dataclass(frozen=True)
class RunStep:
    """A RUN whose variables are resolved, and where it stands."""

    instruction: ins.Run
    mounts: tuple[Mount, ...]
    state: StageState
    options: BuildOptions
    machine: Image | None = None
    """This machine's image, in a build FROM host."""

    @property
    def process(self) -> Process:
        """What it starts."""
        return process(self.instruction, self.state.config)

    @property
    def network(self) -> str:
        """Give the network that it has; raises BuildError for more than the build has."""
        wanted = self.instruction.network
        if wanted == "host" and self.options.network != "host":
            raise BuildError(
                "RUN --network=host in a build without network",
                hint="allow it: build --network host",
            )
        return self.options.network if wanted == "default" else wanted


def perform(
    step: RunStep,
    layers: Layers,
    store: Store,
    shown: Shown,
    tell: Callable[[str, bytes], None],
) -> Layer | None:
    """Run it to its end; give its layer, None if it changed no file. Raises BuildError."""
    found: list[Layer | None] = []
    tail = bytearray()

    def output(stream: str, data: bytes) -> None:
        tail.extend(data)
        del tail[:-_TAIL_BYTES]
        tell(stream, data)

    with contextlib.ExitStack() as stack:
        if (script := step.process.script) is not None:
            path = stack.enter_context(store.scratch())
            _write_script(path, script.text)
            shown.binds.append(Bind(str(path), f"{SCRIPT_FOLDER}/{script.name}"))
        job = _job(step, layers, shown)
        ran = run(job, output, lambda tar: found.append(layer_of_tar(store, tar)))
    if not ran.succeeded:
        raise _failed(step, job, ran, bytes(tail))
    return found[0] if found else None


def _write_script(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    os.chmod(path, 0o500)


def _job(step: RunStep, layers: Layers, shown: Shown) -> Job:
    config = step.state.config
    view = View([f"{layers.folder}/{name}" for name in layers.names])
    account = find_account(view, config.user) if config.user else find_account(view, "0")
    program = Program(
        argv=step.process.argv,
        env=_environment(step, account, tuple(shown.env)),
        cwd=config.working_dir or "/",
        uid=account.uid,
        gid=account.gid,
        groups=account.groups,
        epoch_s=step.options.epoch_s,
    )
    return Job(
        program,
        layers,
        network=step.network,
        # A mount point at a link of the image would hide the link, /lib of Debian's for one.
        binds=tuple(replace(bind, target=view.resolve(bind.target)) for bind in shown.binds),
        tmpfs=tuple((view.resolve(path), size_bytes) for path, size_bytes in shown.tmpfs),
        machine=step.machine,
        limits=step.options.limits,
    )


def _environment(
    step: RunStep, account: Account, secrets: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, str], ...]:
    env = {
        "HOME": account.home or "/",
        # Python then writes .pyc files that are valid whatever time their source has.
        "SOURCE_DATE_EPOCH": str(step.options.epoch_s),
        **dict(proxy_environment(step.options.arguments)),
        **step.state.variables,
        **dict(secrets),
    }
    return tuple(env.items())


def _failed(step: RunStep, job: Job, ran: Ran, tail: bytes) -> BuildError:
    command = shlex.join(step.process.argv)
    command = command if len(command) <= 200 else command[:199] + "…"
    limits = job.limits
    if ran.limit == "memory":
        size = format_size(limits.memory_bytes or 0)
        return BuildError(
            f"{command!r} needed more than the {size} of memory that a step has",
            hint="give it more: build --memory SIZE",
        )
    if ran.limit == "wall_time":
        time = format_duration(limits.wall_time_s)
        return BuildError(f"{command!r} took longer than {time}", hint="build --wall-time TIME")
    how = f"exit code: {ran.code}" if ran.signal is None else f"signal {ran.signal}"
    hint = _hint(job, ran, tail)
    return BuildError(f"{command!r} did not complete successfully: {how}", hint=hint)


def _hint(job: Job, ran: Ran, tail: bytes) -> str:
    """Tell whether a program has met a limit that let it go on: by counters, else its words."""
    limits = job.limits
    if job.network == "none" and _NO_NETWORK.search(tail):
        return "this step had no network: build --network host gives it one"
    if b"No space left on device" in tail:
        return f"a step may write {format_size(limits.disk_bytes)}: build --disk SIZE"
    if ran.fork_denials:
        return f"a step may have {limits.processes} processes: build --processes NUMBER"
    return ""


def key_parts(step: RunStep) -> tuple[tuple[str, str], ...]:
    """Give what a RUN depends on beside the step before; limits are no part of it."""
    config, found = step.state.config, step.process
    values = {
        "command": shlex.join(found.argv),
        "script": found.script.text if found.script else "",
        "environment": "\0".join(f"{k}={v}" for k, v in sorted(step.state.env)),
        "user": config.user,
        "working directory": config.working_dir,
        "network": step.network,
        "list of mounts": as_written(step.mounts),
        "epoch": str(step.options.epoch_s),
    }
    return tuple(values.items())
