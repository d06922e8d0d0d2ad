"""Cells that flood, end themselves, or attack what they run in."""

from __future__ import annotations

from tests.conformance.case import Case

_TIME = "wall_time=1s"
_CUT = ("[output limit of 1 MiB reached",)
_MIB = "MIB = 1 << 20\n"


def _flood(name: str, code: str, *, warns: tuple[str, ...] = _CUT) -> Case:
    """Give a cell that writes far more than the limit and ends well; the rest is dropped."""
    return Case(name, _MIB + code, "ok", warns=warns, within_s=120)


OUTPUT = (
    _flood("stdout", "for _ in range(1024): print('x' * MIB)"),
    _flood("stderr", "import sys\nfor _ in range(1024): print('x' * MIB, file=sys.stderr)"),
    _flood(
        "stdout-of-a-program",
        "import subprocess; subprocess.run('head -c 1G /dev/zero', shell=True, check=True)",
    ),
    _flood(
        "display-data",
        "from IPython.display import display\n"
        "for _ in range(256): display({'text/plain': 'x' * 4 * MIB}, raw=True)",
    ),
    _flood(
        "comm-messages",
        "from comm import create_comm\nflood = create_comm(target_name='flood')\n"
        "for _ in range(128): flood.send({}, buffers=[bytes(8 * MIB)])\nflood.close()",
    ),
    _flood("one-line", "print('x' * 500 * MIB)"),
    _flood("one-line-in-parts", "for _ in range(500): print('x' * MIB, end='')"),
    _flood("many-lines", "for n in range(300_000): print(n)"),
    Case(
        "display-too-big",
        "from IPython.display import display\ndisplay({'text/plain': 'x' * (80 << 20)}, raw=True)",
        "error",
        ename="WireError",
        says=("limit",),
    ),
    Case(
        "invalid-utf-8",
        "import os\nfor _ in range(200): os.write(1, bytes(range(128, 256)))\nos.write(1, b'end')",
        "ok",
        prints=("\ufffd", "end"),
    ),
    Case(
        "nuls",
        "import os, sys\nos.write(1, b'a\\0b'); print('c\\0d'); print('e\\0f', file=sys.stderr)\n"
        "for _ in range(100): print('\\0' * 1000)",
        "ok",
        prints=("a\0b", "c\0d"),
        warns=("e\0f",),
    ),
    # Passed on as they are: what they mean is for the page that shows them.
    Case(
        "terminal-escapes",
        r"""
print('\x1b[2J\x1b[H\x1b]0;title\x07\x1b[?1049h\x1b[6n\x1bc\x9b31m', end='')
print('\r\b\x0e\x1b(0' * 1000 + '\x1b]52;c;aGk=\x07')
""",
        "ok",
        prints=("\x1b[2J", "\x1b]52;c;aGk="),
    ),
)

ENDS = (
    Case("exit-0", "import os; os._exit(0)", "exited", says=("exit code 0",)),
    Case("system-exit", "raise SystemExit(3)", "error", ename="SystemExit"),
    Case("sys-exit", "import sys; sys.exit('enough')", "error", ename="SystemExit"),
    Case("quit", "quit()", "ok"),
    Case("kill-self", "import os; os.kill(os.getpid(), 9)", "crashed", says=("SIGKILL",)),
    # The same signal and exit status that a kill for memory has; only the counters tell.
    Case("lie-137", "import os; os._exit(137)", "exited", says=("exit code 137",)),
    Case(
        "lie-of-a-child",
        "import os\nif os.fork() == 0: os.kill(os.getpid(), 9)\nos.wait(); os._exit(137)",
        "exited",
        says=("exit code 137",),
    ),
    Case(
        "kill-everything",
        "import os, subprocess\nwhile True: subprocess.run(['kill', '-9', '-1'])",
        "crashed",
        says=("SIGKILL",),
    ),
    Case(
        "kill-parent",
        "import os; os.kill(os.getppid(), 9)",
        "error",
        ename="PermissionError",
        says=("[Errno 1]",),
    ),
    Case("kill-init", "import os; os.kill(1, 9)", "error", ename="PermissionError"),
    Case("segfault", "import ctypes; ctypes.string_at(0)", "crashed", says=("SIGSEGV",)),
    Case("abort", "import os; os.abort()", "crashed", says=("SIGABRT",)),
    Case("recursion", "def down(): down()\ndown()", "error", ename="RecursionError"),
    Case(
        "stack-overflow",
        "import sys; sys.setrecursionlimit(1 << 30)\n"
        "class Down:\n    def __repr__(self): return repr(self)\nrepr(Down())",
        "crashed",
        "memory=1G",
        says=("SIGSEGV",),
    ),
    Case(
        "atexit",
        "import atexit, sys\natexit.register(lambda: print('never'))\nsys.exit()",
        "error",
        ename="SystemExit",
    ),
)

DESCRIPTORS = (
    Case(
        "close-all",
        "import os; os.closerange(0, 1 << 16)",
        "crashed",
        says=("stopped answering",),
    ),
    Case(
        "close-all-but-output",
        "import os; os.closerange(3, 1 << 16)\nprint('on')",
        "crashed",
        says=("stopped answering",),
        prints=("on",),
    ),
    Case(
        "flood-all",
        """
import os, threading
def flood(fd):
    try:
        while True: os.write(fd, b'\\xff' * 65536)
    except OSError: pass
ts = [threading.Thread(target=flood, args=(int(fd),)) for fd in os.listdir('/proc/self/fd')]
for t in ts: t.start()
for t in ts: t.join()
""",
        "crashed",
        "wall_time=20s",
        warns=("frame",),
    ),
    Case(
        "flood-the-link-by-a-child",
        "import os\nif (pid := os.fork()) == 0: os.write(3, bytes(1 << 16)); os._exit(0)\n"
        "os.waitpid(pid, 0)\nwhile True: pass",
        "crashed",
        "wall_time=20s",
        warns=("another process spoke",),
    ),
    # A link that nobody reads fills up: the cell waits for itself.
    Case(
        "read-the-link",
        "import os\nwhile True: os.read(3, 1 << 16)",
        "wall_time",
        _TIME,
        says=("1 s",),
    ),
)

GUEST = (
    Case(
        "delete-the-interpreter",
        """
import os, sys, sysconfig
import IPython, sandbox_kernel
paths = [os.path.realpath(sys.executable), os.__file__, IPython.__file__, sandbox_kernel.__path__[0]]
kept = []
for path in paths:
    try:
        os.remove(path)
    except OSError as error:
        kept.append(path)
    try:
        open(path, 'r+b').close()
    except OSError as error:
        kept.append(path)
assert kept == [path for path in paths for _ in range(2)], kept
raise OSError('all are there')
""",
        "error",
        ename="OSError",
        says=("all are there",),
    ),
    Case(
        "delete-everything",
        "import subprocess\n"
        "subprocess.run('rm -rf /tmp /workspace /home /dev/shm 2> /dev/null', shell=True)",
        "ok",
        alone=True,
    ),
    Case(
        "forget-modules",
        "import sys\nfor name in list(sys.modules): del sys.modules[name]\nsys.path.clear()",
        "exited",
        says=("exit code 1",),
    ),
    Case(
        "patch-the-reply",
        "import sandbox_kernel.guest.main as guest\n"
        "def lie(self, reply): raise RuntimeError('patched')\nguest.Guest._answer_of = lie",
        "exited",
        says=("exit code 1",),
    ),
    Case(
        "patch-the-link",
        "from sandbox_kernel.guest.link import Link\nLink.send = lambda *args: None",
        "wall_time",
        _TIME,
    ),
    Case(
        "patch-json",
        "import json\njson.dumps = lambda *args, **options: '{'",
        "crashed",
        warns=("frame",),
    ),
    Case(
        "patch-builtins",
        "import builtins\ndef none(*args, **options): return None\n"
        "for name in ('len', 'int', 'str', 'dict', 'getattr', 'open', 'isinstance'):\n"
        "    setattr(builtins, name, none)",
        "exited",
    ),
    Case(
        "patch-the-park",
        "from sandbox_kernel.guest.main import Guest\n"
        "Guest._do_park = lambda self, frame: self._link.receive()",
        "ok",
        later=("Files and variables are as they were before",),
        within_s=120,
    ),
    Case(
        "patch-the-fork",
        "from sandbox_kernel.guest.main import Guest\nGuest._do_fork = lambda self, frame: None",
        "ok",
        later=("Files and variables are as they were before",),
        within_s=120,
    ),
    Case(
        "patch-the-entry",
        "from sandbox_kernel.guest.main import Guest\nGuest._do_enter = lambda self, frame: None",
        "ok",
        later=("Files and variables are as they were before",),
        within_s=240,
    ),
    Case(
        "patch-the-frames",
        "from sandbox_kernel.guest.main import Guest\n"
        "def lie(self): raise RuntimeError('patched')\nGuest._turn = lie",
        "ok",
        later=("Files and variables are as they were before",),
        within_s=120,
    ),
    Case(
        "at-fork-hooks-that-raise",
        "import os\ndef fail(): raise RuntimeError('hook')\n"
        "os.register_at_fork(before=fail, after_in_child=fail, after_in_parent=fail)\n"
        "if (pid := os.fork()) == 0: os._exit(0)\nos.waitpid(pid, 0)",
        "ok",
        warns=("RuntimeError: hook",),
        alone=True,
    ),
    Case(
        "at-fork-hooks-that-loop",
        "import os\ndef loop():\n    while True: pass\nos.register_at_fork(before=loop); os.fork()",
        "wall_time",
        _TIME,
    ),
    # They do not run where the session itself forks.
    Case(
        "at-fork-hooks-left-behind",
        "import os\ndef loop():\n    while True: pass\n"
        "os.register_at_fork(before=loop, after_in_child=loop, after_in_parent=loop)",
        "ok",
        alone=True,
    ),
    Case(
        "gc-callbacks-that-raise",
        "import gc\ndef fail(*args): raise RuntimeError('callback')\n"
        "gc.callbacks.append(fail); gc.collect()",
        "ok",
        warns=("RuntimeError: callback",),
        alone=True,
    ),
    Case(
        "gc-callbacks-that-loop",
        "import gc\ndef loop(*args):\n    while True: pass\n"
        "gc.callbacks.append(loop); gc.collect()",
        "wall_time",
        _TIME,
    ),
    Case(
        "finalizers-that-loop",
        "class Sticky:\n    def __del__(self):\n        while True: pass\nsticky = Sticky(); del sticky",
        "wall_time",
        _TIME,
    ),
    Case(
        "signal-handlers-left-behind",
        "import signal\nfor number in set(signal.Signals) - {9, 19}:\n"
        "    signal.signal(number, signal.SIG_IGN)",
        "ok",
        alone=True,
    ),
    Case(
        "stdout-none",
        "import sys; sys.stdout = None",
        "ok",
        warns=("sys.stdout",),
    ),
    Case(
        "stdout-that-raises",
        "import sys\nclass Broken:\n    def write(self, text): raise RuntimeError('broken')\n"
        "    flush = write\nsys.stdout = sys.stderr = Broken()",
        "ok",
        warns=("sys.stdout", "sys.stderr"),
    ),
    Case("stdout-closed", "import os, sys; sys.stdout.close(); os.close(1)", "ok"),
    Case(
        "stdout-in-a-closed-file",
        "import sys; sys.stdout = open('/tmp/log', 'w'); sys.stdout.close()",
        "ok",
        warns=("sys.stdout",),
    ),
    Case(
        "excepthook", "import sys; sys.excepthook = None\n1 / 0", "error", ename="ZeroDivisionError"
    ),
)

HOSTILE = {
    "output": OUTPUT,
    "ends": ENDS,
    "fds": DESCRIPTORS,
    "guest": GUEST,
}
