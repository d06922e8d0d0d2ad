"""A machine that lacks something, for real: what the user reads in the notebook, and in doctor.

Run as root, who takes it away and gives it back.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.inside import talk
from tests.vm.inside.talk import Program

NOTEBOOK = talk.module("notebook")
DOCTOR = [sys.executable, "-m", "sandbox_kernel", "doctor", "--json"]
NO_NEWUIDMAP = "mount --bind /dev/null /usr/bin/newuidmap"
NOT_SETUID = (
    "mount -t tmpfs none /mnt\ncp /usr/bin/newuidmap /mnt\n"
    "mount --bind /mnt/newuidmap /usr/bin/newuidmap"
)
MASKED = "mount -t tmpfs none /proc/irq\nmount --bind /dev/null /proc/keys"


@contextlib.contextmanager
def sysctl(name: str, value: str) -> Iterator[None]:
    """Have a setting of the kernel for a while."""
    path = Path("/proc/sys", *name.split("."))
    before = path.read_text("ascii")
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


@contextlib.contextmanager
def notebook(argv: list[str]) -> Iterator[Program]:
    """Give a kernel that must end well."""
    program = Program(argv)
    try:
        yield program
    finally:
        status = program.close()
    assert status == 0


def doctor(argv: list[str]) -> dict[str, dict[str, Any]]:
    """Give what doctor found, by name."""
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/")
    assert done.stdout.startswith("{"), done.stderr
    return {one["name"]: one for one in json.loads(done.stdout)["findings"]}


NONE = ("user.max_user_namespaces", "No space left on device", "10000")
DENIED = ("kernel.unprivileged_userns_clone", "Operation not permitted", "1")
LIMITS = {
    "root-none": ("root", *NONE),
    "ranged-none": ("ranged", *NONE),
    "plain-denied": ("plain", *DENIED),
}


@pytest.mark.parametrize(("user", "name", "why", "remedy"), LIMITS.values(), ids=LIMITS)
def test_a_limit_is_named_and_when_it_is_lifted_the_kernel_works(
    user: str, name: str, why: str, remedy: str
) -> None:
    with contextlib.ExitStack() as stack:
        with sysctl(name, "0"):
            program = stack.enter_context(notebook(talk.login(user, NOTEBOOK)))
            ran = program.run("x = 1")
            finding = doctor(talk.login(user, DOCTOR))["user_namespace"]
        assert (ran["status"], ran["ename"]) == ("error", "LaunchError"), ran
        assert f"clone: {why}" in ran["evalue"]
        assert f"sysctl -w {name}={remedy}" in ran["evalue"]
        assert not finding["available"]
        assert why in finding["why"]
        assert f"sysctl -w {name}={remedy}" in finding["remedy"]
        # In the same kernel: the next cell tries again.
        assert program.run("print(6 * 7)")["text"] == "42\n"


def test_without_newuidmap_a_session_has_one_id() -> None:
    with notebook(talk.apart(NO_NEWUIDMAP, talk.login("ranged", NOTEBOOK))) as program:
        extents = "open('/proc/self/uid_map').read().split()"
        assert program.run(f"print({extents}[2:])")["text"] == "['1']\n"
        program.run("x = 1")
        # No head has an id of its own then: the filter keeps the signal from it.
        program.run("import os; os.kill(-1, 9)")
        assert program.run("print(x)")["text"] == "1\n"


TOOLS = {
    "missing": (NO_NEWUIDMAP, "there is no newuidmap", "apt install uidmap"),
    "not setuid": (NOT_SETUID, "newuidmap failed", "install package uidmap anew"),
}


@pytest.mark.parametrize(("script", "why", "remedy"), TOOLS.values(), ids=TOOLS)
def test_doctor_names_the_tool(script: str, why: str, remedy: str) -> None:
    found = doctor(talk.apart(script, talk.login("ranged", DOCTOR)))
    finding = found["subordinate_ids"]
    assert not finding["available"]
    assert why in finding["why"]
    assert remedy in finding["remedy"]
    assert found["user_namespace"]["available"]


@pytest.mark.parametrize("user", ["root", "ranged"])
def test_a_masked_proc_is_named(user: str) -> None:
    """As Docker and Kubernetes mask it."""
    with notebook(talk.apart(MASKED, talk.login(user, NOTEBOOK))) as program:
        ran = program.run("x = 1")
        assert (ran["status"], ran["ename"]) == ("error", "LaunchError"), ran
        assert "mount a new proc: mount: Operation not permitted" in ran["evalue"]
        assert "--security-opt systempaths=unconfined" in ran["evalue"]
