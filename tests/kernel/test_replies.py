"""What comes back from an execution: order, errors and their names, figures, counts, aborts."""

from __future__ import annotations

import re

import pytest

from sandbox_kernel.config import LIMITS
from tests.kernel.live import Live, Ran, plain

pytestmark = [pytest.mark.kernel, pytest.mark.needs("kernel")]

KILLED = {
    "MemoryLimitExceeded": "%%sandbox memory=64M\nx = 0; b = bytearray(100 << 20)",
    "WallTimeLimitExceeded": "%%sandbox wall_time=200ms\nx = 0\nwhile True: pass",
    "CpuTimeLimitExceeded": "%%sandbox cpu_time=200ms\nx = 0\nwhile True: pass",
    "CellCrashed": "x = 0; import os; os.kill(os.getpid(), 11)",
    "CellExited": "x = 0; import os; os._exit(0)",
}
OUTCOMES = {
    "MemoryLimitExceeded": "memory",
    "WallTimeLimitExceeded": "wall_time",
    "CpuTimeLimitExceeded": "cpu_time",
    "CellCrashed": "crashed",
    "CellExited": "exited",
}
RAISED = {
    "ZeroDivisionError": "1/0",
    "SyntaxError": "1 +",
    "SystemExit": "raise SystemExit(3)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "Odd": "class Odd(BaseException): pass\nraise Odd('a\\nb')",
}
REFUSED = {
    "size": "%%sandbox memory=lots\n1",
    "zero": "%%sandbox memory=0\n1",
    "ceiling": "%%sandbox memory=900G\n1",
    "name": "%%sandbox memroy=1G\n1",
    "twice": "%%sandbox memory=64M memory=64M\n1",
    "quote": "%%sandbox memory='1\n1",
    "verb": "%sandbox frobnicate",
    "company": "%sandbox\nx = 2",
}
FIGURES = {
    "outcome": str,
    "committed": bool,
    "resident": bool,
    "wall_s": float,
    "cpu_s": float,
    "peak_memory_bytes": int,
    "peak_processes": int,
    "disk_bytes": int,
    "output_bytes": int,
    "image": str,
    "container_id": str,
    "limits": dict,
}


def one_error(ran: Ran) -> str:
    """Assert that there is one error, the same on iopub and in the reply; give its name."""
    (shown,) = ran.of("error")
    assert ran.status == "error"
    said = {key: ran.content[key] for key in ("ename", "evalue", "traceback")}
    assert shown == said
    assert f"{shown['ename']}: " in plain("\n".join(shown["traceback"])) + ": "
    return shown["ename"]


def in_order(ran: Ran) -> None:
    """Assert that busy comes first, then the input, outputs, the reply, and idle last."""
    states = [m["content"]["execution_state"] for m in ran.heard if m["msg_type"] == "status"]
    assert states == ["busy", "idle"]
    assert ran.heard[0]["msg_type"] == ran.heard[-1]["msg_type"] == "status"
    assert all(m["header"]["date"] <= ran.reply["header"]["date"] for m in ran.outputs)
    assert ran.heard[-1]["header"]["date"] >= ran.reply["header"]["date"]


@pytest.mark.parametrize(("ename", "code"), KILLED.items(), ids=KILLED)
def test_a_killed_cell_has_one_error_and_costs_nothing(kernel: Live, ename: str, code: str) -> None:
    kernel.ok("x = 41")
    ran = kernel.run(code)
    assert one_error(ran) == ename, ran.said()
    in_order(ran)
    assert "the session is as it was before this cell" in ran.content["evalue"]
    assert ran.figures["outcome"] == OUTCOMES[ename]
    assert ran.figures["committed"] is False
    assert kernel.value("x + 1") == "42"


@pytest.mark.parametrize(("ename", "code"), RAISED.items(), ids=RAISED)
def test_an_exception_has_one_error_and_is_committed(kernel: Live, ename: str, code: str) -> None:
    ran = kernel.run(f"x = {ename!r}\n{code}")
    assert one_error(ran) == ename, ran.said()
    in_order(ran)
    assert ran.figures["outcome"] == "error"
    if ename != "SyntaxError":
        assert kernel.value("x") == repr(ename)


@pytest.mark.parametrize("code", REFUSED.values(), ids=REFUSED)
def test_a_bad_line_is_an_error_and_nothing_runs(kernel: Live, code: str) -> None:
    kernel.ok("x = 1")
    ran = kernel.run(code)
    assert one_error(ran) == "ConfigError", ran.said()
    assert "(" in ran.content["evalue"], "no remedy"
    assert ran.of("execute_result") == []
    assert kernel.value("x") == "1"


def test_an_error_names_limit_peak_and_remedy(kernel: Live) -> None:
    text = kernel.run("%%sandbox memory=64M\nb = bytearray(100 << 20)").content["evalue"]
    for words in ("64 MiB", "peak 6", "%%sandbox memory=128M"):
        assert words in text
    text = kernel.run("%%sandbox wall_time=200ms\nwhile True: pass").content["evalue"]
    assert "200 ms" in text
    assert "%%sandbox wall_time=0.4s" in text
    assert "SIGSEGV" in kernel.run(KILLED["CellCrashed"]).content["evalue"]
    assert "exit code 7" in kernel.run("import os; os._exit(7)").content["evalue"]


def test_a_time_limit_shows_the_line(kernel: Live) -> None:
    ran = kernel.run("%%sandbox wall_time=200ms\nx = 1\nwhile True:\n    x += 1")
    assert re.search("----> [34]", plain("\n".join(ran.content["traceback"])))


def test_a_cell_that_ignores_the_interrupt_is_killed(kernel: Live) -> None:
    kernel.ok("x = 1")
    code = "import signal; signal.signal(2, signal.SIG_IGN); print('up', flush=True); x = 2"
    msg_id = kernel.send(f"{code}\nwhile True: pass")
    kernel.until_text(msg_id, "up")
    kernel.manager.interrupt_kernel()
    ran = kernel.result(msg_id)
    assert one_error(ran) == "KeyboardInterrupt"
    assert ran.figures["outcome"] == "interrupted"
    assert ran.figures["committed"] is False
    assert kernel.value("x") == "1"


def test_an_interrupt_commits(kernel: Live) -> None:
    msg_id = kernel.send("x = 'kept'; print('up')\nwhile True: pass")
    kernel.until_text(msg_id, "up")
    assert kernel.ask("interrupt_request", channel="control") == {"status": "ok"}
    ran = kernel.result(msg_id)
    assert one_error(ran) == "KeyboardInterrupt"
    assert ran.figures["outcome"] == "interrupted"
    assert ran.figures["committed"] is True
    assert kernel.value("x") == "'kept'"


def test_an_interrupt_while_idle_changes_nothing(kernel: Live) -> None:
    assert kernel.ask("interrupt_request", channel="control") == {"status": "ok"}
    assert kernel.value("1 + 1") == "2"


@pytest.mark.parametrize(
    ("code", "outcome"),
    [("print('x')", "ok"), ("1/0", "error"), ("import os; os._exit(1)", "exited")],
)
def test_the_figures_are_complete(kernel: Live, code: str, outcome: str) -> None:
    figures = kernel.run(code).figures
    assert set(figures) == set(FIGURES)
    for name, kind in FIGURES.items():
        assert isinstance(figures[name], kind), name
    assert figures["outcome"] == outcome
    assert figures["committed"] is (outcome != "exited")
    assert figures["image"] == "host"
    assert set(figures["limits"]) == {limit.field for limit in LIMITS}
    assert 0 < figures["wall_s"] < 30
    assert 0 < figures["peak_memory_bytes"] < 1 << 30
    assert figures["peak_processes"] >= 1


def test_the_figures_count(kernel: Live) -> None:
    code = """
    import time, subprocess
    b = b'x' * (50 << 20); open('f', 'wb').write(b[:5 << 20])
    end = time.process_time() + 0.3
    while time.process_time() < end: pass
    print('x' * 99)
    ps = [subprocess.Popen(['sleep', '9']) for _ in range(4)]
    for p in ps: p.kill()
    """
    figures = kernel.ok(code).figures
    assert 0.3 <= figures["cpu_s"] < 5
    assert figures["wall_s"] >= 0.3
    assert 50 << 20 <= figures["peak_memory_bytes"] < 200 << 20
    assert figures["peak_processes"] >= 5
    assert 5 << 20 <= figures["disk_bytes"] < 8 << 20
    assert figures["output_bytes"] == 100


def test_the_limits_in_the_figures_are_those_of_the_cell(kernel: Live) -> None:
    figures = kernel.ok("%%sandbox memory=100M wall_time=7s\npass").figures
    assert figures["limits"]["memory_bytes"] == 100 << 20
    assert figures["limits"]["wall_time_s"] == 7
    assert kernel.ok("pass").figures["limits"]["memory_bytes"] == 1 << 30


def test_every_cell_has_a_container_of_its_own(kernel: Live) -> None:
    names = {kernel.ok("pass").figures["container_id"] for _ in range(3)}
    assert len(names) == 3


def test_every_output_stands_before_the_reply_and_in_order(kernel: Live) -> None:
    code = """
    import sys, os, subprocess
    from IPython.display import display, HTML
    print('one'); print('two', file=sys.stderr)
    display(HTML('<b>three</b>'))
    os.write(1, b'four\\n'); subprocess.run(['echo', 'five'])
    'six'
    """
    for _ in range(5):
        ran = kernel.ok(code)
        in_order(ran)
        assert ran.text() == "one\nfour\nfive\n"
        kinds = [m["msg_type"] for m in ran.outputs]
        first = kinds.index("display_data")
        assert kinds[:first] == ["stream", "stream"]
        assert set(kinds[first + 1 : -1]) == {"stream"}
        assert kinds[-1] == "execute_result"


def test_much_output_stands_before_the_reply(kernel: Live) -> None:
    ran = kernel.ok("for n in range(20000): print(n)")
    in_order(ran)
    assert ran.text().split() == [str(n) for n in range(20000)]


def test_output_comes_while_the_cell_runs(kernel: Live) -> None:
    msg_id = kernel.send("print('now', flush=True); import time\nwhile True: time.sleep(1)")
    kernel.until_text(msg_id, "now")
    assert msg_id not in kernel.replies
    kernel.manager.interrupt_kernel()
    kernel.result(msg_id)


def test_the_output_limit(kernel: Live) -> None:
    ran = kernel.ok("%%sandbox output=2K\nfor _ in range(100): print('x' * 99)\nkept = 1")
    everything = ran.text() + ran.text("stderr")
    assert 2048 <= len(everything) < 2048 + 500
    assert "output" in everything.replace("x" * 99, "")
    assert ran.figures["output_bytes"] == 10000
    assert kernel.ok("print('again')").text() == "again\n"


def test_the_kernel_answers_under_a_flood(kernel: Live) -> None:
    msg_id = kernel.send("while True: print('x' * 1000)")
    kernel.until_text(msg_id, "x")
    for _ in range(5):
        info = kernel.ask("kernel_info_request", channel="control")
        assert info["status"] == "ok"
    kernel.manager.interrupt_kernel()
    assert kernel.result(msg_id).content["ename"] == "KeyboardInterrupt"


@pytest.mark.parametrize("bad", ["1/0", "import os; os._exit(1)", "%%sandbox memory=0\n1"])
def test_an_error_aborts_what_is_queued(kernel: Live, bad: str) -> None:
    # What has not arrived when the error comes is not queued, so there is a cell before it.
    kernel.send("import time; time.sleep(0.5)")
    ids = [kernel.send(code) for code in (bad, "print('never')", "print('never')")]
    failed, *rest = [kernel.result(msg_id) for msg_id in ids]
    assert failed.status == "error"
    assert [ran.status for ran in rest] == ["aborted", "aborted"]
    assert all(ran.outputs == [] for ran in rest)
    assert kernel.ok("print('on')").text() == "on\n"


@pytest.mark.parametrize("bad", ["1/0", "import os; os._exit(1)"])
def test_queued_cells_go_on_if_they_are_to(kernel: Live, bad: str) -> None:
    ids = [kernel.send(code, stop_on_error=False) for code in (bad, "print('on')")]
    failed, rest = [kernel.result(msg_id) for msg_id in ids]
    assert (failed.status, rest.status) == ("error", "ok")


def test_counts(kernel: Live) -> None:
    def count(code: str, **options: object) -> int:
        return kernel.run(code, **options).content["execution_count"]

    first = count("1")
    assert count("2") == first + 1
    assert count("3", store_history=False) == first + 1
    assert count("4", silent=True) == first + 1
    assert count("") == first + 1
    assert count("import os; os._exit(1)") == first + 2
    assert count("1/0") == first + 3
    ran = kernel.ok("'five'")
    assert ran.content["execution_count"] == first + 4
    assert ran.of("execute_input")[0]["execution_count"] == first + 4
    assert ran.of("execute_result")[0]["execution_count"] == first + 4
    assert eval(kernel.value(f"Out[{first + 4}], In[{first + 4}]")) == ("five", "'five'")


def test_silent_runs_without_a_trace(kernel: Live) -> None:
    ran = kernel.ok("quiet = 5; quiet", silent=True)
    assert [m["msg_type"] for m in ran.heard] == ["status", "status"]
    assert kernel.value("quiet") == "5"


def test_user_expressions(kernel: Live) -> None:
    ran = kernel.ok("x = 6", user_expressions={"good": "x * 7", "bad": "1/0"})
    good, bad = ran.content["user_expressions"]["good"], ran.content["user_expressions"]["bad"]
    assert good["data"]["text/plain"] == "42"
    assert (bad["status"], bad["ename"]) == ("error", "ZeroDivisionError")
    assert ran.of("error") == []
    alone = kernel.ok("", user_expressions={"x": "x"})
    assert alone.content["user_expressions"]["x"]["data"]["text/plain"] == "6"
    assert kernel.run("1/0", user_expressions={"x": "x"}).content["user_expressions"] == {}


def test_payloads(kernel: Live) -> None:
    ran = kernel.ok("get_ipython().set_next_input('next')")
    assert ran.content["payload"] == [
        {"source": "set_next_input", "text": "next", "replace": False}
    ]
    (page,) = kernel.ok("zip?").content["payload"]
    assert page["source"] == "page"
    assert "zip" in page["data"]["text/plain"]


def test_displays_are_updated_and_cleared(kernel: Live) -> None:
    code = """
    from IPython.display import display, update_display, clear_output
    handle = display('a', display_id='here'); handle.update('b'); clear_output(wait=True)
    """
    kinds = {m["msg_type"]: m["content"] for m in kernel.ok(code).outputs}
    assert kinds["display_data"]["transient"] == {"display_id": "here"}
    assert kinds["update_display_data"]["data"]["text/plain"] == "'b'"
    assert kinds["clear_output"] == {"wait": True}
    later = kernel.ok("update_display('c', display_id='here')")
    assert later.of("update_display_data")[0]["transient"] == {"display_id": "here"}


def test_the_status_line(kernel: Live) -> None:
    ran = kernel.ok("%sandbox")
    (shown,) = ran.of("display_data")
    for limit in LIMITS:
        assert limit.name in shown["data"]["text/plain"]
    assert "<table>" in shown["data"]["text/html"]


def test_odd_text_is_no_problem(kernel: Live) -> None:
    assert kernel.ok("print('ü€𝄞' * 1000)").text() == "ü€𝄞" * 1000 + "\n"
    assert kernel.ok("print('\\ud800')").status == "ok"
    assert "\\ud800" in kernel.value("'\\ud800'")
