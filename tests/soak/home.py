"""Jupyter folders of a soak's own, so that no kernel of somebody else's looks like a leak."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests.kernel import live

ROOT = Path(__file__).parents[2]
GRACE = "0.3s"
"""Short: a tenth of the cells does not stop by itself."""


@dataclass(frozen=True)
class Home:
    """The folders that kernels use."""

    folder: Path

    @property
    def temporary(self) -> Path:
        """Where TMPDIR points to."""
        return self.folder / "tmp"

    @property
    def runtime(self) -> Path:
        """Where connection files are."""
        return self.folder / "runtime"

    @property
    def workspace(self) -> Path:
        """The folder of the notebooks."""
        return self.folder / "workspace"

    def files(self) -> set[str]:
        """Give all that is in the folders that should be empty in the end."""
        tops = (self.temporary, self.runtime, self.workspace)
        found = {str(path) for top in tops for path in top.rglob("*")}
        for top in ("/dev/shm", "/run"):
            with contextlib.suppress(OSError):
                found.update(f"{top}/{name}" for name in os.listdir(top) if "sandbox" in name)
        return found

    def environment(self) -> dict[str, str]:
        """Give the environment of everything that a soak starts."""
        places = {
            "JUPYTER_PATH": "path",
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "IPYTHONDIR": "ipython",
            "TMPDIR": "tmp",
        }
        found = {name: str(self.folder / place) for name, place in places.items()}
        return {**found, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

    def start(self, *arguments: str) -> live.Live:
        """Start a real kernel and wait until it answers."""
        return live.start(self.workspace, f"--SandboxConfig.grace={GRACE}", *arguments)


@contextlib.contextmanager
def home() -> Iterator[Home]:
    """Make the folders, with the kernel of this checkout installed in them."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        it = Home(Path(name))
        kernel = it.folder / "path" / "kernels" / live.NAME
        for folder in (it.temporary, it.runtime, it.workspace, kernel):
            folder.mkdir(parents=True)
        spec = json.loads((ROOT / "kernelspec" / "kernel.json").read_text(encoding="utf-8"))
        spec["argv"][0] = sys.executable
        (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
        with mock.patch.dict(os.environ, it.environment()):
            yield it
