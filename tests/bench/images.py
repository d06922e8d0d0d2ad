"""Images: unpacked beside umoci, built from the cache, and started with few layers or many."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox_kernel.build.builder import build
from sandbox_kernel.build.options import BuildOptions
from sandbox_kernel.build.session_image import session_image
from sandbox_kernel.config import SandboxConfig, limits_of
from sandbox_kernel.errors import SandboxError
from sandbox_kernel.image.archive import ImportOptions, import_archive
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import VARIABLE as STORE_VARIABLE
from sandbox_kernel.image.store import Store
from sandbox_kernel.model import SessionSpec
from sandbox_kernel.session.session import Session
from tests.bench.measure import BenchError
from tests.bench.report import SIDES, STOCK, SUBJECT, Measure, Series, interleave
from tests.integration.rootfs import rootfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUITE = "bookworm"
WAIT_MS = 500.0
"""What a user may have to wait for a build that has nothing to do."""
LAYERS = {STOCK: 2, SUBJECT: 60}
START_TIMEOUT_S = 60.0

UNPACK = Measure("image-unpack", "unpack Debian: umoci | image import", "ms", bar=1.0)
CACHED = Measure("image-cached", "ten cached steps: to wait for | image build", "ms", bar=1.0)
DEEP = Measure("image-layers", "start of a session: 2 layers | 60 layers", "ms", bar=1.2)
IMAGE_MEASURES = (UNPACK, CACHED, DEEP)

Advance = Callable[[str, int, int], None] if TYPE_CHECKING else object


class Images:
    """The measures of images, in a folder of their own; `wanted` are keys."""

    def __init__(self, folder: Path, count: int, advance: Advance) -> None:
        self._folder = folder
        self._count = count
        self._advance = advance

    def take(self, series: Series) -> None:
        """Fill one series; raises BenchError."""
        steps = {UNPACK: self._unpack, CACHED: self._cached, DEEP: self._deep}
        try:
            steps[series.measure](series)
        except (SandboxError, OSError) as error:
            raise BenchError(str(error)) from error

    def _turns(self, series: Series, count: int) -> Iterator[str]:
        for done, (side, _) in enumerate(interleave(count, 1)):
            self._advance(series.measure.title, done, 2 * count)
            yield side

    def _unpack(self, series: Series) -> None:
        layout, umoci = self._folder / "layout", shutil.which("umoci")
        with self._store("debian") as store:
            import_archive(store, _base(self._folder), ImportOptions(name=Reference.parse("base")))
        _command("image", "export", "base", "-o", f"{layout}/", store=self._folder / "debian")
        (about,) = json.loads((layout / "index.json").read_bytes())["manifests"]
        tag = about["annotations"]["org.opencontainers.image.ref.name"]
        rootless = [] if os.geteuid() == 0 else ["--rootless"]
        for side in self._turns(series, max(3, self._count // 4)):
            target = self._folder / f"unpacked-{secrets.token_hex(4)}"
            if side == SUBJECT:
                spent_s = _command("image", "import", str(layout), "--name", "base", store=target)
            elif umoci is None:
                series.note("umoci skipped: it is not on PATH")
                continue
            else:
                argv = [umoci, "unpack", *rootless, "--image", f"{layout}:{tag}", str(target)]
                spent_s = _timed(argv)
            series.samples[side].append(spent_s * 1e3)
            shutil.rmtree(target)

    def _cached(self, series: Series) -> None:
        context, store = self._folder / "ten-steps", self._folder / "cached"
        context.mkdir()
        (context / "file").write_text("one\n")
        steps = [f"RUN echo {number} > /srv/{number}" for number in range(6)]
        lines = ["FROM host", "WORKDIR /srv", "COPY file .", *steps, "CMD python3"]
        (context / "Dockerfile").write_text("\n".join(lines) + "\n")
        argv = ("image", "build", "--tag", "ten", str(context))
        _command(*argv, store=store)
        for side in self._turns(series, max(5, self._count)):
            spent_ms = WAIT_MS if side == STOCK else _command(*argv, store=store) * 1e3
            series.samples[side].append(spent_ms)

    def _deep(self, series: Series) -> None:
        with self._store("debian") as store:
            import_archive(store, _base(self._folder), ImportOptions(name=Reference.parse("base")))
            for count in LAYERS.values():
                self._layered(store, count)
        os.environ[STORE_VARIABLE] = str(self._folder / "debian")
        try:
            for side in SIDES:  # not counted: its Python is looked for, and the page cache filled
                asyncio.run(_start(f"deep:{LAYERS[side]}", self._folder))
            for side in self._turns(series, max(5, self._count)):
                spent_s = asyncio.run(_start(f"deep:{LAYERS[side]}", self._folder))
                series.samples[side].append(spent_s * 1e3)
        finally:
            del os.environ[STORE_VARIABLE]

    def _layered(self, store: Store, count: int) -> None:
        """Build an image of so many layers, each with a file."""
        context = self._folder / f"layers-{count}"
        context.mkdir()
        lines = [f"COPY <<EOF /srv/{number}\n{number}\nEOF\n" for number in range(count - 1)]
        (context / "Dockerfile").write_text("FROM base\n" + "".join(lines))
        tag = Reference.parse(f"deep:{count}")
        image = build(
            store, BuildOptions(context, context / "Dockerfile", tags=(tag,)), lambda _: None
        )
        if len(image.manifest.layers) != count:
            raise BenchError(f"an image of {count} layers has {len(image.manifest.layers)}")

    def _store(self, name: str) -> Store:
        return Store.open(self._folder / name)


@contextlib.contextmanager
def images(count: int, advance: Advance) -> Iterator[Images]:
    """Give the measures of images; what they made is removed."""
    with tempfile.TemporaryDirectory(prefix="bench-images-", ignore_cleanup_errors=True) as folder:
        yield Images(Path(folder), count, advance)


def _base(folder: Path) -> Path:
    """Give Debian as registries have it, compressed; raises BenchError."""
    path = folder / f"{SUITE}.tar.gz"
    if not path.exists():
        try:
            plain = rootfs(SUITE)
        except (AssertionError, OSError) as error:
            raise BenchError(f"mmdebstrap gave no {SUITE}: {error}") from error
        with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=6) as out:
            shutil.copyfileobj(source, out, 1 << 20)
    return path


def _command(*words: str, store: Path) -> float:
    """Run `sandbox-kernel` on a store; give how long it took, in seconds. Raises BenchError."""
    env = {**os.environ, STORE_VARIABLE: str(store)}
    return _timed([sys.executable, "-m", "sandbox_kernel", *words], env)


def _timed(argv: list[str], env: dict[str, str] | None = None) -> float:
    begin_s = time.perf_counter()
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    spent_s = time.perf_counter() - begin_s
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise BenchError(f"{' '.join(argv[:4])} ended with {done.returncode}: {said}")
    return spent_s


async def _start(name: str, workspace: Path) -> float:
    """Start a session on an image as a kernel does, and end it; give the seconds to ready."""
    begin_s = time.perf_counter()
    limits = limits_of(SandboxConfig())
    session = Session(
        SessionSpec(
            secrets.token_hex(6), session_image(name), str(workspace), "none", limits, limits
        )
    )
    session.begin()
    try:
        await asyncio.wait_for(session.ready(), START_TIMEOUT_S)
        return time.perf_counter() - begin_s
    except TimeoutError as error:
        raise BenchError(f"no session on {name} within {START_TIMEOUT_S:.0f} s") from error
    finally:
        await session.close()
