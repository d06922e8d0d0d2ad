"""Scopes of a real systemd: which group a kernel ends up in, by where it was started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.linux.cgroup import CgroupTree
from sandbox_kernel.linux.cgroup_v2 import SUPERVISOR

pytestmark = pytest.mark.skipif(
    not Path("/run/systemd/system").is_dir() or CgroupTree.detect().layout != "v2",
    reason="this host has no systemd with cgroup v2",
)
PROGRAM = """
import json, subprocess, sys
from sandbox_kernel.errors import HostError
from sandbox_kernel.linux.cgroup import CgroupTree, session_name

def own():
    return open("/proc/self/cgroup").read().strip().removeprefix("0::")

try:
    before = own()
    tree = CgroupTree.acquire()
    found = {"before": before, "after": own(), "scope": tree.scope, "remark": tree.remark}
    with tree.session(session_name("contract")) as session:
        found["session"] = session.paths[0]
        if "twice" in sys.argv:
            argv = [sys.executable, sys.argv[0]]
            done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
            found["inner"] = json.loads(done.stdout)
except HostError as error:
    found = {"message": error.message, "hint": error.hint}
print(json.dumps(found))
"""
IS_ROOT = os.geteuid() == 0
AS_USER: list[str] = [] if IS_ROOT else ["--user"]
SLICE = "/system.slice/" if IS_ROOT else f"/user@{os.geteuid()}.service/app.slice/"
only_root = pytest.mark.skipif(not IS_ROOT, reason="units of the system are root's")


def run(folder: Path, *before: str, after: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the program behind another command, and give what it says."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    for path in (folder, program):
        path.chmod(0o755)
    done = subprocess.run(
        [*before, sys.executable, str(program), *after],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def unit() -> tuple[str, ...]:
    if shutil.which("systemd-run") is None:
        pytest.skip("systemd-run is not installed")
    variable = f"--setenv=PYTHONPATH={os.pathsep.join(sys.path)}"
    return ("systemd-run", *AS_USER, "--quiet", "--wait", "--pipe", "--collect", variable)


def test_unit_that_is_not_delegated_is_left(tmp_path: Path, unit: tuple[str, ...]) -> None:
    found = run(tmp_path, *unit)
    assert ".service" in found["before"].rpartition("/")[2]
    assert found["after"].endswith(f"{SLICE}{found['scope']}")
    assert found["session"].rpartition("/")[0] == f"/sys/fs/cgroup{found['after']}"


def test_kernel_below_a_kernel_stays_in_its_scope(tmp_path: Path, unit: tuple[str, ...]) -> None:
    found = run(tmp_path, *unit, after=("twice",))
    inner = found["inner"]
    assert inner["scope"] == ""
    assert inner["before"] == inner["after"] == f"{found['after']}/{SUPERVISOR}"
    assert Path(inner["session"]).parent == Path(found["session"]).parent


@only_root
def test_delegated_unit_of_root_is_used(tmp_path: Path, unit: tuple[str, ...]) -> None:
    found = run(tmp_path, *unit, "-p", "Delegate=yes")
    assert (found["scope"], found["before"]) == ("", found["after"])


@only_root
def test_unit_that_was_delegated_to_a_user_is_used(unit: tuple[str, ...]) -> None:
    """As a hub's unit with User= and Delegate=; the user needs no bus."""
    folder = Path("/run/sandbox-kernel-contract")
    folder.mkdir()
    try:
        found = run(folder, *unit, "-p", "Delegate=yes", "-p", "User=daemon")
    finally:
        shutil.rmtree(folder)
    assert (found["scope"], found["before"]) == ("", found["after"])


@only_root
def test_user_without_a_manager_is_told_both_reasons(unit: tuple[str, ...]) -> None:
    folder = Path("/run/sandbox-kernel-contract")
    folder.mkdir()
    try:
        found = run(folder, *unit, "-p", "User=daemon")
    finally:
        shutil.rmtree(folder)
    assert "cgroup.procs: Permission denied" in found["message"]
    assert "no user bus can be reached" in found["message"]
    assert "loginctl enable-linger" in found["hint"]
    assert "Delegate=yes" in found["hint"]
