"""A cell that is killed never was: memory and files are exactly as before, and the next cell runs."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from sandbox_kernel.model import CellResult, Outcome
from tests.conftest import missing
from tests.integration.driver import Driver, Ran

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.kernel,
]

SETUP = """
import os, random, shutil
os.chdir('/workspace')
for d in ('/workspace', '/tmp/own', '/home/jovyan'):
    os.makedirs(d, exist_ok=True)
    for n in ('tree', 'moved'): shutil.rmtree(f'{d}/{n}', ignore_errors=True)
    for n in ('note', 'link', 'new', 'open-w'):
        if os.path.lexists(f'{d}/{n}'): os.remove(f'{d}/{n}')
for d in ('/workspace', '/tmp/own', '/home/jovyan'):
    os.makedirs(d + '/tree/deep', exist_ok=True)
    open(d + '/tree/deep/leaf', 'w').write('leaf')
    open(d + '/note', 'w').write('before')
os.symlink('note', '/workspace/link')
x, nested = [1, 2, 3], {'a': {'b': [0]}}
g = (i for i in range(100)); next(g); next(g)
random.seed(7); random.random()
os.environ['STATE'] = 'before'
w = open('/workspace/open-w', 'w'); w.write('0123'); w.flush()
r = open('/workspace/note'); r.read(2)
os.makedirs('/workspace/cwd', exist_ok=True); os.chdir('/workspace/cwd')
"""

# Changes everything that SETUP has made, then does not come back. Before Linux 6.6 the files of a
# folder can be deleted, but not the folder.
DAMAGE = """
import os, random, shutil
def drop(folder):
    shutil.rmtree(folder, ignore_errors=not deletes_folders)
    assert not any(files for _, _, files in os.walk(folder))
x.append(4); nested['a']['b'][0] = 9; next(g); random.random(); y = 'new'
os.environ['STATE'] = 'after'; os.environ['MORE'] = '1'
w.write('4567'); w.flush(); r.read(2)
open('/workspace/note', 'w').write('after'); open('/tmp/own/note', 'a').write('after')
drop('/home/jovyan/tree')
shutil.copytree('/workspace/tree', '/workspace/moved'); drop('/workspace/tree')
os.remove('/workspace/link'); open('/workspace/new', 'w').write('new'); os.chmod('/tmp/own/note', 0)
os.chdir('/tmp')
"""

LOOK = """
def look():
    import glob, os, random
    files = {}
    for d in ('/workspace', '/tmp/own', '/home/jovyan'):
        for folder, _, names in os.walk(d):
            for name in [*names, '.']:
                path = os.path.join(folder, name)
                info = os.lstat(path)
                link = os.path.islink(path)
                text = os.readlink(path) if link else open(path, 'rb').read() if name != '.' else None
                files[path] = (oct(info.st_mode), info.st_mtime_ns if name != '.' else 0, text)
    # What has a position is looked at without moving it.
    return (x, nested, g.gi_frame.f_locals.get('i'), random.getstate() == known, os.environ.get('STATE'),
        'MORE' in os.environ, os.lseek(w.fileno(), 0, 1), os.lseek(r.fileno(), 0, 1), os.getcwd(),
        'y' in globals(), files)
import random as _r; known = _r.getstate()
"""


async def prepare(box: Driver) -> Any:
    """Make the state and give what it looks like."""
    await box.ok(f"deletes_folders = {not missing(('overlay_opaque',))}")
    await box.ok(SETUP)
    await box.ok(LOOK)
    return await box.value("look()")


async def assert_unchanged(box: Driver, before: Any, ran: Ran) -> None:
    """Assert that the state is as it was, and that the next cell runs at once."""
    assert not ran.result.committed
    assert ran.result.reply == {}
    started_s = time.monotonic()
    after = await box.value("look()")
    assert time.monotonic() - started_s < 2
    assert after[:-1] == before[:-1]
    assert after[-1] == before[-1]
    assert await box.value("(next(g), w.write('xy'), w.flush(), r.read(2))") == (2, 2, None, "fo")
    assert await box.value("open('/workspace/open-w').read()") == "0123xy"


def crashed(number: int) -> dict[str, Any]:
    return {"outcome": Outcome.CRASHED, "signal": number, "exit_code": None}


def exited(code: int) -> dict[str, Any]:
    return {"outcome": Outcome.EXITED, "signal": None, "exit_code": code}


HOG = "hog = []\nwhile True: hog.append(bytearray(8 << 20))"
DEAF = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
while True: pass"""
STUBBORN = """
while True:
    try:
        while True: sum(range(100))
    except KeyboardInterrupt: pass"""
# Whatever is mounted read-only is skipped: removing it would fail file by file, which takes long.
RM = """
import subprocess
subprocess.run("rm -rf --one-file-system --no-preserve-root /workspace/* /workspace/.[!.]* / 2>/dev/null", shell=True)
assert not os.path.exists('/workspace/note') and not os.path.exists('/home/jovyan/note')
"""
MEMORY = {"outcome": Outcome.MEMORY}

DEATHS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "memory": (HOG, {"memory_bytes": 128 << 20}, MEMORY),
    "deaf loop": (DEAF, {"wall_time_s": 0.5}, {"outcome": Outcome.WALL_TIME}),
    "stubborn loop": (STUBBORN, {"wall_time_s": 0.5}, {"outcome": Outcome.WALL_TIME}),
    "loop in C": (
        "import ctypes; ctypes.CDLL(None).pause()\nimport signal; signal.pthread_sigmask(signal.SIG_BLOCK, {2}); ctypes.CDLL(None).pause()",
        {"wall_time_s": 0.5},
        {"outcome": Outcome.WALL_TIME},
    ),
    "cpu time": ("while True: pass", {"cpu_time_s": 0.3}, {"outcome": Outcome.CPU_TIME}),
    "exit 0": ("os._exit(0)", {}, exited(0)),
    "exit 3": ("os._exit(3)", {}, exited(3)),
    "C exit": ("import ctypes; ctypes.CDLL(None).exit(5)", {}, exited(5)),
    "exec": ("os.execv('/bin/true', ['true'])", {}, exited(0)),
    "exec with output": ("os.execv('/bin/sh', ['sh', '-c', 'echo said; exit 4'])", {}, exited(4)),
    "segfault": ("import ctypes; ctypes.string_at(0)", {}, crashed(signal.SIGSEGV)),
    "abort": ("os.abort()", {}, crashed(signal.SIGABRT)),
    "fpe": ("os.kill(os.getpid(), 8)", {}, crashed(signal.SIGFPE)),
    "term": ("os.kill(os.getpid(), 15)", {}, crashed(signal.SIGTERM)),
    "kill": ("os.kill(os.getpid(), 9)", {}, crashed(signal.SIGKILL)),
    "kill by a child": (
        "import subprocess; subprocess.run(['kill', '-9', str(os.getpid())])",
        {},
        crashed(signal.SIGKILL),
    ),
    "kill all": ("os.system('kill -9 -1'); os.kill(-1, 9); os._exit(7)", {}, {}),
    "kill all by a child": (
        "import subprocess; subprocess.run('kill -9 -1', shell=True)",
        {},
        crashed(signal.SIGKILL),
    ),
    "kill the group": ("os.killpg(0, 9)", {}, crashed(signal.SIGKILL)),
    "rm and kill": (RM + "os.kill(os.getpid(), 9)", {}, crashed(signal.SIGKILL)),
    "rm and exit": (RM + "os._exit(0)", {}, exited(0)),
    "stack overflow": (
        "import ctypes, sys; sys.setrecursionlimit(10**9)\nT = ctypes.CFUNCTYPE(None)\ndef f(): T(f)()\nf()",
        {},
        crashed(signal.SIGSEGV),
    ),
    "stopped": ("os.kill(os.getpid(), 19)", {"wall_time_s": 0.5}, {"outcome": Outcome.WALL_TIME}),
    "killed in a thread": (
        "import threading; threading.Thread(target=os._exit, args=(6,)).start()\nwhile True: pass",
        {},
        exited(6),
    ),
    "disk full, then exit": (
        "open('/tmp/full', 'wb').write(bytes(64 << 20)); os._exit(2)",
        {},
        exited(2),
    ),
}


def fits(result: CellResult, expected: dict[str, Any]) -> bool:
    return all(getattr(result, name) == value for name, value in expected.items())


@pytest.mark.parametrize(("death", "limits", "expected"), DEATHS.values(), ids=DEATHS)
async def test_a_killed_cell_changes_nothing(
    box: Driver, death: str, limits: dict[str, Any], expected: dict[str, Any]
) -> None:
    before = await prepare(box)
    ran = await box.run(DAMAGE + death, **limits)
    assert fits(ran.result, expected), ran.said()
    await assert_unchanged(box, before, ran)


async def test_an_endless_loop_that_hears_the_limit_is_rolled_back_too(box: Driver) -> None:
    before = await prepare(box)
    ran = await box.run(DAMAGE + "while True: pass", wall_time_s=0.5)
    assert ran.outcome is Outcome.WALL_TIME
    assert "while True: pass" in ran.trace
    await assert_unchanged(box, before, ran)


async def test_kill_all_spares_who_calls_it(box: Driver) -> None:
    # kill(-1) leaves out the caller (kill(2)), and the heads are not the cell's to kill.
    await box.ok(
        "import os; survivor = 1\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: pass\nsurvivor = 2"
    )
    assert await box.value("survivor") == 2


async def test_an_error_that_an_old_linux_makes_is_explained(box: Driver) -> None:
    await box.ok("import os, shutil; os.makedirs('folder'); open('folder/file', 'w').close()")
    ran = await box.run("shutil.rmtree('folder')")
    if missing(("overlay_opaque",)):
        assert "Errno 5" in ran.result.reply["evalue"]
        assert "cannot be deleted: delete its files" in " ".join(ran.result.notes)
    else:
        assert ran.outcome is Outcome.OK, ran.said()
        assert ran.result.notes == ()


@pytest.mark.needs("overlay_opaque")
async def test_removing_everything_is_committed_when_the_cell_ends_well(fresh: Driver) -> None:
    (fresh.workspace / "precious").write_text("of the host")
    await fresh.ok(
        "import os, shutil\nkept = 'variable'\n"
        "for d in ('/workspace', '/home/jovyan', '/var/tmp'):\n"
        "    for n in os.listdir(d):\n"
        "        p = os.path.join(d, n); shutil.rmtree(p) if os.path.isdir(p) else os.remove(p)"
    )
    assert await fresh.value("(kept, os.listdir('/workspace'), os.listdir('/home/jovyan'))") == (
        "variable",
        [],
        [],
    )
    assert (fresh.workspace / "precious").read_text() == "of the host"
    await fresh.ok("open('/workspace/again', 'w').write('x')")
    assert await fresh.value("os.listdir('/workspace')") == ["again"]


async def test_removing_the_working_folder(box: Driver) -> None:
    await box.ok(
        "import os; os.makedirs('/workspace/gone'); os.chdir('/workspace/gone'); os.rmdir('/workspace/gone')"
    )
    assert await box.value("6 * 7") == 42
    await box.ok("import os; os.chdir('/workspace')")


async def test_many_deaths_in_a_row(box: Driver) -> None:
    await box.ok("alive = 0")
    for death in ("os._exit(1)", "os.kill(os.getpid(), 9)", "os.abort()") * 5:
        ran = await box.run("import os; alive += 100; " + death)
        assert not ran.result.committed
    await box.ok("alive += 1")
    assert await box.value("alive") == 1


async def test_the_first_cell_may_die(fresh: Driver) -> None:
    ran = await fresh.run("import os; os._exit(9)")
    assert fits(ran.result, exited(9)), ran.said()
    assert await fresh.value("'os' in globals()") is False


async def test_output_before_the_death_is_shown(box: Driver) -> None:
    ran = await box.run(
        "import os, sys; print('last words'); print('err', file=sys.stderr); os._exit(1)"
    )
    assert ran.text() == "last words\n"
    assert ran.text("stderr") == "err\n"


async def test_output_of_a_killed_child_is_shown(box: Driver) -> None:
    ran = await box.run("import os; os.execv('/bin/sh', ['sh', '-c', 'echo said; kill -9 $$'])")
    assert ran.text() == "said\n"
    assert fits(ran.result, crashed(9)), ran.said()


# ---- what breaks the link between the guest and the kernel


async def test_closing_every_descriptor_is_a_crash(box: Driver) -> None:
    before = await prepare(box)
    ran = await box.run(DAMAGE + "os.closerange(0, 1024)\nwhile True: pass")
    assert ran.outcome in (Outcome.CRASHED, Outcome.EXITED), ran.said()
    await assert_unchanged(box, before, ran)


async def test_nonsense_on_the_link_is_a_crash(box: Driver) -> None:
    before = await prepare(box)
    ran = await box.run(DAMAGE + "os.write(3, b'nonsense' * 100)\nwhile True: pass")
    assert ran.outcome is Outcome.CRASHED, ran.said()
    assert "magic number" in " ".join(ran.result.notes)
    await assert_unchanged(box, before, ran)


@pytest.mark.parametrize(
    "lie",
    [
        "{'op': 'done'}",
        "{'op': 'parked'}",
        "{'op': ['x']}",
        "{'op': 'done', 'reply': {'status': 'ok'}}",
        "{'op': 'exited', 'id': 'x'}",
        "{'op': 'message', 'msg_type': 'execute_input', 'content': {}, 'metadata': {}}",
    ],
)
async def test_a_lie_on_the_link_never_costs_the_session(box: Driver, lie: str) -> None:
    await box.ok("truth = 1")
    ran = await box.run(
        f"import os, json, struct\nt = json.dumps({lie}).encode(); truth = 2\n"
        "os.write(3, struct.pack('!III', 0x5B0CE115, len(t), 0) + t)\nwhile True: pass"
    )
    assert not ran.result.committed, ran.said()
    assert ran.outcome is Outcome.CRASHED, ran.said()
    assert await box.value("truth") == 1


async def test_a_forked_child_that_goes_on_with_the_cell_costs_no_state(box: Driver) -> None:
    await box.ok("forked = 'before'")
    ran = await box.run("import os; forked = 'after'; pid = os.fork()")
    assert await box.value("forked") == ("after" if ran.result.committed else "before")
    assert await box.value("6 * 7") == 42


async def test_a_forked_child_that_exits_is_nothing_special(box: Driver) -> None:
    assert (
        await box.ok(
            "import os\npid = os.fork()\nif pid == 0: os._exit(3)\nprint(os.waitpid(pid, 0)[1])"
        )
        == "768\n"
    )


async def test_a_cell_killed_while_it_floods(box: Driver) -> None:
    ran = await box.run("import os\nos.write(1, b'x' * (8 << 20)); os._exit(1)")
    assert fits(ran.result, exited(1)), ran.said()
    assert len(ran.text()) == 8 << 20
