from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.guest import rehydrate

ROOT = Path(__file__).parents[2]

pytest.importorskip("cloudpickle")

# As in a guest: the notebook's namespace is the dictionary of __main__.
PRELUDE = """
import sys, types
sys.path.insert(0, {root!r})
from sandbox_kernel.guest import rehydrate
sys.modules["__main__"] = main = types.ModuleType("__main__")
ns = main.__dict__
"""


def interpreter(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE.format(root=str(ROOT)) + textwrap.dedent(code)],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def carry(tmp_path: Path, cell: str, check: str, left_out: str = "") -> None:
    """Run `cell` in one interpreter, carry its variables to another, run `check` there."""
    path = str(tmp_path / "variables")
    cell, check = textwrap.dedent(cell), textwrap.dedent(check)
    out = interpreter(
        f"""
        exec({cell!r}, ns)
        print(",".join(name for name, _ in rehydrate.dump(ns, {path!r}).left_out))
    """.replace("\n        ", "\n")
    )
    assert out.strip() == left_out
    interpreter(
        f"""
        report = rehydrate.load({path!r}, ns)
        assert not report.left_out, report
        exec({check!r}, ns)
    """.replace("\n        ", "\n")
    )


def test_functions_see_the_new_namespace(tmp_path: Path) -> None:
    carry(
        tmp_path,
        """
        x = 1
        def f(): return x
        def even(n): return n == 0 or odd(n - 1)
        def odd(n): return n != 0 and even(n - 1)
        l = lambda: x + 1
        def later(): return not_yet_defined
        """,
        """
        assert f() == 1 and f.__globals__ is globals()
        x = 5
        assert f() == 5 and l() == 6 and even(10)
        def odd(n): return "replaced"
        assert even(3) == "replaced"
        not_yet_defined = 7
        assert later() == 7
        """,
    )


def test_classes_and_instances(tmp_path: Path) -> None:
    carry(
        tmp_path,
        """
        import dataclasses, enum
        scale = 2
        class Base:
            made = []
            def __init__(self, v): self.v = v; type(self).made.append(v)
            def scaled(self): return self.v * scale
            @property
            def half(self): return self.v / 2
        class Derived(Base):
            def scaled(self): return super().scaled() + 1
        @dataclasses.dataclass
        class Point:
            x: int
            y: int = 0
        class Colour(enum.Enum):
            RED = 1
        a, b, p, red = Base(1), Derived(2), Point(3), Colour.RED
        made = Base.made
        bound = b.scaled
        """,
        """
        scale = 10
        assert a.scaled() == 10 and b.scaled() == 21 and b.half == 1 and bound() == 21
        assert type(a) is Base and isinstance(b, Base) and Derived.__mro__[1] is Base
        assert Base.made is made == [1, 2] and bound.__self__ is b
        assert p == Point(3) and red is Colour.RED
        import pickle
        assert pickle.loads(pickle.dumps(a)).v == 1
        """,
    )


def test_shared_references_and_cycles_stay(tmp_path: Path) -> None:
    carry(
        tmp_path,
        """
        shared = [1]
        left, right = {"s": shared}, (shared,)
        loop = []
        loop.append(loop)
        here = globals()
        nested = {"deep": [globals()]}
        import sys
        main = sys.modules["__main__"]
        def counter():
            n = 0
            def up():
                nonlocal n
                n += 1
                return n
            return up, lambda: n
        up, peek = counter()
        up()
        def outer():
            def fact(n): return 1 if n < 2 else n * fact(n - 1)
            if 0: unset = 1
            return fact, lambda: unset
        fact, unset = outer()
        """,
        """
        assert left["s"] is shared and right[0] is shared
        assert loop[0] is loop
        assert here is globals() and nested["deep"][0] is globals()
        import sys
        assert main is sys.modules["__main__"]
        assert up() == 2 and peek() == 2
        assert fact(5) == 120 and fact.__closure__[0].cell_contents is fact
        try: unset()
        except NameError: pass
        else: raise AssertionError
        """,
    )


def test_what_does_not_pickle_is_left_out(tmp_path: Path) -> None:
    carry(
        tmp_path,
        f"""
        import threading, socket
        kept = [1]
        file = open({str(tmp_path / "notes.txt")!r}, "w+")
        generator = (n for n in range(3))
        lock = threading.Lock()
        holder = {{"kept": kept, "lock": lock}}
        sock = socket.socket()
        __private__ = 1
        In, Out, _, _5 = [], {{}}, 0, "fifth"
        """,
        """
        assert kept == [1] and threading and _5 == "fifth"
        for name in ("file", "generator", "lock", "holder", "sock", "__private__", "In", "_"):
            assert name not in globals(), name
        """,
        left_out="file,generator,lock,holder,sock",
    )


def test_reasons_are_one_line(tmp_path: Path) -> None:
    class Odd:
        def __reduce__(self) -> str:
            raise ValueError("no\nand more")

    report = rehydrate.dump({"odd": Odd(), "even": 2}, str(tmp_path / "v"))
    assert report.carried == ("even",)
    assert report.left_out_lines() == ["odd (ValueError: no)"]


def test_what_does_not_load_costs_its_group_only(tmp_path: Path) -> None:
    path = str(tmp_path / "variables")
    cell = textwrap.dedent("""
        class Bad(Exception):
            def __init__(self, a, b): super().__init__(a)
        before, bad, after = [1], Bad(1, 2), [3]
        attached = (bad,)
        big = b"x" * 3_000_000
    """)
    interpreter(f"exec({cell!r}, ns); r = rehydrate.dump(ns, {path!r}); assert not r.left_out")
    interpreter(
        f"""
        report = rehydrate.load({path!r}, ns)
        assert ns["before"] == [1] and ns["after"] == [3] and len(ns["big"]) == 3_000_000
        assert {{name for name, _ in report.left_out}} == {{"Bad", "bad", "attached"}}, report
        assert "TypeError" in report.left_out_lines()[0]
    """.replace("\n        ", "\n")
    )


def test_surroundings_are_carried(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("value = 3\n")
    carry(
        tmp_path,
        f"""
        import os, random, sys, xml.etree.ElementTree
        os.chdir({str(tmp_path)!r})
        os.environ["MINE"] = "1"
        sys.path.append({str(tmp_path)!r})
        import mine
        random.seed(42)
        random.random()
        expected = random.Random(42)
        expected.random()
        """,
        f"""
        assert os.getcwd() == {str(tmp_path)!r} and os.environ["MINE"] == "1"
        assert mine.value == 3 and sys.path[-1] == {str(tmp_path)!r}
        assert random.random() == expected.random()
        assert xml.etree.ElementTree.fromstring("<a/>").tag == "a"
        """,
    )


def test_data_frames_and_arrays(tmp_path: Path) -> None:
    for name in ("numpy", "pandas", "polars"):
        pytest.importorskip(name)
    carry(
        tmp_path,
        """
        import numpy as np, pandas as pd, polars as pl
        a = np.arange(1_000_000).reshape(1000, 1000)
        view_holder = {"a": a}
        frame = pd.DataFrame({"x": [1, 2], "y": ["a", None]})
        fast = pl.DataFrame({"a": range(1000)})
        lazy = fast.lazy().filter(pl.col("a") > 499)
        np.random.seed(1)
        np.random.rand(3)
        rng = np.random.default_rng(5)
        rng.random()
        """,
        """
        assert a[999, 999] == 999_999 and view_holder["a"] is a
        assert frame.x.sum() == 3 and fast.filter(pl.col("a") > 499).height == 500
        assert lazy.collect().height == 500
        other = np.random.RandomState(1)
        other.rand(3)
        assert (np.random.rand(4) == other.rand(4)).all()
        """,
    )


@pytest.mark.slow
def test_polars_frames_leave_a_fork_whose_pools_are_dead(tmp_path: Path) -> None:
    pytest.importorskip("polars")
    path = str(tmp_path / "variables")
    cell = textwrap.dedent("""
        import polars as pl
        frame = pl.DataFrame({"a": range(1000), "s": [str(n) for n in range(1000)]})
        few = frame.filter(pl.col("a") > 99)
        chunks = pl.concat([frame, frame], rechunk=False)
        series = chunks["a"]
        holder = [chunks]
        lazy = chunks.lazy().filter(pl.col("a") > 99)  # hangs, as its frame is out of reach
        after = [1]
    """)
    interpreter(
        f"""
        import os, signal
        from sandbox_kernel.guest import threads
        from sandbox_kernel.linux import libc
        exec({cell!r}, ns)
        assert threads.unforkable(threads.quiesce())
        pid = threads.fork()
        if pid == 0:
            signal.alarm(40)
            report = rehydrate.dump(ns, {path!r})
            if report.left_out_lines() != ["lazy (it waits for threads that were lost)"]:
                print(report.left_out)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    """.replace("\n        ", "\n")
    )
    interpreter(
        f"""
        report = rehydrate.load({path!r}, ns)
        assert not report.left_out, report
        assert ns["few"].group_by("a").len().height == 900
        assert ns["chunks"].sort("a").height == 2000 and ns["series"].sum() == 999000
        assert ns["holder"][0] is ns["chunks"] and ns["after"] == [1]
    """.replace("\n        ", "\n")
    )


def test_a_variable_that_kills_its_pickler_is_left_out(tmp_path: Path) -> None:
    path = str(tmp_path / "variables")
    interpreter(
        f"""
        import os
        class Deadly:
            def __reduce__(self): os._exit(1)
        report = rehydrate.dump({{"a": 1, "deadly": Deadly(), "b": 2}}, {path!r})
        assert report.carried == ("a", "b")
        assert [name for name, _ in report.left_out] == ["deadly"]
        report = rehydrate.dump({{"deadly": Deadly()}}, {path!r})
        assert not report.carried
        assert rehydrate.dump({{}}, {path!r}) == rehydrate.Report((), ())
    """.replace("\n        ", "\n")
    )


def test_through_a_pipe() -> None:
    # dump runs in a thread here, as the pipe holds less than the variables.
    read_fd, write_fd = os.pipe()
    source: dict[str, Any] = {"big": bytes(range(256)) * 10_000, "n": 3}
    writer = threading.Thread(target=rehydrate.dump, args=(source, write_fd))
    writer.start()
    target: dict[str, Any] = {}
    report = rehydrate.load(read_fd, target)
    writer.join()
    assert target == source
    assert set(report.carried) == set(source)


def test_a_stream_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "variables"
    rehydrate.dump({"x": "y" * 1000}, str(path))
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(EOFError, match="ends early"):
        rehydrate.load(str(path), {})


def test_without_cloudpickle_all_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    path = str(tmp_path / "variables")
    report = rehydrate.dump({"x": 1}, path)
    assert report.left_out == (("x", "cloudpickle is not installed in this image"),)
    target: dict[str, Any] = {}
    assert rehydrate.load(path, target).carried == ()
    assert not target


def test_modules_made_by_hand(tmp_path: Path) -> None:
    made = types.ModuleType("made_by_hand")
    made.value = [1]  # type: ignore[attr-defined]
    path = str(tmp_path / "variables")
    rehydrate.dump({"made": made}, path)
    target: dict[str, Any] = {}
    rehydrate.load(path, target)
    assert target["made"].value == [1]
