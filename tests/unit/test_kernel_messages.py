"""The kernel over its real sockets, with a session that is a fake."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.client import TIMEOUT_S, Client, fake_kernel


@pytest.fixture(scope="module")
def kernel() -> Iterator[Client]:
    with fake_kernel() as client:
        yield client


def test_kernel_info_advertises_only_what_works(kernel: Client) -> None:
    info = kernel.ask("kernel_info_request", {}).content
    assert info["status"] == "ok"
    assert info["supported_features"] == []
    assert info["implementation"] == "sandbox_kernel"
    assert info["language_info"]["name"] == "python"
    assert len(info["implementation_version"].split(".")) >= 3


def test_output_stands_before_the_reply_and_in_order(kernel: Client) -> None:
    answer = kernel.run("out one\nerr two\nout three\nresult 4")
    kinds = [(m["msg_type"], m["content"].get("name")) for m in answer.iopub]
    assert kinds == [
        ("execute_input", None),
        ("stream", "stdout"),
        ("stream", "stderr"),
        ("stream", "stdout"),
        ("execute_result", None),
    ]
    assert answer.content["status"] == "ok"
    assert answer.text() == "one\nthree\n"


def test_many_pieces_become_few_messages(kernel: Client) -> None:
    answer = kernel.run("many 5000")
    assert answer.text() == "".join(f"{n}\n" for n in range(5000))
    assert len(answer.of("stream")) < 100


def test_metadata_has_the_figures(kernel: Client) -> None:
    metadata = kernel.run("%%sandbox memory=256M\nout x").reply["metadata"]
    assert metadata["status"] == "ok"
    assert metadata["dependencies_met"] is True
    assert {"started", "engine"} <= set(metadata)
    sandbox = metadata["sandbox"]
    assert sandbox["outcome"] == "ok"
    assert sandbox["committed"] is True
    assert sandbox["limits"]["memory_bytes"] == 256 << 20
    assert sandbox["image"] == "host"
    assert sandbox["container_id"] == "c0ffee"
    assert set(sandbox) >= {
        "resident", "wall_s", "cpu_s", "peak_memory_bytes", "peak_processes", "disk_bytes",
        "output_bytes",
    }  # fmt: skip


def test_count_moves_with_stored_cells_only(kernel: Client) -> None:
    first = kernel.run("out a").content["execution_count"]
    unstored = kernel.run("result b", store_history=False)
    silent = kernel.run("out c", silent=True)
    empty = kernel.run("  \n")
    second = kernel.run("result d")
    assert unstored.content["execution_count"] == first
    assert silent.content["execution_count"] == first
    assert empty.content["execution_count"] == first
    assert second.content["execution_count"] == first + 1
    # The guest hears the number that its prompt will have.
    assert second.of("execute_result")[0]["execution_count"] == first + 1
    assert second.of("execute_input")[0]["execution_count"] == first + 1
    assert not silent.of("execute_input")


def test_error_is_one_message_and_the_same_reply(kernel: Client) -> None:
    answer = kernel.run("fail no luck")
    (error,) = answer.of("error")
    assert error["ename"] == answer.content["ename"] == "ValueError"
    assert error["traceback"] == answer.content["traceback"]
    assert answer.reply["metadata"]["sandbox"]["outcome"] == "error"


@pytest.mark.parametrize(
    ("line", "ename", "words"),
    [
        ("kill memory", "MemoryLimitExceeded", ["1 GiB", "peak 1 GiB"]),
        ("kill wall_time", "WallTimeLimitExceeded", ["5 min"]),
        ("kill cpu_time", "CpuTimeLimitExceeded", ["5 min"]),
        ('kill crashed {"signal": 11}', "CellCrashed", ["SIGSEGV"]),
        ('kill exited {"exit_code": 3}', "CellExited", ["exit code 3"]),
        ("kill interrupted", "KeyboardInterrupt", ["2 s", "killed"]),
    ],
)
def test_a_killed_cell_has_a_named_error(
    kernel: Client, line: str, ename: str, words: list[str]
) -> None:
    answer = kernel.run(f"out before\n{line}")
    (error,) = answer.of("error")
    assert error["ename"] == answer.content["ename"] == ename
    assert error["evalue"] == answer.content["evalue"]
    assert error["traceback"] == answer.content["traceback"]
    assert "the session is as it was before this cell" in error["evalue"]
    assert all(word in error["evalue"] for word in words)
    assert answer.text() == "before\n"
    assert answer.reply["metadata"]["sandbox"]["committed"] is False
    assert kernel.run("out alive").text() == "alive\n"


def test_time_limit_shows_where_the_cell_was(kernel: Client) -> None:
    answer = kernel.run('kill wall_time {"traceback": ["line 3 of cell"]}')
    (error,) = answer.of("error")
    assert error["traceback"][0] == "line 3 of cell"
    assert "WallTimeLimitExceeded" in error["traceback"][-1]


def test_comms_of_a_killed_cell_are_closed(kernel: Client) -> None:
    answer = kernel.run("comm c1 jupyter.widget\nkill memory")
    assert answer.of("comm_open")[0]["comm_id"] == "c1"
    assert answer.of("comm_close")[0]["comm_id"] == "c1"
    assert kernel.ask("comm_info_request", {}).content["comms"].get("c1") is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("%%sandbox memory=9G\nout x", ["memory=9G", "1 GiB"]),
        ("%%sandbox memory=lots\nout x", ["lots", "512M"]),
        ("%%sandbox memory=0\nout x", ["memory=0"]),
        ("%sandbox fly", ["fly", "%sandbox"]),
    ],
)
def test_bad_settings_are_a_clear_error(kernel: Client, code: str, words: list[str]) -> None:
    answer = kernel.run(code)
    (error,) = answer.of("error")
    assert error["ename"] == answer.content["ename"] == "ConfigError"
    assert all(word in error["evalue"] for word in words)
    assert "sandbox" not in answer.reply["metadata"]
    assert kernel.run("out alive").text() == "alive\n"


def test_status_table(kernel: Client) -> None:
    (shown,) = kernel.run("%sandbox").of("display_data")
    assert "memory" in shown["data"]["text/plain"]
    assert "<table>" in shown["data"]["text/html"]


def test_notes_are_told_on_stderr(kernel: Client) -> None:
    assert kernel.run("note a thread was left").text("stderr") == "a thread was left\n"


def test_payload_and_expressions(kernel: Client) -> None:
    answer = kernel.run("page help", user_expressions={"a": "1"})
    assert [item["source"] for item in answer.content["payload"]] == ["page"]
    assert answer.content["user_expressions"]["a"]["data"] == {"text/plain": "1"}


def test_malformed_messages_of_a_guest_are_dropped(kernel: Client) -> None:
    bad = [
        ["execute_result", {"data": "no"}],
        ["error", {"ename": 1}],
        ["error", {"ename": "a", "evalue": "b", "traceback": [1]}],
        ["status", {"execution_state": "idle"}],
        ["comm_open", {}],
    ]
    lines = [f"message {json.dumps(message)}" for message in bad]
    answer = kernel.run("\n".join([*lines, "out end"]))
    assert [m["msg_type"] for m in answer.iopub] == ["execute_input", "stream"]


def test_text_that_utf8_cannot_hold_is_shown_escaped(kernel: Client) -> None:
    answer = kernel.run("surrogate")
    assert answer.content["evalue"] == "\\ud800"
    assert answer.of("error")[0]["evalue"] == "\\ud800"


def test_a_failure_of_the_kernel_itself_is_answered(kernel: Client) -> None:
    answer = kernel.run("raise oops")
    assert answer.content["status"] == "error"
    assert "oops" in answer.of("error")[0]["evalue"]


def test_queue_is_aborted_after_an_error(kernel: Client) -> None:
    ids = [kernel.kc.execute(code) for code in ("wait", "out 1", "out 2", "out 3")]
    kernel.await_iopub(ids[0], "execute_input")
    kernel.manager.interrupt_kernel()
    statuses = [kernel.reply(msg_id)["content"]["status"] for msg_id in ids]
    assert statuses == ["error", "aborted", "aborted", "aborted"]
    assert kernel.run("out later").text() == "later\n"


def test_queue_goes_on_without_stop_on_error(kernel: Client) -> None:
    ids = [kernel.kc.execute(code, stop_on_error=False) for code in ("fail x", "out 1")]
    assert [kernel.reply(i)["content"]["status"] for i in ids] == ["error", "ok"]


def test_interrupt_and_control_while_a_cell_runs(kernel: Client) -> None:
    msg_id = kernel.kc.execute("wait")
    kernel.await_iopub(msg_id, "execute_input")
    assert kernel.control("kernel_info_request", {})["status"] == "ok"
    usage = kernel.control("usage_request", {})
    assert usage["host_virtual_memory"]["total"] == 1 << 30
    assert usage["kernel_memory"] == 1 << 30
    assert usage["kernel_cpu"] >= 0
    assert kernel.control("interrupt_request", {})["status"] == "ok"
    assert kernel.finish(msg_id).content["ename"] == "KeyboardInterrupt"


def test_sigint_is_ignored(kernel: Client) -> None:
    provisioner = kernel.manager.provisioner
    assert provisioner is not None
    os.kill(provisioner.pid, signal.SIGINT)
    assert kernel.run("out alive").text() == "alive\n"


def test_input(kernel: Client) -> None:
    msg_id = kernel.kc.execute("out first\nask name?", allow_stdin=True)
    request = kernel.kc.get_stdin_msg(timeout=TIMEOUT_S)
    assert request["content"] == {"prompt": "name?", "password": False}
    assert request["parent_header"]["msg_id"] == msg_id
    assert kernel.control("kernel_info_request", {})["status"] == "ok"
    kernel.kc.input("Ada")
    assert kernel.finish(msg_id).text() == "first\nsaid Ada\n"


def test_two_inputs_and_a_password(kernel: Client) -> None:
    msg_id = kernel.kc.execute("ask a\nask secret", allow_stdin=True)
    for answer, password in (("1", False), ("2", True)):
        request = kernel.kc.get_stdin_msg(timeout=TIMEOUT_S)
        assert request["content"]["password"] is password
        kernel.kc.input(answer)
    assert kernel.finish(msg_id).text() == "said 1\nsaid 2\n"


def test_interrupt_during_input_and_a_late_answer(kernel: Client) -> None:
    msg_id = kernel.kc.execute("ask x", allow_stdin=True)
    kernel.kc.get_stdin_msg(timeout=TIMEOUT_S)
    kernel.control("interrupt_request", {})
    assert kernel.finish(msg_id).content["ename"] == "KeyboardInterrupt"
    kernel.kc.input("late")
    # A round trip on the stdin socket is not to be had; the next question purges what came.
    kernel.run("out between")
    msg_id = kernel.kc.execute("ask y", allow_stdin=True)
    kernel.kc.get_stdin_msg(timeout=TIMEOUT_S)
    kernel.kc.input("right")
    assert kernel.finish(msg_id).text() == "said right\n"


def test_complete_and_inspect(kernel: Client) -> None:
    code = "%%sandbox memory=1G\npri"
    content = kernel.ask("complete_request", {"code": code, "cursor_pos": len(code)}).content
    assert content["matches"] == ["print"]
    assert content["cursor_start"] == len(code) - 3
    content = kernel.ask(
        "inspect_request", {"code": code, "cursor_pos": 3, "detail_level": 1}
    ).content
    assert content["found"] is True
    seen = json.loads(content["data"]["text/plain"])
    assert seen["detail_level"] == 1
    assert seen["code"] == " " * 19 + "\npri"


def test_a_question_that_kills_its_fork_is_answered_empty(kernel: Client) -> None:
    content = kernel.ask("complete_request", {"code": "die", "cursor_pos": 3}).content
    assert content["status"] == "ok"
    assert content["matches"] == []
    content = kernel.ask("inspect_request", {"code": "die", "cursor_pos": 3}).content
    assert content == {"status": "ok", "found": False, "data": {}, "metadata": {}}


@pytest.mark.parametrize(
    ("code", "status"),
    [("1+1", "complete"), ("for i in x:", "incomplete"), ("!ls", "complete"), ("a b", "invalid")],
)
def test_is_complete(kernel: Client, code: str, status: str) -> None:
    content = kernel.ask("is_complete_request", {"code": code}).content
    assert content["status"] == status
    assert ("indent" in content) == (status == "incomplete")


def test_history(kernel: Client) -> None:
    count = kernel.run("result 77").content["execution_count"]
    request = {"hist_access_type": "tail", "output": True, "raw": True, "n": 1}
    rows = kernel.ask("history_request", request).content["history"]
    assert rows == [[1, count, ["result 77", "77"]]]
    request = {"hist_access_type": "search", "output": False, "raw": True, "pattern": "*77"}
    assert kernel.ask("history_request", request).content["history"] == [[1, count, "result 77"]]


def test_comm_messages(kernel: Client) -> None:
    opening = {"comm_id": "w1", "target_name": "t", "data": {}}
    kernel.iopub(kernel.send("comm_open", opening))
    comms = kernel.ask("comm_info_request", {"target_name": "t"}).content["comms"]
    assert comms == {"w1": {"target_name": "t"}}
    content = {"comm_id": "w1", "data": {"value": 3}}
    (echo,) = kernel.iopub(kernel.send("comm_msg", content, buffers=[b"abc"]))
    assert echo["content"]["data"] == {"echo": {"value": 3}}
    assert bytes(echo["buffers"][0]) == b"cba"
    killed = kernel.iopub(kernel.send("comm_msg", {"comm_id": "w1", "data": {"die": 1}}))
    assert [m["msg_type"] for m in killed] == ["stream", "comm_close"]
    assert "MemoryLimitExceeded" in killed[0]["content"]["text"]


def test_debugger_and_subshells_are_refused_with_a_reply(kernel: Client) -> None:
    debug = kernel.control("debug_request", {"seq": 4, "command": "initialize"})
    assert debug["status"] == "error"
    assert debug["success"] is False
    assert debug["request_seq"] == 4
    for verb in ("create", "delete", "list"):
        assert kernel.control(f"{verb}_subshell_request", {})["status"] == "error"


def test_the_control_channel_does_not_run_code(kernel: Client) -> None:
    reply = kernel.control("execute_request", {"code": "out x"})
    assert reply["status"] == "error"
    assert "shell channel" in reply["evalue"]


def test_a_host_error_in_a_proven_session_keeps_it(kernel: Client) -> None:
    answer = kernel.run("raise host")
    (error,) = answer.of("error")
    assert error["ename"] == "HostError"
    assert "doctor" in error["evalue"]
    assert "as it was before" in error["evalue"]
    assert kernel.run("out alive").text() == "alive\n"


def test_a_lost_session_is_replaced(kernel: Client) -> None:
    answer = kernel.run("raise lost")
    (error,) = answer.of("error")
    assert error["ename"] == answer.content["ename"] == "SessionLost"
    assert "variables are lost" in error["evalue"]
    assert kernel.run("out alive").text() == "alive\n"
    # Later messages reach the new one.
    msg_id = kernel.kc.execute("wait")
    kernel.await_iopub(msg_id, "execute_input")
    kernel.control("interrupt_request", {})
    assert kernel.finish(msg_id).content["ename"] == "KeyboardInterrupt"


def test_a_session_that_cannot_start_is_told_and_tried_again() -> None:
    with fake_kernel("--failures=2") as kernel:
        assert (
            kernel.ask("complete_request", {"code": "pri", "cursor_pos": 3}).content["matches"]
            == []
        )
        assert kernel.control("usage_request", {})["kernel_memory"] == 0
        answer = kernel.run("out x")
        (error,) = answer.of("error")
        assert error["ename"] == answer.content["ename"] == "HostError"
        assert "no user namespaces" in error["evalue"]
        assert "doctor" in error["evalue"]
        assert kernel.run("out x").text() == "x\n"


def test_restart_and_shutdown() -> None:
    with fake_kernel() as kernel:
        assert kernel.run("out a").content["execution_count"] == 1
        kernel.manager.restart_kernel()
        kernel.kc.wait_for_ready(timeout=TIMEOUT_S)
        assert kernel.run("out a").content["execution_count"] == 1
        msg_id = kernel.kc.execute("wait")
        kernel.await_iopub(msg_id, "execute_input")
        assert kernel.control("shutdown_request", {"restart": False}) == {
            "status": "ok",
            "restart": False,
        }
        provisioner = kernel.manager.provisioner
        assert provisioner is not None
        assert provisioner.process.wait(timeout=TIMEOUT_S) == 0


def test_nothing_is_written_to_the_home(tmp_path: Path) -> None:
    with fake_kernel(env={"HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ip")}) as kernel:
        assert kernel.run("out a").text() == "a\n"
    assert list(tmp_path.iterdir()) == []
