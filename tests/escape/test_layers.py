"""Images that are built to mislead whoever puts a container together: links in the place of mounts.

Each layer below is the lowest of a job's root, with this machine's programs over it.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandbox_kernel.build.run import run
from sandbox_kernel.model import Bind
from tests.escape.probe import Probe
from tests.escape.sessions import job, perform

pytestmark = [
    pytest.mark.needs("user_namespace", "overlay", "seccomp", "memory", "processes"),
    pytest.mark.escape,
]


@dataclass(frozen=True)
class Misleading:
    """A link of a layer, and what a program prints that looks where it leads."""

    probe: Probe
    at: str
    to: str
    script: str


def _stolen(number: int, name: str, at: str, to: str, kind: str) -> Misleading:
    # /e/file and /e/folder are what masks are made of, in the root where containers are built:
    # the mount would land on them.
    script = f"test -L /{at} && echo a link || stat -c %F /{at}"
    return Misleading(Probe(number, name, kind, "skeleton on top", "a link"), at, to, script)


LINKS = (
    _stolen(4, "a device that is a link to the masks", "dev/tty", "/e/file",
            "character special file"),
    _stolen(5, "a devpts that is a link to the masks", "dev/pts", "/e/folder", "directory"),
    Misleading(
        Probe(4, "a /dev/null that is a link to sysrq-trigger", "character special file",
              "skeleton on top", "LaunchError"),
        "dev/null", "/proc/sysrq-trigger", "stat -c %F /dev/null",
    ),
    Misleading(
        Probe(5, "a /dev/console that is a link", "absent", "", ""),
        "dev/console", "/proc/sysrq-trigger",
        "test -L /dev/console -a ! -e /dev/console && echo absent",
    ),
    Misleading(
        Probe(6, "a /proc that is a link", "proc", "skeleton on top", "LaunchError"),
        "proc", "/tmp", "stat -f -c %T /proc",
    ),
    Misleading(
        Probe(7, "a /dev that leads out", "directory", "skeleton on top", "LaunchError"),
        "dev", "../../../etc", "stat -c %F /dev",
    ),
)  # fmt: skip


def _layer(folder: Path, case: Misleading) -> Path:
    link = folder / "fs" / case.at
    link.parent.mkdir(parents=True)
    os.symlink(case.to, link)
    folder.chmod(0o755)
    return folder


@pytest.mark.parametrize("case", LINKS, ids=lambda case: case.probe.id)
def test_a_link_leads_no_mount_astray(tmp_path: Path, case: Misleading) -> None:
    assert perform(job(case.script, _layer(tmp_path, case))) == case.probe.refused


@pytest.mark.parametrize(
    "case", [case for case in LINKS if case.probe.guard], ids=lambda case: case.probe.id
)
def test_it_would_if_the_image_lay_on_top(tmp_path: Path, case: Misleading) -> None:
    seen = perform(job(case.script, _layer(tmp_path, case)), case.probe.guard)
    assert seen.partition(":")[0] in case.probe.opens


WORKING_FOLDER = Probe(
    2, "working folder that is a descriptor", "LaunchError", "descriptors closed", "/"
)
PROGRAM = Probe(3, "program that is a descriptor", "LaunchError", "descriptors closed", "")


def test_a_working_folder_is_no_descriptor() -> None:
    for number in (3, 7, 9, 1000):
        said = perform(job("pwd", program={"cwd": f"/proc/self/fd/{number}"}))
        assert said.startswith(f"LaunchError: the working folder /proc/self/fd/{number}: "), said


def test_it_would_be_one_that_was_left_open() -> None:
    said = perform(job("pwd -P", program={"cwd": "/proc/self/fd/9"}), WORKING_FOLDER.guard)
    assert said == WORKING_FOLDER.open


def test_a_program_is_no_descriptor() -> None:
    said = perform(job("", program={"argv": ("/proc/self/fd/7",)}))
    assert said == "LaunchError: exec '/proc/self/fd/7': No such file or directory"


def test_it_would_be_one_if_left_open() -> None:
    assert perform(job("", program={"argv": ("/proc/self/fd/7",)}), PROGRAM.guard) == PROGRAM.open


SETUID = Probe(24, "setuid program of an image", "33", "nosuid + no_new_privs", "0")


def _setuid(folder: Path) -> Path:
    program = folder / "fs" / "srv" / "whoami"
    program.parent.mkdir(parents=True)
    shutil.copy(shutil.which("id") or "/usr/bin/id", program)
    program.chmod(0o4755)
    folder.chmod(0o755)
    return folder


def test_a_setuid_program_gives_nothing(tmp_path: Path) -> None:
    what = job("/srv/whoami -u", _setuid(tmp_path), program={"uid": 33, "gid": 33})
    assert perform(what) == SETUID.refused


def test_it_would_where_mounts_and_processes_allow_it(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the file is root's only where root made it")
    what = job("/srv/whoami -u", _setuid(tmp_path), program={"uid": 33, "gid": 33})
    assert perform(what, *SETUID.guards) == SETUID.open


DEVICE = Probe(
    15, "device node in a folder that is shown", "Permission denied", "nodev", "ok",
    needs_root="only root makes device nodes",
)  # fmt: skip


@pytest.mark.parametrize(("guards", "seen"), [((), DEVICE.refused), ((DEVICE.guard,), DEVICE.open)])
def test_a_device_of_a_shown_folder_is_dead(
    tmp_path: Path, guards: tuple[str, ...], seen: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip(DEVICE.needs_root)
    shown = tmp_path / "shown"
    shown.mkdir()
    os.mknod(shown / "null", 0o20666, os.makedev(1, 3))
    (shown / "null").chmod(0o666)
    script = "{ : > /srv/null && echo ok; } 2>&1 | grep -o 'Permission denied\\|ok'"
    assert perform(job(script, binds=(Bind(str(shown), "/srv"),)), *guards) == seen


FOLLOWED = Probe(43, "link, FIFO and device left in a layer", "kept as they are", "", "")


def test_what_a_program_leaves_is_packed_and_not_followed() -> None:
    tars: list[bytes] = []
    script = "cd /srv 2>/dev/null || { mkdir /srv; cd /srv; }; ln -s /etc/passwd link; mkfifo pipe"
    what = job(script, program={"epoch_s": 0})
    run(what, lambda *_: None, lambda tar: tars.append(tar.read()))
    with tarfile.open(fileobj=io.BytesIO(tars[0])) as tar:
        found = {one.name: one for one in tar}
    assert (found["srv/link"].type, found["srv/link"].linkname) == (tarfile.SYMTYPE, "/etc/passwd")
    assert found["srv/pipe"].type == tarfile.FIFOTYPE


PROBES = (
    *(case.probe for case in LINKS), WORKING_FOLDER, PROGRAM, SETUID, DEVICE, FOLLOWED,
)  # fmt: skip
