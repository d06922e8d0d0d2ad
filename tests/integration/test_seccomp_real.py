"""The filter in the kernel: what is refused for root too, what still works, who is asked."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from sandbox_kernel.linux import libc
from sandbox_kernel.linux.libc import Notification
from sandbox_kernel.linux.seccomp import cell_policy, compile_policy
from sandbox_kernel.linux.syscalls import NUMBERS

MACHINE = os.uname().machine
NR = NUMBERS.get(MACHINE, {})
Answer = Callable[[int, Notification], None]

PRELUDE = """
import ctypes, errno, json, os, sys
_libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in args))
    return errno.errorcode[ctypes.get_errno()] if result == -1 else "ok"
"""


@dataclass
class Finished:
    """What a filtered process left: its output, wait status and the calls it asked about."""

    output: str
    status: int
    pid: int
    asked: list[Notification] = field(default_factory=list)

    def json(self) -> Any:
        """Parse the output of a script that ended well."""
        assert self.status == 0, (self.status, self.output)
        return json.loads(self.output)


def refuse(listener_fd: int, asked: Notification) -> None:
    libc.notify_respond(listener_fd, asked.id, error=errno.EPERM)


def proceed(listener_fd: int, asked: Notification) -> None:
    assert libc.notify_valid(listener_fd, asked.id)
    libc.notify_respond(listener_fd, asked.id, proceed=True)


def filtered(code: str, *, answer: Answer | None = refuse) -> Finished:
    """Run a script under the filter; with no `answer`, nobody holds the listener."""
    ours, theirs = socket.socketpair()
    read_fd, write_fd = os.pipe()
    program = compile_policy(cell_policy())
    pid = libc.fork()
    if pid == 0:
        _become(PRELUDE + code, program=program, theirs=theirs, write_fd=write_fd)
    os.close(write_fd)
    theirs.close()
    with ours:
        _, (listener_fd, *_), _, _ = socket.recv_fds(ours, 1, 1)
    if answer is None:
        os.close(listener_fd)
        listener_fd = -1
    done = Finished("", -1, pid)
    _serve(done, answer, listener_fd=listener_fd, read_fd=read_fd)
    done.status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(read_fd)
    if listener_fd >= 0:
        os.close(listener_fd)
    return done


def _become(code: str, *, program: bytes, theirs: socket.socket, write_fd: int) -> None:
    try:
        libc.set_no_new_privs()
        listener_fd = libc.seccomp_load(program, listener=True)
        assert listener_fd is not None
        socket.send_fds(theirs, [b"x"], [listener_fd])
        os.close(listener_fd)
        os.dup2(write_fd, 1)
        os.dup2(write_fd, 2)
        os.execv(sys.executable, [sys.executable, "-c", code])
    finally:
        os._exit(99)


def _serve(done: Finished, answer: Answer | None, *, listener_fd: int, read_fd: int) -> None:
    poll = select.poll()
    poll.register(read_fd, select.POLLIN)
    if listener_fd >= 0:
        poll.register(listener_fd, select.POLLIN)
    output = b""
    while True:
        for fd, event in poll.poll():
            if fd == read_fd:
                data = os.read(read_fd, 65536)
                output += data
                if not data:
                    done.output = output.decode()
                    return
            elif event & select.POLLIN and answer is not None:
                if asked := libc.notify_receive(listener_fd):
                    done.asked.append(asked)
                    answer(listener_fd, asked)
            else:  # POLLHUP: the last filtered process is gone
                poll.unregister(fd)


@pytest.fixture(autouse=True, scope="module")
def _needs_listener() -> None:
    if not NR:
        pytest.skip(f"no table of system calls for {MACHINE}")
    try:
        filtered("")
    except OSError as error:
        pytest.skip(f"needs seccomp user notification: {error}")


REFUSED = """
    mount umount2 pivot_root fsopen fsmount fsconfig fspick open_tree move_mount mount_setattr
    open_tree_attr unshare chroot bpf perf_event_open userfaultfd io_uring_setup io_uring_enter
    io_uring_register keyctl add_key request_key kexec_load init_module finit_module delete_module
    swapon swapoff reboot settimeofday clock_settime adjtimex acct quotactl syslog
    open_by_handle_at setdomainname sethostname setgroups
"""


def test_refused_calls_fail_for_root_too() -> None:
    names = REFUSED.split()
    got = filtered(f"print(json.dumps([call(n, 0, 0, 0, 0, 0) for n in {[NR[n] for n in names]}]))")
    assert dict(zip(names, got.json(), strict=True)) == dict.fromkeys(names, "EPERM")
    assert got.asked == []


def test_unknown_and_absent_numbers() -> None:
    numbers = [NR["clone3"], NR["listns"], 1023, 2**63 - 1 & 0x3FFFFFFF, 0xFFFFFFFF]
    got = filtered(f"print(json.dumps([call(n, 0, 0, 0, 0, 0) for n in {numbers}]))")
    assert got.json() == ["ENOSYS"] * len(numbers)


def test_arguments() -> None:
    code = f"""
NEWUSER, NEWNS = 0x10000000, 0x20000
master, slave = os.openpty()
print(json.dumps({{
  "clone user": call({NR["clone"]}, NEWUSER | 17, 0, 0, 0, 0),
  "clone ns": call({NR["clone"]}, NEWNS | 17, 0, 0, 0, 0),
  "vsock": call({NR["socket"]}, 40, 1, 0),
  "alg": call({NR["socket"]}, 38, 5, 0),
  "packet": call({NR["socket"]}, 17, 3, 0),
  "unix": call({NR["socket"]}, 1, 1, 0),
  "netlink": call({NR["socket"]}, 16, 3, 0),
  "tiocsti": call({NR["ioctl"]}, slave, 0x5412, 0),
  "tiocsti high": call({NR["ioctl"]}, slave, 1 << 32 | 0x5412, 0),
  "tioclinux": call({NR["ioctl"]}, slave, 0x541C, 0),
  "winsize": call({NR["ioctl"]}, slave, 0x5413, ctypes.addressof(ctypes.create_string_buffer(8))),
  "personality": call({NR["personality"]}, 0xFFFFFFFF),
  "norandomize": call({NR["personality"]}, 0x40000),
  "setuid 0": call({NR["setuid"]}, 0),
  "setresuid": call({NR["setresuid"]}, 0xFFFFFFFF, 0, 0xFFFFFFFF),
  "setresgid -1": call({NR["setresgid"]}, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
}}))
"""
    got = filtered(code).json()
    allowed = {"unix", "netlink", "winsize", "personality", "setresgid -1"}
    assert {name for name, answer in got.items() if answer == "ok"} == allowed
    assert set(got.values()) == {"ok", "EPERM"}


WORKS = {
    "thread": """
import threading
t = threading.Thread(target=lambda: print(json.dumps("fine"))); t.start(); t.join()""",
    "subprocess": """
import subprocess
print(json.dumps(subprocess.check_output(["sh", "-c", "echo fine | cat"], text=True).strip()))""",
    "multiprocessing": """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, [-1, -2, 3]) == [1, 2, 3]
print(json.dumps("fine"))""",
    "spawn": """
import concurrent.futures, multiprocessing
context = multiprocessing.get_context("spawn")
with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    assert pool.submit(abs, -3).result() == 3
print(json.dumps("fine"))""",
    "asyncio": """
import asyncio
async def main():
    p = await asyncio.create_subprocess_exec("echo", "fine", stdout=asyncio.subprocess.PIPE)
    return (await p.communicate())[0].decode().strip()
print(json.dumps(asyncio.run(main())))""",
    "files": """
import mmap, pathlib, shutil, sqlite3, tempfile
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "a")
    path.write_bytes(b"x" * 8192)
    shutil.copy2(path, path.with_name("b"))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[0] = 65
    with sqlite3.connect(path.with_name("c")) as base:
        base.execute("create table t (a)")
    os.link(path, path.with_name("d")); os.symlink("a", path.with_name("e"))
print(json.dumps("fine"))""",
    "sockets": """
import socket, threading
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
client.sendall(b"fine")
print(json.dumps(server.accept()[0].recv(4).decode()))""",
    "signals": """
import signal
signal.signal(signal.SIGALRM, lambda *a: print(json.dumps("fine")))
signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()""",
    "numpy": """
import numpy
a = numpy.random.default_rng(1).random((300, 300))
assert numpy.allclose(a @ numpy.linalg.inv(a), numpy.eye(300))
print(json.dumps("fine"))""",
}


@pytest.mark.parametrize("name", WORKS)
def test_ordinary_programs_work(name: str) -> None:
    if name == "numpy":
        pytest.importorskip("numpy")
    got = filtered(WORKS[name])
    assert got.json() == "fine"
    assert got.asked == []


CAPSET = f"""
header = ctypes.create_string_buffer(b"\\x22\\x05\\x08\\x20" + bytes(4), 8)
sets = ctypes.create_string_buffer(24)
assert call({NR.get("capget", 0)}, ctypes.addressof(header), ctypes.addressof(sets)) == "ok"
args = (ctypes.addressof(header), ctypes.addressof(sets))
print(json.dumps([call({NR.get("capset", 0)}, *args), args]))
"""


def test_capset_is_asked_and_refused() -> None:
    got = filtered(CAPSET)
    result, args = got.json()
    assert result == "EPERM"
    (asked,) = got.asked
    assert (asked.number, asked.pid, list(asked.args[:2])) == (NR["capset"], got.pid, args)


def test_capset_is_asked_and_allowed() -> None:
    got = filtered(CAPSET, answer=proceed)
    assert got.json()[0] == "ok"
    assert len(got.asked) == 1


def test_setns_is_asked() -> None:
    code = f"""
fd = os.open("/proc/self/ns/mnt", os.O_RDONLY)
print(json.dumps(call({NR["setns"]}, fd, 0)))
"""
    got = filtered(code)
    assert got.json() == "EPERM"
    assert [asked.number for asked in got.asked] == [NR["setns"]]


def test_descendants_are_asked_too_by_their_own_pid() -> None:
    code = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", {PRELUDE + CAPSET!r}], stdout=subprocess.PIPE)
print(json.dumps([child.pid, json.loads(child.communicate()[0])[0]]))
"""
    got = filtered(code)
    pid, result = got.json()
    assert result == "EPERM"
    assert [asked.pid for asked in got.asked] == [pid]


def test_without_a_listener_the_asked_calls_do_not_exist() -> None:
    assert filtered(CAPSET, answer=None).json()[0] == "ENOSYS"


def test_caller_that_dies_while_it_waits_is_no_error() -> None:
    def kill_first(listener_fd: int, asked: Notification) -> None:
        fd = os.pidfd_open(asked.pid)
        os.kill(asked.pid, signal.SIGKILL)
        select.select([fd], [], [])
        os.close(fd)
        assert not libc.notify_valid(listener_fd, asked.id)
        libc.notify_respond(listener_fd, asked.id, proceed=True)

    got = filtered(CAPSET, answer=kill_first)
    assert got.status == -signal.SIGKILL
    assert len(got.asked) == 1


FILTER = """
import struct
class Prog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
def load(flags, action, number):
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in (
        (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, action), (0x06, 0, 0, 0x7FFF0000))))
    prog = Prog(4, ctypes.addressof(code))
    return call(%d, 1, flags, ctypes.addressof(prog))
""" % NR.get("seccomp", 0)  # noqa: UP031 - braces abound


def test_a_cell_cannot_answer_its_own_question() -> None:
    # The newest filter's listener would win, so a second one must be impossible.
    code = FILTER + f"print(json.dumps(load(8, 0x7FC00000, {NR['capset']})))"
    assert filtered(code).json() == "EBUSY"


@pytest.mark.parametrize("action", [0x7FC00000, 0x7FFF0000, 0x7FF00000, 0x7FFC0000])
def test_a_filter_on_top_opens_nothing(action: int) -> None:
    load = f"assert load(0, {action}, {NR['capset']}) == 'ok'\n"
    got = filtered(FILTER + load + CAPSET, answer=refuse)
    result = got.json()[0]
    # Its own notification has no listener, so the kernel says ENOSYS; others lose against ours.
    assert result == ("ENOSYS" if action == 0x7FC00000 else "EPERM")


INT80 = """
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret
function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
function()
"""


@pytest.mark.skipif(MACHINE != "x86_64", reason="calls of another ABI exist on x86_64")
@pytest.mark.parametrize("code", [INT80, f"call({0x40000000 | 39})"], ids=["i386", "x32"])
def test_calls_of_another_abi_kill(code: str) -> None:
    status = filtered(code).status
    if code == INT80 and status == -signal.SIGSEGV:
        pytest.skip("this kernel has no i386 calls")
    assert status == -signal.SIGSYS
