"""Sessions and jobs for probes, whole or with guards taken off."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.build.run import Job, JobLimits, run
from sandbox_kernel.container import begin
from sandbox_kernel.container.job import Program
from sandbox_kernel.errors import LaunchError
from sandbox_kernel.image.host import host_image
from sandbox_kernel.model import Bind, Layers
from sandbox_kernel.session.pod import Pod
from tests.escape import weakened
from tests.escape.probe import PRELUDE, Probe
from tests.integration.driver import Driver, start

IMAGE_FOLDER = "/opt/probe"
"""Where the image of the probes shows a folder of the host in which everybody may write."""
LEFT = 77
"""How a probe's cell exits: what it did is not carried into the next."""
LIMITS = JobLimits(memory_bytes=128 << 20, processes=64, wall_time_s=60, disk_bytes=32 << 20)
PATH = (("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"),)


@contextmanager
def without(*guards: str) -> Iterator[None]:
    """Take guards off all containers that are begun in the block."""
    with pytest.MonkeyPatch.context() as patch:
        if guards:
            patch.setattr(begin, "_PROGRAM", weakened.program(guards))
        if "heads' own user" in guards:
            patch.setattr(
                Pod, "_head_ids", property(lambda pod: (pod.spec.image.uid, pod.spec.image.gid))
            )
        yield


async def session(folder: Path, *guards: str, **changes: Any) -> Driver:
    """Start a session that shows a folder of everybody's as part of its image."""
    for name in ("workspace", "image"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "image").chmod(0o777)
    (folder / "image" / "file").write_text("of the image")
    (folder / "image" / "file").chmod(0o666)
    image = host_image()
    binds = (*image.binds, Bind(str(folder / "image"), IMAGE_FOLDER))
    options = {"image": replace(image, binds=binds), **changes}
    with without(*guards):
        return await start(folder / "workspace", **options)


async def finding(box: Driver, probe: Probe, **values: Any) -> str:
    """Run the code of a probe in a cell that is rolled back; give the last line that it printed."""
    ran = await box.run(f"{_source(probe, values)}\nos._exit({LEFT})")
    assert ran.result.exit_code == LEFT, ran.said()
    return ran.text().rstrip("\n").rpartition("\n")[2]


def finding_outside(probe: Probe, **values: Any) -> str:
    """Run the code of a probe as a program of the host, without any guard."""
    done = subprocess.run(
        [sys.executable, "-c", _source(probe, values)],
        capture_output=True, text=True, check=False, cwd=weakened.SOURCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n").rpartition("\n")[2]


def _source(probe: Probe, values: dict[str, Any]) -> str:
    given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    return f"{PRELUDE}\n{given}{probe.code}"


def job(script: str, folder: Path | None = None, **changes: Any) -> Job:
    """Give a job on a layer `folder`/fs, with the folders of this machine over it."""
    layers = Layers(str(folder), ("fs",)) if folder is not None else Layers("", ())
    program = replace(Program(("/bin/sh", "-c", script), PATH, "/"), **changes.pop("program", {}))
    return replace(Job(program, layers, machine=host_image(), limits=LIMITS), **changes)


def perform(what: Job, *guards: str) -> str:
    """Run a job; give what it said on stdout, or the LaunchError that it met."""
    said: list[bytes] = []
    try:
        with without(*guards):
            run(what, lambda name, data: said.append(data) if name == "stdout" else None)
    except LaunchError as error:
        return f"LaunchError: {error.step}: {error.cause}"
    return b"".join(said).decode().strip()
