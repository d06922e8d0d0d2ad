"""Cells that reach a limit: memory, processes, time, descriptors, disk."""

from __future__ import annotations

from tests.conformance.case import Case

_MEMORY = "memory=96M disk=64M"
_TIME = "wall_time=1s"


def _hog(name: str, code: str, *, limits: str = _MEMORY) -> Case:
    says = ("96 MiB", "peak", "%%sandbox memory=192M")
    return Case(name, code, "memory", limits, says=says, within_s=120.0)


MEMORY = (
    _hog("python", "hog = []\nwhile True: hog.append(bytearray(4 << 20))"),
    _hog("numpy", "import numpy as np\na = np.ones((400, 1 << 17))"),
    _hog(
        "subprocess",
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'x = bytearray(400 << 20)'])",
    ),
    _hog(
        "children-share",
        """
import os, signal
parts = []
for _ in range(8):
    if (pid := os.fork()) == 0:
        part = bytearray(os.urandom(1 << 20)) * 24
        signal.pause()
    parts.append(pid)
for pid in parts: os.waitpid(pid, 0)
""",
    ),
    # The limit of the disk is left as it is, and is higher than that of the memory.
    _hog(
        "tmpfs",
        "with open('/tmp/fill', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
        limits="memory=96M",
    ),
    _hog(
        "memfd",
        "import os\nfd = os.memfd_create('fill')\nwhile True: os.write(fd, bytes(1 << 20))",
    ),
    _hog(
        "sysv-shm",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
while True:
    shmid = libc.shmget(0, 16 << 20, 0o1600)
    assert shmid >= 0, ctypes.get_errno()
    ctypes.memset(libc.shmat(shmid, None, 0), 1, 16 << 20)
""",
    ),
    _hog(
        "posix-shm",
        """
from multiprocessing import shared_memory
blocks = []
while True:
    blocks.append(shared_memory.SharedMemory(create=True, size=16 << 20))
    blocks[-1].buf[:] = bytes([1]) * blocks[-1].size
""",
        limits="memory=96M",
    ),
    # An empty file takes no room on the disk, and a kilobyte of the kernel's memory.
    _hog(
        "inodes",
        "import os\nos.mkdir('/tmp/many')\nfor n in range(1 << 20): os.mknod(f'/tmp/many/{n}')",
    ),
    # What Linux can take back is no reason to kill: the cell ends well, within its limit.
    Case(
        "page-cache",
        "seen = 0\nwith open('/workspace/big', 'rb') as f:\n"
        "    while data := f.read(1 << 20): seen += len(data)\nprint(seen >> 20)",
        "ok",
        "memory=96M",
        prints=("256",),
        within_s=60,
    ),
)

_FORKS = "processes=24"
_REFUSED = ("`processes`", "24", "%%sandbox processes=48")

PROCESSES = (
    Case(
        "fork-bomb",
        "import os, signal\nwhile True:\n    if os.fork() == 0: signal.pause()",
        "error",
        _FORKS,
        "BlockingIOError",
        _REFUSED,
    ),
    # The bomb that forks in every branch swallows the refusals; the clock ends it.
    Case(
        "fork-bomb-spreading",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "wall_time",
        f"{_FORKS} {_TIME}",
        says=("1 s", "`processes`", "24"),
    ),
    Case(
        "fork-bomb-to-death",
        "import os, signal\ntry:\n    while True:\n        if os.fork() == 0: signal.pause()\n"
        "except OSError: os.abort()",
        "processes",
        _FORKS,
        says=("24", "SIGABRT", "%%sandbox processes=48"),
    ),
    Case(
        "thread-bomb",
        "import threading\ngate = threading.Event(); n = 0\ntry:\n    while True:\n"
        "        threading.Thread(target=gate.wait).start(); n += 1\nfinally: gate.set()",
        "error",
        _FORKS,
        "RuntimeError",
        _REFUSED,
    ),
    Case(
        "thread-bomb-in-c",
        """
import ctypes
libc = ctypes.CDLL(None)
start = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(libc.pause)
thread = ctypes.c_ulong()
while libc.pthread_create(ctypes.byref(thread), None, libc.pause, None) == 0: pass
libc.abort()
""",
        "processes",
        _FORKS,
        says=("24", "SIGABRT"),
    ),
    # Children that have ended and that nobody waits for count too.
    Case(
        "zombie-bomb",
        "import os\nwhile True:\n    if os.fork() == 0: os._exit(0)",
        "error",
        _FORKS,
        "BlockingIOError",
        _REFUSED,
    ),
)

_CLOCK = ("1 s", "%%sandbox wall_time=2s")
_DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"

TIME = (
    Case("loop", "while True: pass", "wall_time", _TIME, says=(*_CLOCK, "while True: pass")),
    # C that never looks for signals.
    Case("loop-in-c", "sum(iter(int, 1))", "wall_time", _TIME, says=_CLOCK),
    Case("loop-deaf", f"{_DEAF}while True: pass", "wall_time", _TIME, says=_CLOCK),
    Case(
        "loop-stubborn",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "wall_time",
        _TIME,
        says=_CLOCK,
    ),
    Case(
        "loop-in-subprocess",
        "import subprocess; subprocess.run(['sh', '-c', 'trap \"\" INT; while :; do :; done'])",
        "wall_time",
        _TIME,
        says=_CLOCK,
    ),
    Case(
        "loop-in-20-threads",
        "import threading\ndef spin():\n    while True: pass\n"
        "ts = [threading.Thread(target=spin) for _ in range(20)]\n"
        "for t in ts: t.start()\nfor t in ts: t.join()",
        "wall_time",
        _TIME,
        says=_CLOCK,
    ),
    Case("sleep", "import time; time.sleep(1e6)", "wall_time", _TIME, says=_CLOCK),
    Case("stop-to-self", "import os; os.kill(os.getpid(), 19)", "wall_time", _TIME, says=_CLOCK),
    Case(
        "stop-to-all",
        "import os; os.killpg(0, 19); os.kill(os.getpid(), 19)",
        "wall_time",
        _TIME,
        says=_CLOCK,
    ),
    Case(
        "deadlock-at-fork",
        """
import os, threading
lock, held, over = threading.Lock(), threading.Event(), threading.Event()
def hold():
    with lock:
        held.set()
        over.wait()
threading.Thread(target=hold).start(); held.wait()
if (pid := os.fork()) == 0:
    with lock: os._exit(0)
os.waitpid(pid, 0)
""",
        "wall_time",
        _TIME,
        says=_CLOCK,
    ),
    Case(
        "cpu-time",
        "while True: pass",
        "cpu_time",
        "cpu_time=500ms",
        says=("500 ms", "%%sandbox cpu_time=1s"),
    ),
    Case(
        "cpu-time-of-children",
        """
import os
children = []
for _ in range(4):
    if (pid := os.fork()) == 0:
        while True: pass
    children.append(pid)
for pid in children: os.waitpid(pid, 0)
""",
        "cpu_time",
        "cpu_time=500ms",
        says=("500 ms", "%%sandbox cpu_time=1s"),
    ),
)

FILES = (
    Case(
        "descriptors",
        "import os\nwhile True: os.open('/dev/null', os.O_RDONLY)",
        "error",
        "open_files=64",
        "OSError",
        ("[Errno 24]", "`open_files`", "64", "%%sandbox open_files=128"),
    ),
    Case(
        "descriptors-in-flight",
        """
import array, os, socket
ends = []
while True:
    a, b = socket.socketpair()
    fds = array.array('i', [os.dup(0) for _ in range(8)])
    a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    for fd in fds: os.close(fd)
    ends += [a, b]
""",
        "error",
        "open_files=64",
        "OSError",
        ("`open_files`", "64"),
    ),
)

_FULL = ("[Errno 28]", "`disk`", "32 MiB", "%%sandbox disk=64M")
_DISK = "disk=32M"

DISK = (
    Case(
        "bytes",
        "with open('/tmp/fill', 'wb', buffering=0) as f:\n    while True: f.write(bytes(1 << 20))",
        "error",
        _DISK,
        "OSError",
        _FULL,
        alone=True,
    ),
    Case(
        "sparse",
        "import os\nfd = os.open('/tmp/sparse', os.O_RDWR | os.O_CREAT)\n"
        "os.truncate(fd, 1 << 40); os.posix_fallocate(fd, 0, 1 << 30)",
        "error",
        _DISK,
        "OSError",
        _FULL,
        alone=True,
    ),
    Case(
        "deleted-but-open",
        "f = open('/tmp/gone', 'wb', buffering=0); import os; os.remove('/tmp/gone')\n"
        "try:\n    while True: f.write(bytes(1 << 20))\nfinally: del f",
        "error",
        _DISK,
        "OSError",
        _FULL,
        alone=True,
    ),
    Case(
        "bytes-to-death",
        "import os\ntry:\n    with open('/tmp/fill', 'wb', buffering=0) as f:\n"
        "        while True: f.write(bytes(1 << 20))\nexcept OSError: os._exit(3)",
        "disk",
        _DISK,
        alone=True,
        says=("32 MiB", "exit code 3", "%%sandbox disk=64M"),
    ),
    # A page of a mapped file that finds no room is SIGBUS.
    Case(
        "sparse-mapped",
        "import mmap, os\nfd = os.open('/tmp/sparse', os.O_RDWR | os.O_CREAT)\n"
        "os.truncate(fd, 80 << 20); m = mmap.mmap(fd, 0)\n"
        "for at in range(0, 80 << 20, 4096): m[at] = 1",
        "disk",
        _DISK,
        alone=True,
        says=("32 MiB", "SIGBUS"),
    ),
)

LIMITS = {
    "memory": MEMORY,
    "processes": PROCESSES,
    "time": TIME,
    "descriptors": FILES,
    "disk": DISK,
}
