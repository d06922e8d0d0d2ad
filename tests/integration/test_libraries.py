"""No library hangs the session: each is used, killed in the midst of it, and used again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sandbox_kernel.model import Outcome
from tests.integration.driver import Driver

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.kernel,
    pytest.mark.slow,
]

CELL_TIMEOUT_S = 25.0


@dataclass(frozen=True)
class Library:
    """What is done with one library; `again` uses what `first` has made."""

    first: str
    again: str
    result: object
    modules: tuple[str, ...] = ()


LIBRARIES = {
    "numpy": Library(
        "import numpy as np\nrng = np.random.default_rng(1); a = rng.random((600, 600)); b = a @ a; s = float(b.sum())",
        "(bool(np.allclose(a @ a, b)), float((a @ a).sum()) == s, np.linalg.svd(a[:200, :200])[1].shape)",
        (True, True, (200,)),
        ("numpy",),
    ),
    "pandas": Library(
        "import pandas as pd\ndf = pd.DataFrame({'k': list('abcab') * 1000, 'v': range(5000)}); g = df.groupby('k').v.sum()",
        "(df.groupby('k').v.sum().equals(g), int(df.v.sum()), len(df.merge(df.head(10), on='v')))",
        (True, 12497500, 10),
        ("pandas",),
    ),
    "pandas with pyarrow": Library(
        "import pandas as pd\nwide = pd.DataFrame({'v': range(50000)}); wide.to_parquet('f.parquet')",
        "int(pd.read_parquet('f.parquet').v.sum())",
        1249975000,
        ("pandas", "pyarrow"),
    ),
    "polars": Library(
        "import polars as pl\nframe = pl.DataFrame({'k': [i % 7 for i in range(100000)], 'v': range(100000)})\n"
        "g = frame.lazy().group_by('k').agg(pl.col('v').sum()).sort('k').collect()",
        "(frame.lazy().group_by('k').agg(pl.col('v').sum()).sort('k').collect().equals(g), frame['v'].sum(), frame.sort('v', descending=True)['v'][0])",
        (True, 4999950000, 99999),
        ("polars",),
    ),
    "duckdb": Library(
        "import duckdb\ncon = duckdb.connect(); con.execute('create table t as select range v from range(300000)'); s = con.execute('select sum(v) from t').fetchone()",
        "(con.execute('select sum(v) from t').fetchone() == s, con.execute('select v % 3, count(*) from t group by 1 order by 1').fetchall())",
        (True, [(0, 100000), (1, 100000), (2, 100000)]),
        ("duckdb",),
    ),
    "duckdb in a file": Library(
        "import duckdb\nfcon = duckdb.connect('d.duckdb'); _ = fcon.execute('create table t as select range v from range(300000)')",
        "fcon.execute('select sum(v), count(*) from t').fetchone()",
        (44999850000, 300000),
        ("duckdb",),
    ),
    "pyarrow": Library(
        "import pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as pq\nt = pa.table({'v': list(range(200000)), 'k': [i % 5 for i in range(200000)]}); pq.write_table(t, 't.parquet')",
        "(pc.sum(pq.read_table('t.parquet')['v']).as_py(), t.group_by('k').aggregate([('v', 'count')]).num_rows)",
        (19999900000, 5),
        ("pyarrow",),
    ),
    "KMeans": Library(
        "import numpy as np\nfrom sklearn.cluster import KMeans\nX = np.random.RandomState(0).rand(2000, 8)\nm = KMeans(5, n_init=2, random_state=0).fit(X); i = m.inertia_",
        "(bool(np.isclose(KMeans(5, n_init=2, random_state=0).fit(X).inertia_, i)), m.predict(X).shape)",
        (True, (2000,)),
        ("sklearn",),
    ),
    "scikit-learn with n_jobs": Library(
        "import numpy as np\nfrom sklearn.ensemble import RandomForestClassifier\nX = np.random.RandomState(0).rand(300, 5); y = X[:, 0] > .5\nf = RandomForestClassifier(20, n_jobs=2, random_state=0).fit(X, y)",
        "(RandomForestClassifier(20, n_jobs=2, random_state=0).fit(X, y).score(X, y), f.score(X, y))",
        (1.0, 1.0),
        ("sklearn",),
    ),
    "joblib's processes": Library(
        "from joblib import Parallel, delayed\nr = Parallel(n_jobs=2)(delayed(abs)(-n) for n in range(20))",
        "(r, Parallel(n_jobs=2)(delayed(pow)(n, 2) for n in range(5)))",
        (list(range(20)), [0, 1, 4, 9, 16]),
        ("joblib",),
    ),
    "joblib's threads": Library(
        "from joblib import Parallel, delayed\nr = Parallel(n_jobs=2, prefer='threads')(delayed(abs)(-n) for n in range(20))",
        "(r, Parallel(n_jobs=2, prefer='threads')(delayed(pow)(n, 2) for n in range(5)))",
        (list(range(20)), [0, 1, 4, 9, 16]),
        ("joblib",),
    ),
    "idle ThreadPoolExecutor": Library(
        "from concurrent.futures import ThreadPoolExecutor\nex = ThreadPoolExecutor(3); r = list(ex.map(abs, range(-5, 0)))",
        "(r, list(ex.map(abs, range(-3, 0))), ex.submit(sum, [1, 2]).result(timeout=10))",
        ([5, 4, 3, 2, 1], [3, 2, 1], 3),
    ),
    "ProcessPoolExecutor": Library(
        "from concurrent.futures import ProcessPoolExecutor\npx = ProcessPoolExecutor(2); r = list(px.map(abs, range(-5, 0)))",
        "(r, list(ProcessPoolExecutor(2).map(abs, range(-3, 0))))",
        ([5, 4, 3, 2, 1], [3, 2, 1]),
    ),
    "Thread": Library(
        "import threading, time\nn = 0; stop = threading.Event()\ndef count():\n    global n\n    while not stop.wait(0.005): n += 1\nt = threading.Thread(target=count, daemon=True); t.start()\nwhile n < 2: time.sleep(0.001)",
        "(n >= 2, threading.active_count() >= 1, [x.join() for x in [threading.Thread(target=lambda: None)] if not x.start()])",
        (True, True, [None]),
    ),
    "Timer": Library(
        "import threading\nfired = threading.Event(); timer = threading.Timer(0.01, fired.set); timer.start(); w = fired.wait(5)",
        "(w, fired.is_set())",
        (True, True),
    ),
}

KILL = "import os; os.kill(os.getpid(), 9)"


def library(name: str) -> Library:
    found = LIBRARIES[name]
    for module in found.modules:
        pytest.importorskip(module)
    return found


@pytest.mark.parametrize("name", LIBRARIES)
async def test_used_killed_used_again(fresh: Driver, name: str) -> None:
    lib = library(name)
    await fresh.ok(lib.first, timeout_s=CELL_TIMEOUT_S)
    ran = await fresh.run(KILL, timeout_s=CELL_TIMEOUT_S)
    assert (ran.outcome, ran.result.signal) == (Outcome.CRASHED, 9), ran.said()
    for _ in range(2):
        assert await fresh.value(lib.again, timeout_s=CELL_TIMEOUT_S) == lib.result


@pytest.mark.parametrize("name", LIBRARIES)
async def test_killed_while_it_is_used(fresh: Driver, name: str) -> None:
    lib = library(name)
    await fresh.ok("marker = 'kept'\n" + lib.first, timeout_s=CELL_TIMEOUT_S)
    assert await fresh.value(lib.again, timeout_s=CELL_TIMEOUT_S) == lib.result
    ran = await fresh.run(f"marker = 'lost'; {lib.again}\n{KILL}", timeout_s=CELL_TIMEOUT_S)
    assert (ran.outcome, ran.result.signal) == (Outcome.CRASHED, 9), ran.said()
    ran = await fresh.run(
        f"print(repr({lib.again}))\nassert marker == 'kept'", timeout_s=CELL_TIMEOUT_S
    )
    assert ran.outcome is Outcome.OK, ran.said()
    assert ran.text() == f"{lib.result!r}\n"


@pytest.mark.parametrize("name", ["numpy", "polars", "duckdb", "Thread"])
async def test_used_in_five_cells_and_out_of_memory_in_between(fresh: Driver, name: str) -> None:
    lib = library(name)
    await fresh.ok(lib.first, timeout_s=CELL_TIMEOUT_S)
    for n in range(5):
        if n % 2:
            ran = await fresh.run("hog = bytearray(300 << 20)", memory_bytes=200 << 20)
            assert ran.outcome is Outcome.MEMORY, ran.said()
        assert await fresh.value(lib.again, timeout_s=CELL_TIMEOUT_S) == lib.result


async def test_all_in_one_session(fresh: Driver) -> None:
    names = [name for name in LIBRARIES if name not in ("Thread", "scikit-learn with n_jobs")]
    for name in names:
        await fresh.ok(library(name).first, timeout_s=CELL_TIMEOUT_S)
    ran = await fresh.run(KILL)
    assert ran.outcome is Outcome.CRASHED
    for name in ("numpy", "pandas", "polars", "pyarrow", "KMeans"):
        lib = library(name)  # they share names such as df, so each begins anew
        await fresh.ok(lib.first, timeout_s=CELL_TIMEOUT_S)
        assert await fresh.value(lib.again, timeout_s=CELL_TIMEOUT_S) == lib.result


@pytest.mark.parametrize(
    "name",
    ["numpy", "KMeans", "duckdb", "pyarrow", "joblib's processes", "idle ThreadPoolExecutor"],
)
async def test_it_does_not_make_the_session_resident(fresh: Driver, name: str) -> None:
    lib = library(name)
    await fresh.ok(lib.first, timeout_s=CELL_TIMEOUT_S)
    ran = await fresh.run("1")
    assert ran.result.resident is (name == "idle ThreadPoolExecutor")
