"""Bring the project into the guest: its wheel, installed, and the tests beside it."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.vm.image import ROOT
from tests.vm.machine import Machine
from tests.vm.port import GuestError, Job

SOURCE = "/src"
PYTHON = "/opt/venv/bin/python"
# Not the package itself: what the tests import in the guest is what the wheel brought.
BROUGHT = ("tests", "pyproject.toml", "kernelspec", "notebooks")
INSTALL = f"""\
set -e
rm -rf {SOURCE}
mkdir {SOURCE}
tar -x -C {SOURCE} --no-same-owner
{PYTHON} -m pip install --quiet --no-index --no-deps --force-reinstall {SOURCE}/wheel/*.whl
"""


def sync(machine: Machine) -> None:
    """Install the present state of the project in the guest; raises GuestError."""
    job = Job("root", ("sh", "-c", INSTALL), stdin=_archive())
    ended = machine.run(job)
    if ended.status:
        raise GuestError(f"the wheel could not be installed in the guest:\n{ended.text}")


def _archive() -> bytes:
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as name, tarfile.open(fileobj=buffer, mode="w") as tar:
        folder = Path(name) / "wheel"
        argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*argv, "--wheel-dir", str(folder), str(ROOT)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise GuestError(f"the wheel could not be built:\n{done.stderr}")
        tar.add(folder, "wheel")
        for path in BROUGHT:
            tar.add(ROOT / path, path, filter=_without_bytecode)
    return buffer.getvalue()


def _without_bytecode(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry
