"""An agent from a package index: pip resolves and downloads wheels for the image's Python.

pip takes its user's configuration, so mirrors, proxies and credentials are as everywhere else. It
evaluates environment markers for the Python that runs it, whatever `--python-version` says; what
the metadata ask for on the image's is therefore asked for in turn.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from sandbox_kernel.build.agent_files import Files, merged, read_wheel
from sandbox_kernel.build.agent_packages import ROOTS, Unmet, closure, markers
from sandbox_kernel.build.agent_platform import platforms
from sandbox_kernel.build.python_facts import PythonFacts, own_facts
from sandbox_kernel.errors import ImageError

Progress = Callable[[str], None]
"""Is told in a few words what is being done."""

_ROUNDS = 5
_TAIL_LINES = 15
_SHOWN = ("Collecting ", "Downloading ", "Using cached ", "Processing ")


def downloaded_files(facts: PythonFacts, progress: Progress) -> Files:
    """Give the files of an agent for an image's Python; raises ImageError."""
    environment = markers(facts.version, facts.machine)
    wanted = list(ROOTS)
    unmet: list[Unmet] = []
    for _ in range(_ROUNDS):
        with tempfile.TemporaryDirectory(prefix="sandbox-kernel-agent-") as name:
            _download(wanted, facts, Path(name), progress)
            wheels = [read_wheel(path) for path in sorted(Path(name).glob("*.whl"))]
        there = {package.name: package for package, _ in wheels}
        found, unmet = closure(ROOTS, there, environment)
        if not unmet:
            return merged(files for package, files in wheels if package.name in found)
        # Without the marker, which this Python would evaluate for itself.
        wanted += [f"{one.requirement.name}{one.requirement.specifier}" for one in unmet]
    raise _failed(facts, "; ".join(f"{one.by} needs {one.requirement}" for one in unmet))


def _download(wanted: Sequence[str], facts: PythonFacts, folder: Path, progress: Progress) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _failed(facts, f"there is no pip beside {sys.executable}", hint="install pip there")
    argv = [sys.executable, "-m", "pip", "download", "--no-input", "--progress-bar=off"]
    argv += ["--disable-pip-version-check", "--only-binary=:all:", f"--dest={folder}"]
    argv += [f"--python-version={facts.python}", "--implementation=cp"]
    argv += [f"--platform={tag}" for tag in platforms(facts)]
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(
        [*argv, "--", *wanted],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as pip:
        for line in pip.stdout or ():
            if line.strip():
                tail.append(line.strip())
            if line.lstrip().startswith(_SHOWN):
                progress(line.strip())
    if pip.returncode:
        raise _failed(facts, "pip says: " + "\n".join(tail))


def _failed(facts: PythonFacts, why: str, *, hint: str = "") -> ImageError:
    return ImageError(
        f"what cells need on Python {facts.python} ({facts.libc_name}, {facts.machine}) cannot be "
        f"downloaded: {why}",
        hint=hint
        or "start a kernel on this image once while the package index can be reached, or use an "
        f"image with Python {own_facts().python} as here, which needs no download",
    )
