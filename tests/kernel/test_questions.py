"""What a client asks: completion, inspection, history, is_complete, kernel info, usage."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.integration import leaks
from tests.kernel.live import Live, plain

pytestmark = [pytest.mark.kernel, pytest.mark.needs("kernel")]


def complete(kernel: Live, code: str, **more: object) -> list[str]:
    content = {"code": code, "cursor_pos": len(code), **more}
    reply = kernel.ask("complete_request", content)
    assert reply["status"] == "ok"
    return reply["matches"]


def inspect(kernel: Live, code: str, **more: object) -> str:
    content = {"code": code, "cursor_pos": len(code), "detail_level": 0, **more}
    reply = kernel.ask("inspect_request", content)
    assert reply["status"] == "ok"
    assert reply["found"] is bool(reply["data"])
    return plain(reply["data"].get("text/plain", ""))


def test_completion_knows_the_state(kernel: Live) -> None:
    kernel.ok("a_long_name = {'first key': 1}; import os")
    assert complete(kernel, "a_lo") == ["a_long_name"]
    assert any("getcwd" in match for match in complete(kernel, "os.getc"))
    assert any("first key" in match for match in complete(kernel, "a_long_name['fi"))


def test_completion_says_where(kernel: Live) -> None:
    kernel.ok("a_long_name = 1")
    reply = kernel.ask("complete_request", {"code": "1 + a_lo", "cursor_pos": 8})
    assert (reply["cursor_start"], reply["cursor_end"]) == (4, 8)
    code = "%%sandbox memory=64M\na_lo"
    reply = kernel.ask("complete_request", {"code": code, "cursor_pos": len(code)})
    assert reply["matches"] == ["a_long_name"]
    assert code[reply["cursor_start"] : reply["cursor_end"]] == "a_lo"


def test_completion_of_files(kernel: Live) -> None:
    kernel.ok("open('a_file_to_find.txt', 'w').close()")
    assert any("a_file_to_find.txt" in match for match in complete(kernel, "open('a_file"))


def test_inspection(kernel: Live) -> None:
    kernel.ok("def documented(a, b=2):\n    'What it does.'\n    return a")
    text = inspect(kernel, "documented")
    assert "What it does." in text
    assert "b=2" in text
    assert "return a" in inspect(kernel, "documented", detail_level=1)
    assert inspect(kernel, "no_such_name_at_all") == ""


def test_a_question_changes_nothing(kernel: Live) -> None:
    code = """
    asked = []
    class Nosy:
        def __dir__(self):
            asked.append(1); open('asked', 'w').close()
            return ['attribute_of_nosy']
        def __repr__(self):
            asked.append(1); open('asked', 'w').close()
            return 'nosy'
    nosy = Nosy()
    """
    kernel.ok(code)
    complete(kernel, "nosy.attr")
    inspect(kernel, "nosy")
    assert kernel.value("asked, __import__('os').path.exists('asked')") == "([], False)"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("while True: pass", id="loop"),
        pytest.param("import os; os._exit(0)", id="exit"),
        pytest.param("import os; os.kill(os.getpid(), 11)", id="crash"),
        pytest.param("b = []\n        while True: b.append(bytearray(1 << 24))", id="memory"),
        pytest.param("raise SystemExit", id="SystemExit"),
        pytest.param("import os; os.kill(-1, 9); os.kill(os.getpid(), 9)", id="kill all"),
        pytest.param("import os\n        for fd in range(3, 99):\n            try: os.close(fd)"
                     "\n            except OSError: pass", id="close"),
        pytest.param("print('noise'); import os; os.write(1, b'noise')", id="output"),
        pytest.param("return [input('? ')]", id="input"),
    ],
)  # fmt: skip
def test_an_answer_that_breaks_something_is_thrown_away(kernel: Live, body: str) -> None:
    code = f"kept = 1\nclass Bad:\n    def __dir__(self):\n        {body}\n"
    kernel.ok(code + "bad = Bad()")
    complete(kernel, "bad.a")
    assert kernel.value("kept + 1") == "2"
    assert kernel.questions == []


def test_an_inspection_that_crashes_is_thrown_away(kernel: Live) -> None:
    code = (
        "kept = 1\nclass Bad:\n    def __repr__(self):\n        import os; os._exit(1)\nbad = Bad()"
    )
    kernel.ok(code)
    assert inspect(kernel, "bad") == ""
    assert kernel.value("kept + 1") == "2"


def test_the_next_question_after_a_bad_one_is_answered(kernel: Live) -> None:
    kernel.ok("class Bad:\n    def __dir__(self):\n        import os; os._exit(1)")
    kernel.ok("bad = Bad(); nice_name = 1")
    complete(kernel, "bad.a")
    assert complete(kernel, "nice_n") == ["nice_name"]


def test_questions_in_the_resident_mode(start: Callable[..., Live]) -> None:
    kernel = start()
    kernel.ok("import threading; done = threading.Event()")
    kernel.ok("t = threading.Thread(target=done.wait); t.start()")
    assert kernel.ok("a_long_name = 1").figures["resident"] is True
    assert complete(kernel, "a_lo") == ["a_long_name"]
    assert "int" in inspect(kernel, "a_long_name")
    assert kernel.value("t.is_alive()") == "True"
    assert kernel.value("done.set(); t.join(10); t.is_alive()") == "False"


def test_history(start: Callable[..., Live]) -> None:
    kernel = start()
    sources = [
        "x = 1",
        "x + 1",
        "%%sandbox memory=100M\n'limited'",
        "import os; os._exit(1)",
        "x + 1",
    ]
    for source in sources:
        kernel.run(source)
    kernel.run("unseen = 1", store_history=False)
    kernel.run("unseen = 2", silent=True)

    def history(kind: str, **more: object) -> list[list[object]]:
        content = {"hist_access_type": kind, "output": False, "raw": True, **more}
        reply = kernel.ask("history_request", content)
        assert reply["status"] == "ok"
        return reply["history"]

    assert [row[2] for row in history("tail", n=10)] == sources
    assert [row[1:] for row in history("tail", n=2, output=True)] == [
        [4, [sources[3], None]],
        [5, ["x + 1", "2"]],
    ]
    assert [row[1] for row in history("range", session=0, start=2, stop=4)] == [2, 3]
    assert [row[1] for row in history("search", pattern="x +*", n=9)] == [2, 5]
    assert [row[1] for row in history("search", pattern="x +*", n=9, unique=True)] == [5]
    assert history("no such kind") == []


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("x = 1", "complete"),
        ("def f():", "incomplete"),
        ("import = 7q", "invalid"),
        ("%%sandbox memory=1G\nfor x in y:", "incomplete"),
    ],
)
def test_is_complete(kernel: Live, code: str, status: str) -> None:
    assert kernel.ask("is_complete_request", {"code": code})["status"] == status


@pytest.mark.parametrize("channel", ["shell", "control"])
def test_kernel_info_promises_what_works(kernel: Live, channel: str) -> None:
    info = kernel.ask("kernel_info_request", channel=channel)
    assert info["status"] == "ok"
    assert info["supported_features"] == []
    assert not info.get("debugger")
    assert info["protocol_version"].startswith("5.")
    assert info["language_info"]["name"] == "python"
    assert info["language_info"]["file_extension"] == ".py"
    assert info["implementation"] == "sandbox_kernel"


@pytest.mark.parametrize(
    ("msg_type", "content"),
    [
        ("create_subshell_request", {}),
        ("delete_subshell_request", {"subshell_id": "x"}),
        ("list_subshell_request", {}),
        ("execute_request", {"code": "1"}),
    ],
)
def test_what_is_not_offered_is_refused_with_a_reply(
    kernel: Live, msg_type: str, content: dict[str, object]
) -> None:
    reply = kernel.ask(msg_type, content, channel="control")
    assert reply["status"] == "error"
    assert reply["evalue"]


def test_the_debugger_is_refused_in_its_own_words(kernel: Live) -> None:
    content = {"type": "request", "seq": 7, "command": "debugInfo"}
    reply = kernel.ask("debug_request", content, channel="control")
    assert (reply["success"], reply["request_seq"], reply["command"]) == (False, 7, "debugInfo")


def test_usage(kernel: Live) -> None:
    kernel.ok("b = b'x' * (60 << 20)")
    usage = kernel.ask("usage_request", channel="control")
    assert 60 << 20 <= usage["kernel_memory"] < 1 << 30
    assert usage["host_virtual_memory"]["total"] == 1 << 30
    assert usage["kernel_cpu"] >= 0
    kernel.ok("del b")


def test_the_control_channel_answers_while_a_cell_runs(kernel: Live) -> None:
    msg_id = kernel.send("print('up', flush=True)\nwhile True: pass")
    kernel.until_text(msg_id, "up")

    def seen_at_work() -> bool:
        return kernel.ask("usage_request", channel="control")["kernel_cpu"] > 0

    assert leaks.until(seen_at_work)
    assert kernel.ask("kernel_info_request", channel="control")["status"] == "ok"
    assert msg_id not in kernel.replies
    kernel.manager.interrupt_kernel()
    kernel.result(msg_id)


def test_a_question_behind_a_running_cell_waits_for_its_state(kernel: Live) -> None:
    msg_id = kernel.send(
        "print('up', flush=True); import time; time.sleep(0.3); brand_new_name = 1"
    )
    kernel.until_text(msg_id, "up")
    assert complete(kernel, "brand_n") == ["brand_new_name"]
    kernel.result(msg_id)


def test_connect_info(kernel: Live) -> None:
    reply = kernel.ask("connect_request")
    ports = kernel.client.get_connection_info()
    assert reply["shell_port"] == ports["shell_port"]


def test_the_kernel_process_imports_nothing_of_the_folder(
    start: Callable[..., Live], tmp_path: os.PathLike[str]
) -> None:
    trap = "import pathlib; pathlib.Path(__file__).with_name('sprung').touch()"
    for name in ("json.py", "zmq.py", "sandbox_kernel.py", "ipykernel.py", "sitecustomize.py"):
        with open(os.path.join(tmp_path, name), "w", encoding="utf-8") as file:
            file.write(trap)
    kernel = start()
    assert kernel.value("1 + 1") == "2"
    assert not os.path.exists(os.path.join(tmp_path, "sprung"))
