"""input() and getpass(): answers, interrupts, the end of the input, and clients that have none."""

from __future__ import annotations

import pytest

from tests.kernel.live import Live

pytestmark = [pytest.mark.kernel, pytest.mark.needs("kernel")]


def answered(kernel: Live, code: str, *answers: str) -> str:
    msg_id = kernel.send(code, allow_stdin=True)
    for answer in answers:
        kernel.question()
        kernel.client.input(answer)
    ran = kernel.result(msg_id)
    assert ran.status == "ok", ran.said()
    return ran.text()


def test_input(kernel: Live) -> None:
    msg_id = kernel.send("name = input('who? '); print('hello', name)", allow_stdin=True)
    assert kernel.question() == {"prompt": "who? ", "password": False}
    kernel.client.input("wörld")
    assert kernel.result(msg_id).text() == "hello wörld\n"
    assert kernel.value("name") == "'wörld'"


def test_getpass(kernel: Live) -> None:
    msg_id = kernel.send("import getpass; secret = getpass.getpass('key: ')", allow_stdin=True)
    assert kernel.question() == {"prompt": "key: ", "password": True}
    kernel.client.input("s3cret")
    assert kernel.result(msg_id).status == "ok"
    assert kernel.value("secret") == "'s3cret'"


def test_many_questions(kernel: Live) -> None:
    code = "print([input(f'{n}? ') for n in range(20)])"
    answers = [f"answer {n}" for n in range(20)]
    assert answered(kernel, code, *answers) == f"{answers}\n"


def test_output_before_a_question_is_shown_before_it(kernel: Live) -> None:
    msg_id = kernel.send("print('first', end=''); input('? ')", allow_stdin=True)
    kernel.question()
    kernel.until_text(msg_id, "first")
    stream = next(m for m in kernel.iopub[msg_id] if m["msg_type"] == "stream")
    question = next(m for m in reversed(kernel.order) if m["channel"] == "stdin")
    assert stream["header"]["date"] <= question["header"]["date"]
    kernel.client.input("")
    kernel.result(msg_id)


def test_the_question_has_the_header_of_its_request(kernel: Live) -> None:
    msg_id = kernel.send("input()", allow_stdin=True)
    kernel.question()
    question = next(m for m in reversed(kernel.order) if m["channel"] == "stdin")
    assert question["parent_header"]["msg_id"] == msg_id
    kernel.client.input("")
    kernel.result(msg_id)


@pytest.mark.parametrize("ask", ["input('? ')", "import getpass; getpass.getpass()"])
def test_an_interrupt_at_a_question(kernel: Live, ask: str) -> None:
    msg_id = kernel.send(f"x = 'kept'\n{ask}", allow_stdin=True)
    kernel.question()
    kernel.manager.interrupt_kernel()
    ran = kernel.result(msg_id)
    assert ran.content["ename"] == "KeyboardInterrupt"
    assert ran.figures["committed"] is True
    assert kernel.value("x") == "'kept'"


def test_an_answer_that_is_late_is_not_the_next_ones(kernel: Live) -> None:
    msg_id = kernel.send("input('one? ')", allow_stdin=True)
    kernel.question()
    kernel.manager.interrupt_kernel()
    kernel.result(msg_id)
    kernel.client.input("late")
    kernel.value("1")
    assert answered(kernel, "print(input('two? '))", "right") == "right\n"


def test_the_end_of_the_input(kernel: Live) -> None:
    msg_id = kernel.send("input()", allow_stdin=True)
    kernel.question()
    kernel.client.input("\x04")
    assert kernel.result(msg_id).content["ename"] == "EOFError"


def test_a_time_limit_at_a_question(kernel: Live) -> None:
    msg_id = kernel.send("%%sandbox wall_time=300ms\ninput()", allow_stdin=True)
    kernel.question()
    assert kernel.result(msg_id).content["ename"] == "WallTimeLimitExceeded"
    assert kernel.value("1 + 1") == "2"


def test_a_client_without_stdin(kernel: Live) -> None:
    ran = kernel.run("input()", allow_stdin=False)
    assert ran.content["ename"] == "StdinNotImplementedError"
    assert len(ran.of("error")) == 1


def test_standard_input_is_empty(kernel: Live) -> None:
    assert kernel.ok("import os; print(os.read(0, 10))").text() == "b''\n"
    code = "import subprocess; print(subprocess.run(['cat'], capture_output=True).stdout)"
    assert kernel.ok(code).text() == "b''\n"


def test_pdb_asks(kernel: Live) -> None:
    code = "def f():\n    inner = 42\n    breakpoint()\nf()"
    text = answered(kernel, code, "p inner * 2", "c")
    assert "84" in text
