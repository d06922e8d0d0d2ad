from __future__ import annotations

import fcntl
import mmap
import os
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_kernel.guest import files
from sandbox_kernel.linux import libc

ROOT = Path(__file__).parents[2]


def own(*fds: int) -> frozenset[int]:
    """Give all descriptors but `fds`: those of the test runner are to be left alone."""
    return frozenset(int(name) for name in os.listdir("/proc/self/fd")) - frozenset(fds)


def in_child(check: Callable[[], None]) -> None:
    pid = libc.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def shared_offset(one: int, other: int) -> bool:
    here = os.lseek(one, 0, os.SEEK_CUR)
    os.lseek(one, here + 1, os.SEEK_SET)
    moved = os.lseek(other, 0, os.SEEK_CUR) == here + 1
    os.lseek(one, here, os.SEEK_SET)
    return moved


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("r", os.O_RDONLY),
        ("w", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ("a", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        ("r+", os.O_RDWR),
        ("x", os.O_RDWR | os.O_CREAT | os.O_EXCL),
    ],
)
def test_offset_and_flags_stay_and_are_no_longer_shared(
    tmp_path: Path, mode: str, flags: int
) -> None:
    path = tmp_path / "file"
    if mode != "x":
        path.write_bytes(b"0123456789" * 10)
    fd = os.open(path, flags, 0o600)
    if mode in "wx":
        os.write(fd, b"0123456789")
    size = path.stat().st_size
    os.lseek(fd, 4, os.SEEK_SET)
    before = fcntl.fcntl(fd, fcntl.F_GETFL)

    def check() -> None:
        assert files.reopen(own(fd)) == []
        assert os.lseek(fd, 0, os.SEEK_CUR) == 4
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == before
        assert not os.get_inheritable(fd)
        assert path.stat().st_size == size
        os.lseek(fd, 9, os.SEEK_SET)

    in_child(check)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 4
    os.close(fd)


def test_python_files_read_on(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("".join(f"line {n}\n" for n in range(5000)))
    with path.open() as file:
        assert next(file) == "line 0\n"

        def check() -> None:
            files.reopen(own(file.fileno()))
            assert sum(1 for _ in file) == 4999

        in_child(check)
        assert sum(1 for _ in file) == 4999


def test_inheritable_stays_inheritable(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    os.set_inheritable(fd, True)

    def check() -> None:
        assert files.reopen(own(fd)) == []
        assert os.get_inheritable(fd)
        assert os.path.samestat(os.fstat(fd), tmp_path.stat())

    in_child(check)
    os.close(fd)


def test_duplicates_share_and_strangers_do_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    one = os.open(path, os.O_RDONLY)
    copy = os.dup(one)
    stranger = os.open(path, os.O_RDONLY)

    def check() -> None:
        assert files.reopen(own(one, copy, stranger)) == []
        assert shared_offset(one, copy)
        assert not shared_offset(one, stranger)
        assert not fcntl.fcntl(one, fcntl.F_GETFL) & os.O_NONBLOCK

    in_child(check)
    for fd in (one, copy, stranger):
        os.close(fd)


def test_what_is_kept_or_has_no_path_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    kept = os.open(path, os.O_RDONLY)
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"x")

    def check() -> None:
        assert files.reopen(own(read_fd, write_fd)) == []
        os.lseek(kept, 7, os.SEEK_SET)
        assert os.read(read_fd, 1) == b"x"

    in_child(check)
    assert os.lseek(kept, 0, os.SEEK_CUR) == 7
    for fd in (kept, read_fd, write_fd):
        os.close(fd)


def test_a_deleted_file_is_reported_if_it_can_be_written(tmp_path: Path) -> None:
    with tempfile.TemporaryFile(dir=tmp_path) as writable:
        path = tmp_path / "gone"
        path.write_bytes(b"x")
        readable = os.open(path, os.O_RDONLY)
        path.unlink()
        (note,) = files.reopen(own(writable.fileno(), readable))
        assert "no name any more" in note
        assert "(deleted)" not in note
        os.close(readable)


def test_a_path_that_means_something_else_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDONLY)
    other = tmp_path / "other"
    other.write_bytes(b"short")
    (note,) = files.reopen(own(fd), {fd: str(other)})
    assert "another file has its name" in note
    (note,) = files.reopen(own(fd), {fd: str(tmp_path / "missing")})
    assert "No such file" in note
    assert str(tmp_path / "missing") in note
    assert os.read(fd, 10) == b"0123456789"
    os.close(fd)


def test_places_win_over_what_the_kernel_says(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDONLY)
    keep = own(fd)
    assert files.places(keep) == {fd: str(path)}
    moved = tmp_path / "moved"
    moved.write_bytes(b"9876543210")
    assert files.reopen(keep, {fd: str(moved)}) == []
    assert os.read(fd, 10) == b"9876543210"
    os.close(fd)


def test_flock_is_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    # A copy in another place, as an overlay's is: the lock of the first does not reach it.
    (tmp_path / "copy").touch()
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    files.reopen(own(fd), {fd: str(tmp_path / "copy")})
    again = os.open(tmp_path / "copy", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)
    os.close(fd)


def test_shared_writable_mappings_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        notes = files.reopen(own(file.fileno()))
        assert any(note.startswith(f"{path} is mapped as shared memory") for note in notes)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY):
        assert not any(str(path) in note for note in files.reopen(own(file.fileno())))


def test_sqlite_goes_on_after_it(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "db")
    connection.execute("create table t (n)")
    connection.execute("insert into t values (1)")
    connection.commit()

    def check() -> None:
        assert files.reopen(frozenset((0, 1, 2))) is not None
        connection.execute("insert into t values (2)")
        connection.commit()
        assert connection.execute("select count(*) from t").fetchone() == (2,)

    in_child(check)
    connection.close()


OTHER_ROOT = """
import os, sys
from sandbox_kernel.guest import files
from sandbox_kernel.linux import libc
base = sys.argv[1]
os.chdir(base)
try:
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    for name in ("a", "b"):
        os.mkdir(name)
        # Two levels, as a root with a folder bound into it: the paths cross a mount point.
        libc.mount("tmpfs", name, fstype="tmpfs")
        os.mkdir(f"{name}/work")
        os.mkdir(f"{name}/proc")
        libc.mount("tmpfs", f"{name}/work", fstype="tmpfs")
        libc.mount("/proc", f"{name}/proc", flags=libc.MS_BIND | libc.MS_REC)
        for path in ("top", "work/deep"):
            with open(f"{name}/{path}", "w") as file:
                file.write("12345678")
except OSError as error:
    print("skip", error)
    sys.exit(0)
flags = libc.OPEN_TREE_CLONE | libc.OPEN_TREE_CLOEXEC | libc.AT_RECURSIVE
tree = libc.open_tree(os.path.join(base, "b"), flags=flags)
os.chdir("a")
libc.pivot_root(".", ".")
libc.umount2(".", libc.MNT_DETACH)
os.chdir("/")
opened = [open("/top", "r+"), open("/work/deep", "r+")]
"""


def other_root(tmp_path: Path, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OTHER_ROOT + textwrap.dedent(code), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.stdout.startswith("skip"):
        pytest.skip(f"no mount namespace here: {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_forked_child_in_another_mount_namespace(tmp_path: Path) -> None:
    other_root(
        tmp_path,
        """
        pid = libc.fork()
        if pid == 0:
            libc.unshare(libc.CLONE_NEWNS)
            libc.move_mount(tree, "/")
            os.fchdir(tree)
            libc.pivot_root(".", ".")
            libc.umount2(".", libc.MNT_DETACH)
            status = 1
            try:
                notes = files.reopen(frozenset((tree,)), {})
                for file in opened:
                    file.seek(0, 2)
                    file.write("more")
                    file.flush()
                assert os.stat("/work/deep").st_size == 12 == os.stat("/top").st_size, notes
                assert notes == [], notes
                status = 0
            finally:
                if status:
                    import traceback; traceback.print_exc()
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert os.stat("/work/deep").st_size == 8 == os.stat("/top").st_size
        """,
    )


def test_a_process_whose_root_is_replaced(tmp_path: Path) -> None:
    other_root(
        tmp_path,
        """
        known = files.places()
        libc.move_mount(tree, "/")
        os.fchdir(tree)
        libc.pivot_root(".", ".")
        libc.umount2(".", libc.MNT_DETACH)
        os.close(tree)
        print([os.readlink(f"/proc/self/fd/{file.fileno()}") for file in opened])
        assert files.reopen(known=known) == []
        for file in opened:
            file.write("x" * 20)
            file.flush()
        assert os.stat("/work/deep").st_size == 20 == os.stat("/top").st_size
        """,
    )


def test_cost_without_and_with_files(tmp_path: Path) -> None:
    def best(keep: frozenset[int]) -> float:
        def once() -> float:
            start = time.perf_counter()
            files.reopen(keep)
            return time.perf_counter() - start

        return min(once() for _ in range(50))

    none = best(own())
    opened = [(tmp_path / str(n)).open("w") for n in range(5)]
    few = best(own(*(file.fileno() for file in opened)))
    for file in opened:
        file.close()
    assert none < 0.5e-3
    assert few < 3e-3
    print(f"none {none * 1e6:.0f} us, five {few * 1e6:.0f} us")
