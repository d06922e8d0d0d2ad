from __future__ import annotations

import os
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sandbox_kernel.guest import tasks, threads

ROOT = Path(__file__).parents[2]

PRELUDE = """
import os, random, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor, ProcessPoolExecutor, BrokenExecutor
from sandbox_kernel.guest import tasks, threads
from sandbox_kernel.linux import libc

def in_child(check, timeout_s=10):
    # Fork as a head does, mend, check; a hang is ended by SIGALRM and seen as a status.
    pid = threads.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(timeout_s)
            check()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"child ended with status {status:#x}"

def chain(work, depth):
    # Every generation works, quiesces and forks the next.
    for generation in range(depth):
        signal.alarm(30)
        work()
        lost = threads.quiesce()
        assert lost == [], f"generation {generation}: {lost}"
        pid = threads.fork()
        if pid:
            _, status = os.waitpid(pid, 0)
            os._exit(1 if status else 0)
    os._exit(0)  # as guests end: the destructors of some libraries miss their threads
"""


def run(code: str, timeout_s: float = 90) -> str:
    """Run code in an interpreter of its own: what it does to threads must not be ours."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "3", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_thread_costs_microseconds() -> None:
    out = run("""
        threads.quiesce()
        best = 1.0
        for _ in range(200):
            start = time.perf_counter()
            assert threads.quiesce() == []
            best = min(best, time.perf_counter() - start)
        print(best)
    """)
    assert float(out) < 50e-6


def test_python_threads_are_named() -> None:
    run("""
        hold = threading.Event()
        thread = threading.Thread(target=hold.wait, name="poller", daemon=True)
        thread.start()
        assert threads.quiesce() == ["python:poller"]
        hold.set()
        thread.join()
        assert threads.quiesce() == []
    """)


def test_a_bare_thread_is_named_too() -> None:
    run("""
        import _thread
        hold = threading.Lock()
        hold.acquire()
        _thread.start_new_thread(hold.acquire, ())
        (name,) = threads.quiesce()
        assert name.startswith("python:"), name
        start = time.perf_counter()
        threads.quiesce()
        assert time.perf_counter() - start < 0.04, "a thread that stays is waited for once"
    """)


def test_unforkable_selects_native_pools_that_hang() -> None:
    names = [
        "python:polars",
        "native:polars-0 [_polars_runtime.abi3.so]",
        "native:python [libgomp-e985bcbb.so.1.0.0]",
        "native:python [libfoo.so]",
    ]
    assert threads.unforkable(names) == names[1:3]


def test_owner_of_a_stack() -> None:
    paths = ["/lib/libc.so.6", "/lib/libstdc++.so.6", "/x/libarrow.so.26", "/x/libgomp-1.so.1"]
    code = tasks._Code([1000, 2000, 3000, 4000], [1999, 2999, 3999, 4999], paths)

    def on_stack(*words: int) -> list[str]:
        return tasks._paths_on_stack(struct.pack(f"={len(words)}Q", *words), code)

    assert on_stack(1001, 4001, 0, 1500) == [paths[3]]
    assert on_stack(1001, 3001, 4001, 2001, 1500) == [paths[1], paths[3], paths[2]]
    assert on_stack(0x7F00_0000_0BB9) == []
    assert on_stack(0xAB00_0000_0000_0BB9) == [paths[2]]
    assert on_stack(5, 5000) == []


def test_a_child_forked_beside_busy_threads_can_use_threads() -> None:
    run("""
        def spin():
            while True:
                sum(range(100))
        for _ in range(4):
            threading.Thread(target=spin, daemon=True).start()
        def check():
            assert threading.active_count() == 1 and len(sys._current_frames()) == 1
            news = [threading.Thread(target=lambda: sum(range(200_000))) for _ in range(6)]
            for thread in news: thread.start()
            for thread in news: thread.join()
            assert len(sys._current_frames()) == 1
        for _ in range(10):
            in_child(check)
    """)


def test_random_goes_on_and_main_stays_main() -> None:
    run("""
        hold = threading.Event()
        threading.Thread(target=hold.wait, daemon=True).start()
        main = threading.main_thread()
        random.seed(42)
        state = random.getstate()
        expected = random.random()
        random.setstate(state)
        def check():
            assert random.random() == expected
            assert threading.main_thread() is main is threading.current_thread()
        in_child(check)
    """)


def test_logging_lock_held_by_a_dead_thread() -> None:
    run("""
        import logging
        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        held = threading.Event()
        def hold_locks():
            handler.acquire()
            held.set()
            threading.Event().wait()
        threading.Thread(target=hold_locks, daemon=True).start()
        held.wait()
        in_child(lambda: logging.error("from the child"))
        os._exit(0)  # here the lock is held still, and logging takes it at exit
    """)


def test_hooks_that_release_what_was_not_taken_stay_silent() -> None:
    out = run("""
        lock = threading.Lock()
        os.register_at_fork(before=lock.acquire, after_in_child=lock.release)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        os.dup2(1, 2)
        in_child(lambda: None)
    """)
    assert out == ""


def test_thread_pool_works_on() -> None:
    run("""
        pool = ThreadPoolExecutor(3, initializer=lambda: None)
        assert list(pool.map(len, ["a"] * 30)) == [1] * 30
        def check():
            assert list(pool.map(len, ["ab"] * 30, timeout=5)) == [2] * 30
            pool.shutdown()
        in_child(check)
        assert list(pool.map(len, ["abc"] * 30, timeout=5)) == [3] * 30
    """)


def test_work_under_way_and_queued_work_is_broken_and_no_thread_starts() -> None:
    run("""
        pool = ThreadPoolExecutor(1)
        started = threading.Event()
        def work():
            started.set()
            threading.Event().wait()
        running = pool.submit(work)
        started.wait()
        queued = pool.submit(len, "abcd")
        def check():
            assert tasks.count() == 1, "a head that is mended must stay alone"
            for future in (running, queued):
                try:
                    future.result(timeout=5)
                except BrokenExecutor as error:
                    assert "earlier cell" in str(error)
                else:
                    raise AssertionError("it has a result")
            assert pool.submit(len, "abcde").result(timeout=5) == 5
        in_child(check)
        os._exit(0)
    """)


def test_default_executor_of_a_loop() -> None:
    run("""
        import asyncio
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(asyncio.to_thread(len, "a")) == 1
        async def again():
            return await asyncio.wait_for(asyncio.to_thread(len, "ab"), 5)
        def check():
            assert loop.run_until_complete(again()) == 2
        in_child(check)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    """)


def test_process_pool_starts_anew() -> None:
    run("""
        pool = ProcessPoolExecutor(2)
        assert pool.submit(len, "a").result(timeout=10) == 1
        names = threads.quiesce()
        assert names and all(name.startswith("python:") for name in names), names
        def check():
            assert pool.submit(len, "ab").result(timeout=10) == 2
            pool.shutdown()
        in_child(check, 20)
        assert pool.submit(len, "abc").result(timeout=10) == 3
        pool.shutdown()
    """)


def test_multiprocessing_pool_refuses_instead_of_hanging() -> None:
    run("""
        import multiprocessing
        pool = multiprocessing.Pool(2)
        assert pool.map(len, ["a"]) == [1]
        slow = pool.apply_async(time.sleep, (60,))
        def check():
            try:
                pool.map(len, ["ab"])
            except ValueError as error:
                assert "not running" in str(error)
            else:
                raise AssertionError("it ran")
            try:
                slow.get(timeout=5)
            except RuntimeError as error:
                assert "earlier cell" in str(error)
            with multiprocessing.Pool(2) as fresh:
                assert fresh.map(len, ["abc"]) == [3]
        in_child(check, 20)
        pool.terminate()
    """)


@pytest.mark.slow
def test_loky_is_dropped_when_idle_and_renewed_in_a_child() -> None:
    pytest.importorskip("joblib")
    run("""
        from joblib import Parallel, delayed
        def use(word):
            with_loky = Parallel(n_jobs=2, timeout=20)(delayed(len)(word) for _ in range(4))
            assert with_loky == [len(word)] * 4
        use("a")
        def check():
            use("ab")
            assert not (lost := threads.quiesce()), lost
        in_child(check, 30)
        assert not (lost := threads.quiesce()), lost
        use("abc")
        assert not (lost := threads.quiesce()), lost
    """)


@pytest.mark.slow
def test_openblas_ends_and_starts_again_for_40_generations() -> None:
    pytest.importorskip("numpy")
    run("""
        import numpy as np
        a = np.random.default_rng(1).random((400, 400))
        want = a @ a
        seen = []
        def work():
            assert np.allclose(a @ a, want)
            seen.append(tasks.count())
        if os.cpu_count() > 1:
            work()
            assert tasks.count() > 1
            assert threads.quiesce() == [] and tasks.count() == 1
        chain(work, 40)
        assert len(seen) >= 40
    """)


@pytest.mark.slow
def test_openmp_and_tolerant_libraries_for_12_generations() -> None:
    for name in ("numpy", "sklearn", "pyarrow", "duckdb", "pandas"):
        pytest.importorskip(name)
    run("""
        import duckdb, numpy as np, pandas as pd, pyarrow as pa, sklearn.cluster
        a = np.random.default_rng(1).random((3000, 4))
        connection = duckdb.connect()
        def work():
            sklearn.cluster.KMeans(3, n_init=1).fit(a)
            table = pa.table({"a": list(range(1000)), "b": ["x"] * 1000})
            assert table.group_by("b").aggregate([("a", "sum")])["a_sum"].to_pylist() == [499500]
            assert connection.execute("select sum(range) from range(100000)").fetchone()[0] > 1
            assert pd.DataFrame(a).query("`0` > 0.5").size
        chain(work, 12)
    """)


@pytest.mark.slow
def test_polars_is_lost_once_it_was_used() -> None:
    pytest.importorskip("polars")
    run("""
        import polars as pl
        assert threads.quiesce() == []
        def check():
            frame = pl.DataFrame({"a": range(1000)})
            assert frame.filter(pl.col("a") > 499).height == 500
            names = threads.quiesce()
            assert names and threads.unforkable(names) == names, names
        in_child(check)
    """)


@pytest.mark.slow
def test_quiesce_stays_cheap_beside_threads_that_may_stay() -> None:
    pytest.importorskip("pyarrow")
    out = run("""
        import pyarrow
        threads.quiesce()
        assert tasks.count() > 1
        start = time.perf_counter()
        for _ in range(100):
            assert threads.quiesce() == []
        print((time.perf_counter() - start) / 100)
    """)
    assert float(out) < 2e-3


def test_quiesce_of_this_process_does_not_wait_long() -> None:
    start = time.perf_counter()
    assert isinstance(threads.quiesce(), list)
    assert time.perf_counter() - start < 1
