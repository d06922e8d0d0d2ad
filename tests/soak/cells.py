"""The cells of a soak: nine ordinary ones to one that is hostile, in an order that a seed decides.

Every cell says how it must end. One that is rolled back first spoils `n`, so the next `tick`
tells whether the roll back was one; one that commits leaves nothing behind.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

HOSTILE_EVERY = 10
WARM_UP = 3
"""How often each ordinary kind runs before anything is measured: what it loads stays loaded."""

MEMORY, WALL = "MemoryLimitExceeded", "WallTimeLimitExceeded"
CRASHED, EXITED = "CellCrashed", "CellExited"


@dataclass(frozen=True)
class Kind:
    """One kind of cell: its code, its `%%sandbox` line, and how it may end."""

    name: str
    code: str
    ends: frozenset[str]
    """The names of errors, or `ok`."""
    limits: str = ""
    hostile: bool = True
    adds: int = 0
    """What it adds to `n` if it ends well."""

    @property
    def text(self) -> str:
        """The cell as a user would write it."""
        return f"%%sandbox {self.limits}\n{self.code}" if self.limits else self.code


def _ordinary(name: str, code: str, end: str = "ok", *, adds: int = 0) -> Kind:
    return Kind(name, code, frozenset((end,)), hostile=False, adds=adds)


def _killed(name: str, code: str, limits: str, *ends: str) -> Kind:
    return Kind(name, f"n = -1\n{code}", frozenset(ends), limits)


def _endured(name: str, code: str, limits: str, *ends: str) -> Kind:
    return Kind(name, code, frozenset(ends), limits)


SETUP = "n = 0"
TICK = _ordinary("tick", "n += 1\nprint(n)", adds=1)
FILE = _ordinary("file", "with open(f'/tmp/f{n % 7}', 'w') as f: print(n, file=f)")
ORDINARY = (
    TICK,
    _ordinary("compute", "sum(k * k for k in range(20_000))"),
    FILE,
    _ordinary("notebook's folder", "with open('kept.txt', 'w') as f: print(n, file=f)"),
    _ordinary("program", "import subprocess; subprocess.run(['true'], check=True)"),
    _ordinary("display", "from IPython.display import HTML, display; display(HTML('<b>n</b>'))"),
    _ordinary("error", "1 / 0", "ZeroDivisionError"),
    _ordinary("big value", "big = bytes(4 << 20); del big"),
)
WEIGHTS = (9, 2, 2, 1, 1, 1, 1, 1)

FLOOD = _endured("output flood", "print('x' * (4 << 20))", "output=64K", "ok")
SHORT = "wall_time=0.2s"
HOSTILE = (
    _killed("memory hog", "hog = bytearray(1 << 30)", "memory=96M", MEMORY),
    _killed(
        "memory hog, piecewise",
        "hog = []\nwhile True: hog.append(bytearray(1 << 20))",
        "memory=96M",
        MEMORY,
    ),
    _killed(
        "memory hog, children",
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n"
        "        hog = bytearray(64 << 20); time.sleep(0.3); os._exit(0)\n"
        "[os.wait() for _ in range(4)]",
        "memory=128M wall_time=5s",
        MEMORY,
    ),
    _killed(
        "fork bomb",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "processes=48 wall_time=0.3s",
        WALL,
        MEMORY,
    ),
    _killed("endless loop", "while True: pass", SHORT, WALL),
    _killed("endless sleep", "import time; time.sleep(1000)", SHORT, WALL),
    _killed(
        "ignores the interrupt",
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
        SHORT,
        WALL,
    ),
    _killed("stops itself", "import os; os.kill(os.getpid(), 19)", SHORT, WALL),
    _killed(
        "burns processors",
        "import os\nos.fork()\nwhile True: pass",
        "cpu_time=0.2s",
        "CpuTimeLimitExceeded",
    ),
    _killed("os._exit", "import os; os._exit(0)", "", EXITED),
    _killed("kill -9 of itself", "import os; os.kill(os.getpid(), 9)", "", CRASHED),
    _killed(
        "kill -9 of everything", "import os; os.kill(-1, 9); os.kill(os.getpid(), 9)", "", CRASHED
    ),
    _endured("kill -9 of the parent", "import os; os.kill(os.getppid(), 9)", "", "PermissionError"),
    _killed("segfault", "import ctypes; ctypes.string_at(0)", "", CRASHED),
    _killed("abort", "import os; os.abort()", "", CRASHED),
    _killed("closes every descriptor", "import os; os.closerange(0, 1024)", "", CRASHED, EXITED),
    _killed("forged frames", "import os; os.write(3, os.urandom(4096))", "", CRASHED),
    _endured(
        "descriptor bomb",
        "held = []\ntry:\n    while True: held.append(open('/dev/null'))\n"
        "finally:\n    [f.close() for f in held]; del held",
        "",
        "OSError",
    ),
    _endured(
        "disk fill",
        "import os\ntry:\n    with open('/tmp/fill', 'wb') as f:\n"
        "        while True: f.write(bytes(1 << 20)); f.flush()\n"
        "finally: os.remove('/tmp/fill')",
        "disk=64M",
        "OSError",
    ),
    _killed(
        "disk fill, deleted but open",
        "import os\nf = open('/tmp/fill', 'wb'); os.remove('/tmp/fill')\n"
        "f.write(bytes(32 << 20)); f.flush(); os._exit(1)",
        "disk=64M",
        EXITED,
    ),
    FLOOD,
    _endured(
        "output flood, a program",
        "import os; _ = os.system('yes | head -c 8M >&2')",
        "output=64K",
        "ok",
    ),
    _endured(
        "display flood",
        "from IPython.display import display\n"
        "for _ in range(50): display({'text/plain': 'x' * 20_000}, raw=True)",
        "output=64K",
        "ok",
    ),
    _endured(
        "zombies",
        "import os\nfor _ in range(20):\n    if os.fork() == 0: os._exit(0)",
        "",
        "ok",
    ),
    _endured(
        "programs that stay",
        "import subprocess\nfor _ in range(5):\n"
        "    subprocess.Popen(['sleep', '1000'], start_new_session=True)",
        "",
        "ok",
    ),
    _endured(
        "thread that stays",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(0.2,)).start()",
        "",
        "ok",
    ),
    _endured(
        "shared memory",
        "import mmap\nm = mmap.mmap(-1, 8 << 20); m.write(b'x'); m.close()",
        "",
        "ok",
    ),
)


def deck(seed: int) -> Iterator[Kind]:
    """Give kinds for ever: one in ten is hostile, and all hostile ones come equally often."""
    chance = random.Random(seed)
    waiting: list[Kind] = []
    while True:
        if not waiting:
            waiting = chance.sample(HOSTILE, len(HOSTILE))
        block = chance.choices(ORDINARY, WEIGHTS, k=HOSTILE_EVERY - 1)
        block.insert(chance.randrange(HOSTILE_EVERY), waiting.pop())
        yield from block


def warm_up() -> Iterator[Kind]:
    """Give each kind of cell a few times, so that nothing is new to the session afterwards."""
    for _ in range(WARM_UP):
        yield from ORDINARY
        yield FLOOD  # the first large message starts a thread of ZeroMQ's
