"""A host that is spoilt before a kernel starts on it: it says what is wrong and what to do.

Each kernel is a process of its own (`spoilt`) in a mount namespace of its own, in which the
script of the test has made the host what it shall be.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux.cgroup import CgroupTree
from sandbox_kernel.linux.mountinfo import find_hierarchies, parse_mounts, parse_own
from sandbox_kernel.linux.scope import enter_scope
from sandbox_kernel.session.session import Session
from tests.fakes.cgroupfs import FakeHost
from tests.integration import leaks
from tests.integration.driver import make_spec, start, stop

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp", "memory", "cpus", "processes"),
    pytest.mark.kernel,
]

ROOT = Path(__file__).resolve().parents[2]
CELL = {"cell": "print(6 * 7)"}
TIMEOUT_S = 60


@dataclass(frozen=True)
class Seen:
    """What came of a kernel on a spoilt host."""

    facts: dict[str, Any]
    log: str

    @property
    def words(self) -> str:
        """Why there was no session."""
        assert "error" in self.facts, self.facts
        return "{error}: {message} ({hint})".format_map(self.facts)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """How each step ended."""
        assert "error" not in self.facts, self.words
        return list(self.facts["steps"])


def run_spoilt(script: str, *steps: dict[str, Any], argv: tuple[str, ...] = (), **env: str) -> Seen:
    """Run a kernel where `script` was run before, behind `argv`, and look what it has left."""
    with tempfile.TemporaryDirectory() as workspace:
        os.chmod(workspace, 0o777)  # it may be another user's kernel
        # Pythons below a home that only root may enter are for root alone, see `ordinary`.
        python = (sys.executable, "-m", "tests.integration.spoilt", workspace, json.dumps(steps))
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-ec", f'{script}\nexec "$@"', "sh", *argv, *python],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **env},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    facts = json.loads(lines[-1])
    assert facts["left"] == {}
    return Seen(facts, done.stderr)


def assert_gone(seen: Seen) -> None:
    assert leaks.until(lambda: not leaks.session_cgroups(seen.facts["pid"]))


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def clean() -> AsyncIterator[None]:
    """Skip where no mount can be made in private; look for what is left on this side."""
    trial = "mount -t tmpfs tmpfs /tmp"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", trial], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounts are root's: {done.stderr.strip()}")
    before = leaks.Snapshot()
    yield
    before.assert_clean()


def cgroup_hierarchies() -> dict[str, str]:
    """Give the own group in each hierarchy, by the mount point of that."""
    proc = Path("/proc/self")
    mounts = parse_mounts((proc / "mountinfo").read_text())
    found = find_hierarchies(mounts, parse_own((proc / "cgroup").read_text()))
    return {hierarchy.mount_point: hierarchy.own for hierarchy in found}


# ---- cgroups


def remount(flag: str) -> str:
    """Give a script that makes all cgroup mounts read-only (`ro`) or writable again (`rw`)."""
    points = leaks.cgroup_mounts()
    return "\n".join(f"mount -o remount,bind,{flag} {point}" for point in points)


def bind() -> str:
    """Give a script that makes each cgroup mount one that has flags of its own."""
    return "\n".join(f"mount --bind {point} {point}" for point in leaks.cgroup_mounts())


async def test_read_only_cgroups() -> None:
    seen = run_spoilt(f"{bind()}\n{remount('ro')}", CELL)
    assert re.match(r"HostError: .*Read-only file system", seen.words)
    assert "mount cgroups writable" in seen.words
    assert_gone(seen)


async def test_no_cgroups_at_all() -> None:
    script = "\n".join(f"umount --lazy {point}" for point in reversed(leaks.cgroup_mounts()))
    seen = run_spoilt(script, CELL)
    assert re.match(r"HostError: no cgroup can be made on this host: controller cpu", seen.words)
    assert "mount -t cgroup2" in seen.words
    assert_gone(seen)


async def test_cgroups_become_read_only_between_two_cells() -> None:
    seen = run_spoilt(
        bind(),
        {"cell": "x = 1"},
        {"sh": remount("ro")},
        *[{"cell": "x += 1"}] * 4,
        {"sh": remount("rw")},
        {"cell": "print(x >= 1)"},
    )
    _, _, *spoilt, _, last = seen.steps
    refused = [step for step in spoilt if "error" in step]
    assert refused  # a cell that was prepared before may have run
    assert all("Read-only file system" in step["message"] for step in refused), refused
    assert all("mount cgroups writable" in step["hint"] for step in refused)
    assert last.get("text") == "True\n", last
    assert_gone(seen)


BUSY = (
    "import subprocess; p = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
    "x = 2; print('up')\n"
)


@pytest.mark.parametrize("end", ["", "import os; os._exit(1)", "while True: pass"])
async def test_cgroups_become_read_only_while_a_cell_runs(end: str) -> None:
    """What it has started cannot be killed by its group then, and is killed all the same."""
    seen = run_spoilt(
        bind(),
        {"cell": "x = 1"},
        {"cell": BUSY + end, "sh": remount("ro"), "limits": {"wall_time_s": 2.0}},
        {"sh": remount("rw")},
        {"cell": "print(x)"},
    )
    _, cell, _, last = seen.steps
    if "error" in cell:
        assert "Read-only file system" in cell["message"]
        assert "mount cgroups writable" in cell["hint"]
    assert last.get("text") == "1\n", (cell, last)
    assert_gone(seen)


async def test_kernel_that_ends_with_read_only_cgroups() -> None:
    """Its monitor, which has mounts of its own, removes them."""
    seen = run_spoilt(bind(), {"cell": "x = 1"}, {"sh": remount("ro")})
    assert seen.log == ""
    assert_gone(seen)


# ---- /proc


def some_of_proc() -> str:
    """Give a folder of /proc that container engines cover."""
    return next(f"/proc/{n}" for n in ("scsi", "acpi", "fs", "bus") if os.path.isdir(f"/proc/{n}"))


async def test_masked_proc() -> None:
    seen = run_spoilt(f"mount -t tmpfs -o ro tmpfs {some_of_proc()}", CELL)
    assert seen.words.startswith("LaunchError: mount a new proc: mount: Operation not permitted")
    for remedy in ("systempaths=unconfined", "unmask=ALL", "procMount: Unmasked"):
        assert remedy in seen.words
    assert_gone(seen)


# ---- processes and files


@contextlib.contextmanager
def group_for_kernel(processes: int) -> Iterator[str]:
    """Give a script that puts the kernel into a group with room for so many processes."""
    own = next((own for point, own in cgroup_hierarchies().items() if point.endswith("pids")), None)
    if own is None or not os.access(own, os.W_OK):
        pytest.skip("a group between this process and a kernel can be made on cgroup v1 only")
    group = Path(own, f"faults-{os.getpid()}")
    group.mkdir()
    try:
        (group / "pids.max").write_text(str(processes))
        yield f"echo $$ > {group}/cgroup.procs"
    finally:
        assert leaks.until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
async def test_no_room_for_a_session(processes: int) -> None:
    with group_for_kernel(processes) as script:
        seen = run_spoilt(script, CELL)
    assert re.match(r"(Host|Launch)Error: .*: Resource temporarily unavailable", seen.words)
    assert "raise pids.max of the cgroup that Jupyter runs in" in seen.words
    assert_gone(seen)


async def test_no_room_for_a_child() -> None:
    with group_for_kernel(5) as script:
        seen = run_spoilt(script, CELL, CELL)
    for step in seen.steps:
        assert step["error"] == "HostError"
        assert "head could not be forked" in step["message"]
        assert "raise pids.max" in step["hint"]
    assert_gone(seen)


async def test_no_room_for_the_head_before() -> None:
    """A cell runs beside two heads, the new one and the one before: that is one process more."""
    with group_for_kernel(6) as script:
        seen = run_spoilt(script, {"cell": "x = 1"}, {"cell": "print(x)"}, {"cell": "print(x)"})
    first, *others = seen.steps
    assert first["outcome"] == "ok"
    for step in others:
        assert step["error"] == "HostError"
        assert "raise pids.max" in step["hint"]
    assert_gone(seen)


@pytest.mark.parametrize("processes", [7, 8])
async def test_hardly_room_for_a_session(processes: int) -> None:
    """The kernel itself may get no thread; what has not ended yet may be one process too many."""
    steps = ({"cell": "x = 1"}, {"cell": "import os; os._exit(3)"}, *[{"cell": "print(x)"}] * 3)
    with group_for_kernel(processes) as script:
        seen = run_spoilt(script, *steps)
    ended = [step.get("outcome") or step["hint"] for step in seen.steps]
    assert ended[0] == "ok"
    assert "ok" in ended[2:], seen.steps
    assert all(end in ("ok", "exited") or "raise pids.max" in end for end in ended), seen.steps
    assert_gone(seen)


async def test_limit_of_open_files_that_is_too_small() -> None:
    seen = run_spoilt("ulimit -n 256", CELL)
    assert seen.words.startswith(
        "HostError: open_files=1024 is above this host's hard limit of 256"
    )
    assert "ulimit -Hn" in seen.words


async def test_soft_limit_of_open_files_is_raised() -> None:
    seen = run_spoilt("ulimit -S -n 24", CELL)
    assert seen.steps[0].get("text") == "42\n", seen
    assert_gone(seen)


# ---- a bus that hangs


@pytest.mark.parametrize("accepts", [True, False], ids=["silent", "full"])
async def test_user_bus_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accepts: bool
) -> None:
    """An ordinary user outside of every delegated group asks systemd, who does not answer."""
    host = FakeHost(tmp_path / "host", "v2")
    host.run_systemd()
    host.move_to("/user.slice/user@1000.service/app.slice/terminal.scope")
    session = Session(make_spec(tmp_path))
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "bus"))
        listener.listen(5 if accepts else 0)
        first.connect(str(tmp_path / "bus"))
        with monkeypatch.context() as patch:
            patch.setenv("DBUS_SESSION_BUS_ADDRESS", f"unix:path={tmp_path}/bus")
            patch.setattr("os.geteuid", lambda: 1000)
            there = {"proc": host.proc, "root": host.root, "files": host.files}
            acquire = functools.partial(CgroupTree.acquire, **there, ask=enter_scope)
            patch.setattr(CgroupTree, "acquire", acquire)
            with pytest.raises(HostError, match=r"/bus does not answer within 2 s") as caught:
                session.begin()
    assert "terminal.scope is not delegated" in caught.value.message
    assert "systemctl --user status" in caught.value.hint
    assert "Delegate=" in caught.value.hint
    await session.close()
    driver = await start(tmp_path)
    try:
        assert await driver.value("6 * 7") == 42
    finally:
        await stop(driver)


# ---- subordinate ids of an ordinary user

UID = 64321
NAME = "faults"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder that every user can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def ordinary(folder: Path, subuid: bytes, subgid: bytes | None = None) -> Iterator[str]:
    """Give a script that hands an ordinary user cgroups, and the tables of ids that he has."""
    if shutil.which("newuidmap") is None:
        pytest.skip("newuidmap is missing: it would be told, and not the tables")
    tables = {
        "passwd": Path("/etc/passwd").read_bytes() + f"{NAME}:x:{UID}:{UID}::/:/bin/sh\n".encode(),
        "group": Path("/etc/group").read_bytes() + f"{NAME}:x:{UID}:\n".encode(),
        "subuid": subuid,
        "subgid": subuid if subgid is None else subgid,
    }
    lines = []
    for name, content in tables.items():
        (folder / name).write_bytes(content)
        lines.append(f"mount --bind {folder}/{name} /etc/{name}")
    hierarchies = cgroup_hierarchies()
    if len(hierarchies) < 2:
        pytest.skip("groups can be handed to a user without systemd on cgroup v1 only")
    made = []
    for own in hierarchies.values():
        group = Path(own, f"faults-{os.getpid()}")
        with contextlib.suppress(OSError):  # cpuset takes no process before it has processors
            group.mkdir()
            made.append(group)
            lines.append(f"chown {UID} {group} {group}/cgroup.procs")
            lines.append(f"echo $$ > {group}/cgroup.procs || true")
    try:
        yield "\n".join([*lines, *show_python()])
    finally:
        for group in made:
            assert leaks.until(lambda group=group: not (group / "cgroup.procs").read_text())
            group.rmdir()


def show_python() -> list[str]:
    """Give lines that show this Python to users who may not enter the folder that it is in."""
    base = Path(sys.base_prefix)
    private = next((p for p in [*reversed(base.parents)] if not p.stat().st_mode & 0o001), None)
    if private is None:
        return []
    return [
        "mount -t tmpfs -o mode=755 tmpfs /mnt",
        f"mkdir /mnt/base; mount --bind {base} /mnt/base",
        f"mount -t tmpfs -o mode=755 tmpfs {private}",
        f"mkdir -p {base}; mount --bind /mnt/base {base}",
    ]


AS_USER = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups")

GOOD = f"{NAME}:300000:65536\n"
TABLES = {
    "malformed": (f"{NAME}:many:65536\n", r"/etc/subuid, line 1: .*NAME:FIRST:COUNT.*mend that"),
    "without count": (f"other:1:1\n{NAME}:300000\n", "/etc/subuid, line 2: .*NAME:FIRST:COUNT"),
    "beyond the last id": (f"{NAME}:4294967000:65536\n", "/etc/subuid, line 1: .*ids up to"),
    "overlap": (f"other:290000:65536\n{GOOD}", "line 2: .*overlap those of .*line 1, of other"),
    "somebody's own": (f"{NAME}:0:65536\n", "which is somebody's own"),
    "too few": (f"{NAME}:300000:10\n", "10 ids for .*are less than"),
    "none": ("", "/etc/subuid has no range for"),
    "of others": (GOOD.replace(NAME, "other"), "/etc/subuid has no range for"),
    "rubbish": ("\0\udcff" * 50 + "\n", "/etc/subuid has no range for"),
}


@pytest.mark.parametrize(("table", "why"), TABLES.values(), ids=TABLES)
async def test_table_of_ids_that_is_no_good(folder: Path, table: str, why: str) -> None:
    """The session has a single id then, and the log says why."""
    with ordinary(folder, table.encode("utf-8", "surrogateescape")) as script:
        seen = run_spoilt(script, CELL, {"cell": "import os; os.kill(-1, 9)"}, CELL, argv=AS_USER)
    assert [step.get("outcome") for step in seen.steps][::2] == ["ok", "ok"], seen
    assert seen.facts["ids"] == "single"
    assert re.search(f"cells and heads have one user id, signals are guarded: .*{why}", seen.log)
    assert_gone(seen)


async def test_table_of_groups_that_is_no_good(folder: Path) -> None:
    with ordinary(folder, GOOD.encode(), b"") as script:
        seen = run_spoilt(script, CELL, argv=AS_USER)
    assert seen.steps[0].get("text") == "42\n", seen
    assert seen.facts["ids"] == "single"
    assert "/etc/subgid has no range for" in seen.log
    assert_gone(seen)


@pytest.mark.parametrize(
    "table", [GOOD, f"broken\n{GOOD}", f"{NAME}:300000:600\n{NAME}:300500:600"]
)
async def test_table_of_ids_that_is_good_enough(folder: Path, table: str) -> None:
    """Lines of others may be malformed, and the user's own may overlap each other.

    Where a group can be handed over like this it is one of v1, which allows a single id only.
    """
    with ordinary(folder, table.encode()) as script:
        seen = run_spoilt(script, CELL, argv=AS_USER)
    assert seen.steps[0].get("text") == "42\n", seen
    assert "cgroup v1 lets only root move processes of other ids" in seen.log
    assert_gone(seen)
