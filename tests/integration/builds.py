"""Builds for tests: a context, a store, and what each build told.

The base `shell` is Debian's static busybox with its applets, two users and a few folders: small
enough to be put into a store for every test.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.build.builder import build
from sandbox_kernel.build.events import (
    Event,
    StepBegun,
    StepEnded,
    StepMissed,
    StepOutput,
    Warned,
)
from sandbox_kernel.build.options import BuildOptions
from sandbox_kernel.build.run import JobLimits
from sandbox_kernel.image.archive import ImportOptions, import_archive
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage
from sandbox_kernel.image.view import View

BASE = "shell"
LIMITS = JobLimits(memory_bytes=64 << 20, processes=32, wall_time_s=60, disk_bytes=64 << 20)
WAIVED = JobLimits(memory_bytes=None, cpus=None, processes=None, disk_bytes=64 << 20)
PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\napp:x:1234:1235::/home/app:/bin/sh\nnobody:x:65534:65534::/:\n"
)
GROUP = "root:x:0:\napp:x:1235:\nstaff:x:50:app\nnobody:x:65534:\n"
FOLDERS = {"bin": 0o755, "etc": 0o755, "root": 0o700, "tmp": 0o1777, "srv": 0o755}

needs_busybox = pytest.mark.programs("busybox")


@functools.cache
def base_tar() -> bytes:
    """Give the root file system of the base, the same bytes every time."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, mode in FOLDERS.items():
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, mode
            tar.addfile(info)
        files = {"etc/passwd": PASSWD.encode(), "etc/group": GROUP.encode()}
        for name, data in {**files, "bin/busybox": Path(busybox).read_bytes()}.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755 if name.startswith("bin/") else 0o644
            tar.addfile(info, io.BytesIO(data))
        for applet in sorted(set(applets.stdout.split()) - {"busybox"}):
            info = tarfile.TarInfo(f"bin/{applet}")
            info.type, info.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(info)
    return out.getvalue()


@dataclass
class Step:
    """One step as the build told of it."""

    title: str
    stage: str
    cached: bool = False
    why: str = ""
    layer: str = ""
    said: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Told:
    """Puts the events of a build together, step by step."""

    events: list[Event] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepBegun):
            self.steps.append(Step(event.title, event.stage))
        elif isinstance(event, StepMissed):
            self.steps[-1].why = event.reason
        elif isinstance(event, StepOutput):
            said = self.steps[-1].said
            said[event.stream] = said.get(event.stream, b"") + event.data
        elif isinstance(event, StepEnded):
            self.steps[-1].cached, self.steps[-1].layer = event.cached, event.layer
        elif isinstance(event, Warned):
            self.warnings.append(event.text)

    @property
    def rebuilt(self) -> list[str]:
        """The steps that did not come from the cache."""
        return [step.title for step in self.steps if not step.cached]

    @property
    def reasons(self) -> dict[str, str]:
        """Why each step that missed did."""
        return {step.title: step.why for step in self.steps if step.why}

    def out(self, stream: str = "stdout") -> str:
        """Give what all steps wrote to a stream."""
        return b"".join(step.said.get(stream, b"") for step in self.steps).decode()


class Workshop:
    """A build context and a store of its own."""

    def __init__(self, root: Path, limits: JobLimits = LIMITS) -> None:
        self.root = root
        self.context = root / "context"
        self.context.mkdir(parents=True)
        self.store = Store.open(root / "store")
        self.limits = limits
        self.told = Told()

    def close(self) -> None:
        self.store.close()

    def add_base(self, name: str = BASE) -> StoredImage:
        """Put the base into the store."""
        options = ImportOptions(name=Reference.parse(name))
        return import_archive(self.store, io.BytesIO(base_tar()), options)[0]

    def write(self, files: dict[str, str]) -> None:
        """Write files of the context."""
        for name, text in files.items():
            path = self.context / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def build(
        self, dockerfile: str, *, tag: str = "", name: str = "Dockerfile", **changes: Any
    ) -> StoredImage:
        """Build a Dockerfile; `told` says then how it went, also if it failed."""
        path = self.root / name
        path.write_text(dockerfile)
        self.told = Told()
        tags = (Reference.parse(tag),) if tag else ()
        options = BuildOptions(self.context, path, tags=tags, explain=True, limits=self.limits)
        return build(self.store, replace(options, **changes), self.told)

    def run(self, script: str, **changes: Any) -> str:
        """Build FROM the base a step that says something; give what it said on stdout."""
        self.build(f"FROM {BASE}\n{script}", **changes)
        return self.told.out()

    # ---- what came out

    def view(self, image: StoredImage) -> View:
        """Give what the layers of an image show together."""
        return View(list(self.store.ensure_layers(image)))

    def read(self, image: StoredImage, path: str) -> str:
        """Give the content of a file of an image."""
        return self.view(image).read(path, 1 << 20).decode()

    def layer(self, image: StoredImage, number: int = -1) -> dict[str, tarfile.TarInfo]:
        """Give the entries of one layer, the topmost unless said otherwise."""
        digest = image.manifest.layers[number].digest
        with self.store.open_blob(digest) as blob, tarfile.open(fileobj=blob) as tar:
            return {one.name: one for one in tar}

    def blobs(self) -> set[str]:
        return set(os.listdir(self.store.folder / "blobs" / "sha256"))

    def folders(self) -> set[str]:
        return set(os.listdir(self.store.folder / "layers" / "sha256"))
