"""State carries over exactly: what one cell leaves, the next one finds."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sandbox_kernel.model import Outcome
from tests.integration.driver import Driver, Shared

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.kernel,
]


@pytest_asyncio.fixture(loop_scope="module")
async def cells(box: Driver) -> AsyncIterator[Driver]:
    """Give a session whose working folder is /workspace, whatever the test before did."""
    await box.ok("import os; os.chdir('/workspace')")
    yield box


# Each a list of cells, and an expression that must be true in the cell after them.
CARRIED: dict[str, tuple[list[str], str]] = {
    "variable": (["a = 1", "a += 1", "a *= 21"], "a == 42"),
    "identity": (["o = object(); n = id(o)", "pass"], "id(o) == n"),
    "shared object": (["l = []; m = [l, l]", "l.append(1)"], "m == [[1], [1]] and m[0] is l"),
    "function": (["def f(x): return x + k", "k = 2"], "f(1) == 3"),
    "closure": (
        [
            "def make():\n    n = 0\n    def inc():\n        nonlocal n; n += 1; return n\n    return inc\ninc = make(); inc()",
            "inc()",
        ],
        "inc() == 3",
    ),
    "lambda": (["sq = lambda x: x * x"], "sq(7) == 49"),
    "class": (
        ["class C:\n    n = 0\n    def __init__(self): C.n += 1", "c = C()", "d = C()"],
        "C.n == 2 and type(c) is C and isinstance(d, C)",
    ),
    "module": (
        ["import json, sys; json.marker = 7; m = sys.modules['json']", "import json as j2"],
        "j2 is json is m and json.marker == 7",
    ),
    "module of one's own": (
        ["open('mine.py', 'w').write('x = [1]')", "import mine; mine.x.append(2)"],
        "__import__('mine').x == [1, 2]",
    ),
    "generator": (["g = (i for i in range(10)); next(g)", "next(g), next(g)"], "next(g) == 3"),
    "generator with finally": (
        [
            "def gen():\n    try:\n        yield 1\n        yield 2\n    finally: log.append('end')\nlog = []; h = gen(); next(h)",
            "next(h)",
            "h.close()",
        ],
        "log == ['end']",
    ),
    "iterators": (
        ["it = iter('abcdef'); next(it)", "z = zip(it, it); next(z)"],
        "next(z) == ('d', 'e')",
    ),
    "exception kept": (
        ["try:\n    1/0\nexcept Exception as e: err = e", "pass"],
        "err.__traceback__.tb_lineno == 2",
    ),
    "environment": (["import os; os.environ['SPAM'] = 'eggs'"], "os.environ['SPAM'] == 'eggs'"),
    "environment of programs": (
        ["import os, subprocess; os.environ['SPAM'] = 'ham'"],
        "subprocess.getoutput('echo $SPAM') == 'ham'",
    ),
    "environment removed": (
        ["os.environ['GONE'] = '1'", "del os.environ['GONE']"],
        "'GONE' not in os.environ",
    ),
    "folder": (
        ["import os; os.mkdir('sub'); os.chdir('sub')", "open('f', 'w').close()"],
        "os.listdir('/workspace/sub') == ['f'] and os.getcwd() == '/workspace/sub'",
    ),
    "folder elsewhere": (["import os; os.chdir('/tmp')"], "os.getcwd() == '/tmp'"),
    "umask": (
        ["import os; old = os.umask(0o077)", "open('masked', 'w').close()"],
        "os.stat('masked').st_mode & 0o777 == 0o600 and os.umask(old) == 0o077",
    ),
    "signal handler": (
        [
            "import signal, os; got = []\n_ = signal.signal(signal.SIGUSR1, lambda *a: got.append(1))",
            "os.kill(os.getpid(), signal.SIGUSR1)",
        ],
        "got == [1]",
    ),
    "recursion limit": (
        ["import sys; sys.setrecursionlimit(4321)"],
        "sys.getrecursionlimit() == 4321",
    ),
    "decimal context": (
        ["import decimal; decimal.getcontext().prec = 5"],
        "str(decimal.Decimal(1) / 3) == '0.33333'",
    ),
    "context variable of a cell": (
        ["import contextvars; cv = contextvars.ContextVar('cv', default=0); _ = cv.set(3)"],
        "cv.get() == 3",
    ),
    "numpy's print options": (
        ["import numpy as np; np.set_printoptions(precision=2)"],
        "str(np.array([1.23456])) == '[1.23]'",
    ),
    "numpy's error state": (
        ["import numpy as np; _ = np.seterr(divide='raise')"],
        "np.geterr()['divide'] == 'raise'",
    ),
    "context variable": (
        [
            "import contextvars; v = contextvars.ContextVar('v', default=0)",
            "c = contextvars.copy_context(); c.run(v.set, 5)",
        ],
        "c[v] == 5",
    ),
    "weak reference": (["import weakref\nclass W: pass\nw = W(); r = weakref.ref(w)"], "r() is w"),
    "lock held": (
        ["import threading; lock = threading.Lock(); lock.acquire()"],
        "lock.locked() and not lock.acquire(blocking=False)",
    ),
    "pipe with data": (
        ["import os; r, w = os.pipe(); os.write(w, b'abc')", "x = os.read(r, 1)"],
        "x == b'a' and os.read(r, 9) == b'bc'",
    ),
    "socket pair": (
        ["import socket; s, t = socket.socketpair(); s.sendall(b'hi')"],
        "t.recv(9) == b'hi'",
    ),
    "bytes in memory": (
        ["big = bytearray(100 << 20); big[12345678] = 7"],
        "len(big) == 100 << 20 and big[12345678] == 7",
    ),
    "anonymous map": (
        ["import mmap; mm = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE); mm[0:3] = b'map'"],
        "mm[0:3] == b'map'",
    ),
    "sqlite in memory": (
        [
            "import sqlite3; db = sqlite3.connect(':memory:'); _ = db.execute('create table t(x)')",
            "_ = db.execute('insert into t values (4)')",
        ],
        "db.execute('select x from t').fetchall() == [(4,)]",
    ),
    "sqlite in a file": (
        [
            "import sqlite3; fdb = sqlite3.connect('a.db'); _ = fdb.execute('create table t(x)')",
            "with fdb: _ = fdb.execute('insert into t values (4)')",
        ],
        "fdb.execute('select x from t').fetchall() == [(4,)]",
    ),
    "IPython's history": (["6 * 7", "pass"], "_ == 42 or 42 in Out.values()"),
    "C library's state": (
        [
            "import ctypes; libc = ctypes.CDLL(None); libc.srand(5); p = [libc.rand() for _ in range(3)]; libc.srand(5); libc.rand()",
            "q = libc.rand()",
        ],
        "q == p[1] and libc.rand() == p[2]",
    ),
    "hash seed": (["h0 = hash('text')"], "hash('text') == h0"),
}


@pytest.mark.parametrize(("code", "holds"), CARRIED.values(), ids=CARRIED)
async def test_carried(cells: Driver, code: list[str], holds: str) -> None:
    for cell in code:
        await cells.ok(cell)
    assert await cells.value(holds) is True


async def test_state_before_an_exception_is_kept(cells: Driver) -> None:
    ran = await cells.run("e1 = 'kept'\nopen('e.txt', 'w').write('kept')\n1/0\ne2 = 1")
    assert ran.outcome is Outcome.ERROR
    assert ran.result.committed
    assert ran.result.reply["ename"] == "ZeroDivisionError"
    assert (
        await cells.value("e1 == 'kept' == open('e.txt').read() and 'e2' not in globals()") is True
    )


async def test_syntax_error_commits_and_says_so(cells: Driver) -> None:
    ran = await cells.run("this is no python")
    assert (ran.outcome, ran.result.reply["ename"]) == (Outcome.ERROR, "SyntaxError")


async def test_system_exit_is_an_error_of_the_cell(cells: Driver) -> None:
    ran = await cells.run("s = 1\nimport sys; sys.exit(3)")
    assert (ran.outcome, ran.result.reply["ename"]) == (Outcome.ERROR, "SystemExit"), ran.said()
    assert await cells.value("s") == 1


async def test_a_silent_cell_commits(cells: Driver) -> None:
    await cells.run("quiet = 1", silent=True)
    assert await cells.value("quiet") == 1


async def test_user_expressions(cells: Driver) -> None:
    ran = await cells.run("u = 20", expressions={"twice": "u * 2", "bad": "nonsense"})
    answers = ran.result.reply["user_expressions"]
    assert answers["twice"]["data"]["text/plain"] == "40"
    assert answers["bad"]["status"] == "error"


# ---- random numbers


async def test_random_goes_on_where_it_was(cells: Driver) -> None:
    await cells.ok("import random; random.seed(1234)")
    found = [await cells.value("random.random()") for _ in range(3)]
    expected = random.Random(1234)
    assert found == [expected.random() for _ in range(3)]


async def test_numpy_generators_go_on_where_they_were(cells: Driver) -> None:
    await cells.ok("import numpy as np; np.random.seed(5); rng = np.random.default_rng(6)")
    found = [await cells.value("(float(np.random.rand()), float(rng.random()))") for _ in range(3)]
    numpy = pytest.importorskip("numpy")
    legacy, rng = numpy.random.RandomState(5), numpy.random.default_rng(6)
    assert found == [(legacy.rand(), rng.random()) for _ in range(3)]


# ---- asyncio


async def test_top_level_await(cells: Driver) -> None:
    await cells.ok(
        "import asyncio; await asyncio.sleep(0.001); aw = await asyncio.sleep(0, 'done')"
    )
    assert await cells.value("aw") == "done"


async def test_a_task_goes_on_in_the_next_cell(cells: Driver) -> None:
    await cells.ok(
        "import asyncio\nsteps = []\n"
        "async def work():\n    for i in range(5):\n        steps.append(i); await asyncio.sleep(0.001)\n    return 'end'\n"
        "task = asyncio.create_task(work()); await asyncio.sleep(0)"
    )
    first = await cells.value("list(steps)")
    assert first[:1] == [0]
    assert len(first) < 5
    assert await cells.ok("print(await task, steps)") == "end [0, 1, 2, 3, 4]\n"


async def test_asyncio_objects_carry_over(cells: Driver) -> None:
    await cells.ok(
        "import asyncio\nq = asyncio.Queue(); q.put_nowait(1)\nfut = asyncio.get_running_loop().create_future()\n"
        "alock = asyncio.Lock(); await alock.acquire(); ev = asyncio.Event(); loop1 = asyncio.get_running_loop()"
    )
    await cells.ok("q.put_nowait(2); asyncio.get_running_loop().call_soon(fut.set_result, 5)")
    await cells.ok("waiter = asyncio.create_task(ev.wait())")
    await cells.ok("ev.set()")
    text = await cells.ok(
        "print(await q.get(), await q.get(), await fut, alock.locked(), await waiter, loop1 is asyncio.get_running_loop())"
    )
    assert text == "1 2 5 True True True\n"


async def test_streams_and_async_subprocesses(cells: Driver) -> None:
    text = await cells.ok(
        "import asyncio\np = await asyncio.create_subprocess_exec('cat', stdin=-1, stdout=-1)\n"
        "print(await p.communicate(b'through')); print(p.returncode)"
    )
    assert text == "(b'through', None)\n0\n"


async def test_an_async_generator_goes_on(cells: Driver) -> None:
    await cells.ok(
        "async def ag():\n    for i in range(5): yield i\nag1 = ag(); await ag1.__anext__()"
    )
    assert await cells.ok("print(await ag1.__anext__())") == "1\n"


async def test_asyncio_run_in_an_executor(cells: Driver) -> None:
    code = "print(await asyncio.get_running_loop().run_in_executor(None, sum, range(10)))"
    assert await cells.ok("import asyncio\n" + code) == "45\n"
    assert await cells.ok(code) == "45\n"


# ---- open files

PLACES = ["/workspace", "/tmp", "/home/jovyan", "/var/tmp", "/dev/shm"]


@pytest.mark.parametrize("place", PLACES)
async def test_files_anywhere(cells: Driver, place: str) -> None:
    await cells.ok(f"open('{place}/here', 'w').write('one')")
    await cells.ok(f"open('{place}/here', 'a').write('two')")
    assert await cells.value(f"open('{place}/here').read()") == "onetwo"
    await cells.ok(f"__import__('os').remove('{place}/here')")
    assert await cells.value(f"__import__('os').path.exists('{place}/here')") is False


@pytest.mark.parametrize("place", PLACES)
async def test_an_open_file_is_written_on(cells: Driver, place: str) -> None:
    await cells.ok(f"w = open('{place}/w', 'w'); _ = w.write('one '); w.flush()")
    await cells.ok("_ = w.write('two ')")
    await cells.ok("_ = w.write('three'); fd = w.fileno(); w.close()")
    assert await cells.value(f"open('{place}/w').read()") == "one two three"


async def test_an_open_file_is_read_on(cells: Driver) -> None:
    (cells.workspace / "lines.txt").write_text("a\nb\nc\nd\n")
    await cells.ok("r = open('lines.txt'); l1 = r.readline()")
    await cells.ok("raw = open('lines.txt', 'rb', buffering=0); _ = raw.read(3)")
    assert await cells.value("(l1, r.readline(), raw.read(2), raw.tell())") == (
        "a\n",
        "b\n",
        b"\nc",
        5,
    )
    assert await cells.value("(r.readline(), raw.read())") == ("c\n", b"\nd\n")


async def test_an_open_file_stays_the_file_that_others_see(cells: Driver) -> None:
    await cells.ok("f = open('both', 'w+'); _ = f.write('first'); f.flush()")
    await cells.ok("open('both', 'a').write(' second')")
    assert await cells.value("(f.seek(0), f.read())") == (0, "first second")
    await cells.ok("_ = f.write(' third'); f.flush()")
    assert await cells.value("open('both').read()") == "first second third"


async def test_modes_of_open_files(cells: Driver) -> None:
    await cells.ok("a = open('log', 'a'); _ = a.write('1'); a.flush()")
    await cells.ok("open('log', 'a').write('2')")
    await cells.ok("_ = a.write('3'); a.flush()")
    assert await cells.value("open('log').read()") == "123"
    await cells.ok("x = open('new', 'x'); _ = x.write('x'); x.flush()")
    assert await cells.value("(x.fileno() > 2, open('new').read(), x.mode)") == (True, "x", "x")


async def test_two_descriptors_share_one_offset(cells: Driver) -> None:
    await cells.ok(
        "import os; open('dup', 'w').write('abcdef'); d1 = os.open('dup', os.O_RDONLY); d2 = os.dup(d1)"
    )
    await cells.ok("p1 = os.read(d1, 2)")
    assert await cells.value("(p1, os.read(d2, 2), os.read(d1, 2))") == (b"ab", b"cd", b"ef")


async def test_a_removed_open_file_is_still_there(cells: Driver) -> None:
    await cells.ok(
        "import os, tempfile; t = tempfile.TemporaryFile('w+'); _ = t.write('nameless'); t.flush()"
    )
    await cells.ok("_ = t.seek(0)")
    assert await cells.value("t.read()") == "nameless"


async def test_an_open_folder_and_device(cells: Driver) -> None:
    await cells.ok(
        "import os; os.makedirs('dir/in', exist_ok=True); dfd = os.open('dir', os.O_RDONLY); nul = open('/dev/null', 'w')"
    )
    await cells.ok("_ = nul.write('x'); nul.flush()")
    assert await cells.value("os.listdir(dfd)") == ["in"]


# ---- the tree of files


async def test_a_removed_file_of_the_folder_stays_removed(cells: Driver) -> None:
    (cells.workspace / "doomed").write_text("x")
    await cells.ok("import os; os.remove('doomed')")
    assert await cells.value("os.path.exists('doomed')") is False
    await cells.ok("open('doomed', 'w').write('new')")
    assert await cells.value("open('doomed').read()") == "new"
    assert (cells.workspace / "doomed").read_text() == "x"


@pytest.mark.needs("overlay_opaque")
async def test_trees_are_moved_removed_and_made_again(cells: Driver) -> None:
    (cells.workspace / "tree" / "deep").mkdir(parents=True)
    (cells.workspace / "tree" / "deep" / "leaf").write_text("leaf")
    await cells.ok("import os, shutil; shutil.move('tree', 'moved')")
    assert await cells.value("open('moved/deep/leaf').read()") == "leaf"
    await cells.ok("shutil.rmtree('moved'); os.makedirs('moved/other')")
    assert await cells.value("[os.listdir('moved'), os.path.exists('tree')]") == [["other"], False]
    assert (cells.workspace / "tree" / "deep" / "leaf").exists()


async def test_kinds_of_files(cells: Driver) -> None:
    await cells.ok(
        "import os\nopen('exe', 'w').write('#!/bin/sh\\necho ran'); os.chmod('exe', 0o755)\n"
        "os.symlink('exe', 'link'); os.link('exe', 'hard'); os.mkfifo('fifo'); os.utime('exe', (1, 2))"
    )
    text = await cells.ok(
        "import stat, subprocess\nprint(subprocess.getoutput('./link'), os.readlink('link'), os.stat('hard').st_nlink,"
        " stat.S_ISFIFO(os.stat('fifo').st_mode), os.stat('exe').st_mtime)"
    )
    assert text == "ran exe 2 True 2.0\n"


async def test_programs_see_the_files_of_earlier_cells(cells: Driver) -> None:
    await cells.ok("import os; os.system('echo from the shell > shell.txt')")
    assert await cells.ok("_ = os.system('cat shell.txt')") == "from the shell\n"
    # IPython runs it in a terminal, as it does outside of a sandbox.
    assert await cells.ok("!cat shell.txt") == "from the shell\r\n"


# ---- processes and pools


async def test_subprocess_and_multiprocessing_work_in_every_cell(cells: Driver) -> None:
    for _ in range(2):
        text = await cells.ok(
            "import multiprocessing as mp\n"
            "with mp.get_context('fork').Pool(2) as pool: print(pool.map(abs, [-1, -2]))"
        )
        assert text == "[1, 2]\n"


async def test_a_hundred_cells_deep(cells: Driver) -> None:
    await cells.ok("deep = 0; import os")
    for _ in range(100):
        await cells.ok("deep += 1; open(f'deep{deep}', 'w').write(str(deep))")
    assert await cells.value(
        "(deep, sum(int(open(f'deep{n}').read()) for n in range(1, 101)))"
    ) == (100, 5050)


# ---- questions


async def test_a_question_does_not_change_the_state(cells: Driver) -> None:
    await cells.ok(
        "class Nosy:\n    def __dir__(self):\n        touched.append(1); open('touched', 'w').close(); return ['spam_eggs']\n"
        "touched = []; nosy = Nosy(); hist = len(In)"
    )
    answer = await cells.session.ask("complete_request", {"code": "nosy.spam", "cursor_pos": 9})
    assert "spam_eggs" in " ".join(answer["matches"])
    assert await cells.value("(touched, __import__('os').path.exists('touched'))") == ([], False)


async def test_inspection(cells: Driver) -> None:
    await cells.ok("def documented():\n    'What it does.'")
    answer = await cells.session.ask(
        "inspect_request", {"code": "documented", "cursor_pos": 10, "detail_level": 0}
    )
    assert answer["found"] is True
    assert "What it does." in answer["data"]["text/plain"]


@pytest.mark.parametrize(
    "evil",
    [
        "__import__('os')._exit(0)",
        "__import__('os').kill(__import__('os').getpid(), 9)",
        "[x for x in iter(int, 1)]",
    ],
    ids=["exit", "kill", "loop"],
)
async def test_a_question_that_goes_wrong_is_thrown_away(cells: Driver, evil: str) -> None:
    from sandbox_kernel.errors import SandboxError

    await cells.ok(f"class Evil:\n    def __dir__(self): {evil}\nevil = Evil(); sane = 1")
    with pytest.raises(SandboxError):
        await cells.session.ask("complete_request", {"code": "evil.x", "cursor_pos": 6})
    assert await cells.value("sane") == 1


async def test_a_shared_session_is_replaced_only_when_broken(shared: Shared) -> None:
    assert await shared.get() is shared.driver
