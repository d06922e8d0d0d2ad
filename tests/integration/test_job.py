"""One program in a container of its own: what it may do, what it leaves, and what ends it."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from sandbox_kernel.build.run import Job, JobLimits, Ran, run
from sandbox_kernel.container.job import CAPABILITIES, Program
from sandbox_kernel.errors import LaunchError
from sandbox_kernel.image.host import host_image
from sandbox_kernel.linux import libc
from sandbox_kernel.model import Bind, Layers
from tests.integration import leaks

pytestmark = [pytest.mark.needs("memory", "processes"), pytest.mark.escape]

MACHINE = host_image()
ENV = (("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"),)
LIMITS = JobLimits(memory_bytes=128 << 20, processes=64, wall_time_s=60, disk_bytes=32 << 20)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = leaks.Snapshot()
    yield
    before.assert_clean()


@dataclass
class Done:
    """A job that has ended."""

    ran: Ran
    stdout: str
    stderr: str
    files: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    tar: bytes = b""


def job(script: str, **changes: Any) -> Job:
    program = Program(("/bin/sh", "-c", script), ENV, "/", epoch_s=1000)
    empty = Layers("", ())
    return replace(Job(program, empty, machine=MACHINE, limits=LIMITS), **changes)


def perform(what: Job) -> Done:
    said = {"stdout": b"", "stderr": b""}
    tars: list[bytes] = []

    def output(name: str, data: bytes) -> None:
        said[name] += data

    def take(tar: BinaryIO) -> None:
        tars.append(tar.read())

    ran = run(what, output, take)
    tar = tars[0] if tars else b""
    files = {}
    if ran.succeeded and tar.strip(b"\0"):
        with tarfile.open(fileobj=io.BytesIO(tar)) as packed:
            files = {one.name: one for one in packed}
    return Done(ran, said["stdout"].decode(), said["stderr"].decode(), files, tar)


def test_streams_are_told_apart_and_the_exit_code_is_its_own() -> None:
    done = perform(job("echo out; echo err >&2; exit 7"))
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert (done.ran.code, done.ran.signal, done.ran.limit, done.ran.succeeded) == (
        7,
        None,
        "",
        False,
    )
    assert not done.tar


def test_a_signal_is_told() -> None:
    assert perform(job("kill -TERM $$")).ran.signal == 15


def test_what_it_writes_is_packed_and_no_file_is_newer_than_the_epoch() -> None:
    done = perform(
        job("mkdir -p /srv/a; echo hello > /srv/a/b; ln -s b /srv/a/c; chmod 750 /srv/a/b")
    )
    assert done.ran.succeeded
    assert set(done.files) == {"srv", "srv/a", "srv/a/b", "srv/a/c"}
    assert done.files["srv/a/b"].mode == 0o750
    assert done.files["srv/a/c"].linkname == "b"
    assert {one.mtime for one in done.files.values()} == {1000}


def test_the_same_program_gives_the_same_bytes() -> None:
    first, second = (perform(job("for n in 3 1 2; do echo $n > /srv$n; done")) for _ in range(2))
    assert first.tar == second.tar


def test_lower_layers_show_and_are_hidden(tmp_path: Path) -> None:
    for name, content in {
        "low/fs/data/one": "1",
        "low/fs/data/two": "2",
        "high/fs/data/two": "3",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    os.chmod(tmp_path, 0o700)
    layers = Layers(str(tmp_path), ("low/fs", "high/fs"))
    done = perform(job("cat /data/one /data/two; rm /data/one; echo 4 > /data/two", layers=layers))
    assert done.stdout == "13"
    assert set(done.files) == {"data", "data/.wh.one", "data/two"}
    assert (tmp_path / "low/fs/data/one").read_text() == "1"
    assert (tmp_path / "high/fs/data/two").read_text() == "3"


def test_memory_is_the_limit_that_is_named() -> None:
    code = "python3 -c 'x = [bytearray(1 << 20) for _ in range(400)]'"
    ran = perform(job(code)).ran
    assert (ran.limit, ran.succeeded) == ("memory", False)


def test_time_is_the_limit_that_is_named() -> None:
    ran = perform(job("sleep 600", limits=replace(LIMITS, wall_time_s=0.5))).ran
    assert (ran.limit, ran.succeeded) == ("wall_time", False)


def test_processes_are_denied_and_all_end() -> None:
    code = "for n in $(seq 200); do sleep 600 & done"
    assert "fork" in perform(job(code)).stderr.lower()


def test_a_full_disk_is_an_ordinary_error() -> None:
    done = perform(job("head -c 64M /dev/zero > /tmp/big; echo $?"))
    assert "No space left on device" in done.stderr
    assert done.stdout == "1\n"


def test_a_strict_umask_of_the_caller_changes_nothing() -> None:
    plain = perform(job("umask; mkdir /tmp/a; ls -ld /etc /tmp | cut -c1-10"))
    before = os.umask(0o077)
    try:
        strict = perform(job("umask; mkdir /tmp/a; ls -ld /etc /tmp | cut -c1-10"))
    finally:
        os.umask(before)
    assert strict.ran.succeeded
    assert (strict.stdout, strict.tar) == (plain.stdout, plain.tar)


def test_what_it_leaves_running_ends_with_it() -> None:
    done = perform(job("(setsid sleep 600 & echo $! > /tmp/pid); (trap '' TERM; sleep 600) &"))
    assert done.ran.succeeded


def test_a_background_process_that_holds_the_streams_does_not_keep_it() -> None:
    assert perform(job("setsid sleep 600 & exit 0")).ran.succeeded


def test_capabilities_are_exactly_these() -> None:
    code = "grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs)' /proc/self/status"
    words = perform(job(code)).stdout.split()
    found = dict(zip(words[::2], words[1::2], strict=True))
    mask = f"{libc.cap_mask(CAPABILITIES):016x}"
    none = f"{0:016x}"
    assert found == {
        "CapInh:": none,
        "CapPrm:": mask,
        "CapEff:": mask,
        "CapBnd:": mask,
        "CapAmb:": none,
        "NoNewPrivs:": "1",
    }


@pytest.mark.parametrize(
    "code",
    [
        "mount -t tmpfs none /mnt",
        "unshare --mount true",
        "unshare --user true",
        "mknod /tmp/disk b 8 0",
        "echo c > /proc/sysrq-trigger",
        "echo x > /proc/sys/kernel/core_pattern",
        "echo x > /etc/hosts",
        "rm -rf /usr/bin/env",
        "hostname other",
        "chroot / mount -t proc none /mnt",
    ],
)
def test_root_of_a_step_is_refused(code: str) -> None:
    done = perform(job(f"{code} 2>/dev/null; echo $?"))
    assert done.stdout.strip() not in ("0", "")


def test_it_sees_no_process_but_its_own() -> None:
    found = perform(job("ls /proc | grep -E '^[0-9]+$' | wc -l; kill -9 -1; echo survived"))
    assert int(found.stdout.split()[0]) < 8


def test_there_is_no_network_unless_it_is_the_hosts() -> None:
    code = "readlink /proc/self/ns/net; cat /proc/net/dev | tail -n +3 | cut -d: -f1"
    inside, *devices = perform(job(code)).stdout.split()
    assert devices == ["lo"]
    assert inside != os.readlink("/proc/self/ns/net")
    outside = perform(job(code, network="host")).stdout.split()[0]
    assert outside == os.readlink("/proc/self/ns/net")


def test_a_user_that_is_named_runs_it() -> None:
    program = replace(
        job("id -u; id -g; id -G; touch /etc/x").program, uid=33, gid=34, groups=(35,)
    )
    done = perform(job("", program=program))
    assert done.stdout.split() == ["33", "34", "34", "35"]
    assert "Permission denied" in done.stderr


def test_folders_in_memory_leave_nothing() -> None:
    code = "df -P /scratch | tail -1 | cut -d' ' -f1; echo x > /scratch/y; echo z > /dev/shm/z"
    done = perform(job(code, tmpfs=(("/scratch", 1 << 20),)))
    assert done.stdout.strip() == "tmpfs"
    assert not done.files


def test_binds_are_read_only_or_not_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    (tmp_path / "rw").mkdir()
    (tmp_path / "secret").write_text("hush")
    (tmp_path / "secret").chmod(0o400)
    binds = (
        Bind(str(tmp_path / "ro"), "/bind/ro"),
        Bind(str(tmp_path / "rw"), "/bind/rw", read_only=False),
        Bind(str(tmp_path / "secret"), "/run/secrets/key"),
    )
    code = "cat /run/secrets/key; echo 1 > /bind/rw/x; echo 1 > /bind/ro/x"
    done = perform(job(code, binds=binds))
    assert done.stdout == "hush"
    assert "Read-only file system" in done.stderr
    assert (tmp_path / "rw" / "x").read_text() == "1\n"
    assert not done.files


def test_a_program_that_is_not_there_is_named() -> None:
    program = Program(("nowhere",), ENV, "/")
    with pytest.raises(LaunchError, match="exec 'nowhere': No such file or directory"):
        perform(job("", program=program))


def test_a_working_folder_that_is_not_there_is_named() -> None:
    program = Program(("/bin/true",), ENV, "/nowhere")
    with pytest.raises(LaunchError, match="the working folder /nowhere: No such file"):
        perform(job("", program=program))


def test_the_outside_that_fails_to_take_the_layer_is_heard() -> None:
    def take(tar: BinaryIO) -> None:
        tar.read(10)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        run(job("head -c 1M /dev/urandom > /tmp/x"), lambda *_: None, take)
