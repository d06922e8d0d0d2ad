"""The bindings: errors that name the call and the path, forks without hooks, process attributes."""

from __future__ import annotations

import ast
import errno
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandbox_kernel.linux import constants, libc, notify

if TYPE_CHECKING:
    from collections.abc import Callable


def in_child(act: Callable[[], object], *, fork: Callable[[], int] = libc.fork) -> str:
    """Run `act` in a fork and give its repr, or the repr of what it raised."""
    read_fd, write_fd = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            text = repr(act())
        except BaseException as error:
            text = repr(error)
        os.write(write_fd, text.encode())
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def status_field(name: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(name + ":"))


def test_error_has_number_call_and_path() -> None:
    with pytest.raises(OSError, match="mount: ") as caught:
        libc.mount("none", "/no/such/place", fstype="tmpfs")
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)
    assert caught.value.filename == "/no/such/place"


def test_error_becomes_the_subclass_of_its_number() -> None:
    with pytest.raises(FileNotFoundError, match="open_tree"):
        libc.open_tree("/no/such/place", flags=libc.OPEN_TREE_CLOEXEC)


def test_error_without_path() -> None:
    with pytest.raises(OSError, match="setns: Bad file descriptor") as caught:
        libc.setns(-1)
    assert caught.value.filename is None


def test_path_may_be_bytes_or_a_path_object() -> None:
    for path in (b"/tmp", Path("/tmp"), "/tmp"):
        os.close(libc.open_tree(path, flags=libc.OPEN_TREE_CLOEXEC))


def test_fork_runs_no_hook_and_seeds_nothing() -> None:
    random.seed(7)
    expected = random.Random(7).random()
    hooked: list[int] = []
    os.register_at_fork(before=lambda: hooked.append(1), after_in_child=lambda: hooked.append(2))
    got = in_child(lambda: (random.random(), hooked))
    assert got == repr((expected, []))
    assert hooked == []


@pytest.mark.parametrize("fork", [libc.fork, lambda: libc.clone(0)])
def test_child_can_start_threads_and_processes(fork: Callable[[], int]) -> None:
    def act() -> tuple[bool, int, bool]:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(1))
        thread.start()
        thread.join()
        code = subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=False).returncode
        return seen == [1], code, threading.current_thread() is threading.main_thread()

    assert in_child(act, fork=fork) == "(True, 3, True)"


def test_clone_child_knows_its_own_thread_id() -> None:
    # glibc signals its own thread by the id it caches: a stale one would miss.
    pid = libc.clone(0)
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM


def test_clone_parent_makes_a_sibling() -> None:
    here = os.getpid()
    read_fd, write_fd = os.pipe()
    child = libc.fork()
    if child == 0:
        sibling = libc.clone(libc.CLONE_PARENT)
        if sibling == 0:
            os.write(write_fd, struct.pack("ii", os.getpid(), os.getppid()))
        os._exit(0)
    os.waitpid(child, 0)
    sibling, parent = struct.unpack("ii", os.read(read_fd, 8))
    os.close(read_fd)
    os.close(write_fd)
    assert parent == here
    assert os.waitpid(sibling, 0) == (sibling, 0)


def test_exit_now_gives_the_status() -> None:
    pid = libc.fork()
    if pid == 0:
        os._exit(42)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


def test_capget_agrees_with_proc() -> None:
    effective, permitted, inheritable = libc.capget()
    assert int(status_field("CapEff"), 16) == effective
    assert int(status_field("CapPrm"), 16) == permitted
    assert int(status_field("CapInh"), 16) == inheritable


def test_capset_can_give_up_effective_and_keep_permitted() -> None:
    permitted = libc.capget().permitted

    def act() -> bool:
        libc.capset(0, permitted, 0)
        return tuple(libc.capget()) == (0, permitted, 0)

    assert in_child(act) == "True"


def test_capset_cannot_gain() -> None:
    def act() -> None:
        libc.capset(0, 0, 0)
        libc.capset(0, libc.cap_mask([libc.CAP_SYS_ADMIN]), 0)

    assert "PermissionError" in in_child(act)


def test_cap_mask_has_both_halves() -> None:
    assert libc.cap_mask([libc.CAP_CHOWN, libc.CAP_CHECKPOINT_RESTORE]) == 1 | 1 << 40
    assert (libc.CAP_SYS_CHROOT, libc.CAP_SYS_ADMIN, libc.CAP_SETUID) == (18, 21, 7)


def test_bounding_set() -> None:
    def act() -> int:
        libc.drop_bounding(keep={libc.CAP_KILL})
        return int(status_field("CapBnd"), 16)

    if not libc.capget().effective & libc.cap_mask([libc.CAP_SETPCAP]):
        pytest.skip("needs CAP_SETPCAP")
    before = int(status_field("CapBnd"), 16)
    assert in_child(act) == repr(before & libc.cap_mask([libc.CAP_KILL]))


def test_attributes_of_the_process() -> None:
    def act() -> tuple[bool, bool, str, str, str]:
        libc.set_no_new_privs()
        libc.clear_ambient()
        libc.set_keep_capabilities(True)
        libc.set_child_subreaper(True)
        libc.set_parent_death_signal(signal.SIGKILL)
        libc.set_name("sandbox-cell")
        before = libc.get_dumpable()
        libc.set_dumpable(not before)
        comm = Path("/proc/self/comm").read_text().strip()
        changed = libc.get_dumpable() != before
        return changed, before, status_field("NoNewPrivs"), status_field("CapAmb"), comm

    assert in_child(act) == repr((True, libc.get_dumpable(), "1", "0" * 16, "sandbox-cell"))


def test_fionread_counts_pending_bytes() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert libc.fionread(right.fileno()) == 0
        left.send(b"12345")
        assert libc.fionread(right.fileno()) == 5


def test_loaded_function_finds_only_what_is_loaded() -> None:
    loaded = next(
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libc.so" in line or "libc-" in line or "musl" in line
    )
    absolute = libc.loaded_function(loaded, "abs")
    assert absolute is not None
    assert absolute(-3) == 3
    assert libc.loaded_function(loaded, "no_such_symbol") is None
    assert libc.loaded_function("/no/such/library.so", "abs") is None


def test_file_system_says_why_it_refuses() -> None:
    try:
        fd = libc.fsopen("tmpfs")
    except PermissionError:
        pytest.skip("needs CAP_SYS_ADMIN")
    try:
        with pytest.raises(OSError, match="bogus") as caught:
            libc.fsconfig_string(fd, "bogus", "1")
        assert caught.value.errno == errno.EINVAL
        assert "tmpfs" in str(caught.value)
    finally:
        os.close(fd)


def test_detached_file_system() -> None:
    try:
        fd = libc.fsopen("tmpfs")
    except PermissionError:
        pytest.skip("needs CAP_SYS_ADMIN")
    libc.fsconfig_string(fd, "size", "1m")
    libc.fsconfig_create(fd)
    mount_fd = libc.fsmount(fd, attrs=libc.MOUNT_ATTR_NODEV)
    try:
        assert os.fstatvfs(mount_fd).f_blocks * os.fstatvfs(mount_fd).f_frsize == 1024**2
        flags = libc.AT_EMPTY_PATH
        libc.mount_setattr("", dir_fd=mount_fd, flags=flags, attr_set=libc.MOUNT_ATTR_RDONLY)
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir("x", dir_fd=mount_fd)
    finally:
        os.close(mount_fd)
        os.close(fd)


def test_seccomp_refuses_a_program_that_is_none() -> None:
    def act() -> None:
        libc.set_no_new_privs()
        libc.seccomp_load(b"\0" * 8)

    assert "seccomp: Invalid argument" in in_child(act)


def test_structures_have_the_sizes_of_the_kernel() -> None:
    assert notify._NOTIFICATION.size == 80
    assert notify._RESPONSE.size == 24


@pytest.mark.parametrize("module", [libc, constants, notify])
def test_source_is_python_3_9(module: object) -> None:
    path = str(module.__file__)  # type: ignore[attr-defined]
    ast.parse(Path(path).read_text(), feature_version=(3, 9))
