"""Output while the cell runs: order, whole characters, every source, input, rich display."""

from __future__ import annotations

import pytest

from sandbox_kernel.model import CommMessage, Event, InputRequest, Message, Outcome, Stream
from tests.integration.driver import Driver, Ran

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.kernel,
]


def in_order(ran: Ran) -> list[tuple[str, str]]:
    """Give what came, in order; neighbours on one stream are one."""
    found: list[tuple[str, str]] = []
    for event in ran.events:
        if isinstance(event, Stream):
            if found and found[-1][0] == event.name:
                found[-1] = (event.name, found[-1][1] + event.text)
            else:
                found.append((event.name, event.text))
        elif isinstance(event, Message):
            data = event.content.get("data", {})
            found.append((event.msg_type, data.get("text/plain", "")))
        else:
            found.append(("input", event.prompt))
    return found


# ---- order


async def test_order_of_streams_and_messages(box: Driver) -> None:
    ran = await box.run(
        "import sys\nfrom IPython.display import display\n"
        "for i in range(50):\n"
        "    print('o', i); print('e', i, file=sys.stderr); display(i)\n'last'"
    )
    expected: list[tuple[str, str]] = []
    for i in range(50):
        expected += [("stdout", f"o {i}\n"), ("stderr", f"e {i}\n"), ("display_data", str(i))]
    assert in_order(ran) == [*expected, ("execute_result", "'last'")]


async def test_order_on_one_stream_from_python_c_and_programs(box: Driver) -> None:
    text = await box.ok(
        "import ctypes, os, subprocess, sys\nc = ctypes.CDLL(None)\n"
        "for i in range(5):\n"
        "    print('python', i)\n"
        "    c.printf(b'C %d\\n', i); c.fflush(None)\n"
        "    os.system(f'echo shell {i}')\n"
        "    subprocess.run(['echo', 'program', str(i)])\n"
        "    os.write(1, b'raw %d\\n' % i)\n"
        "    sys.stdout.buffer.write(b'buffer %d\\n' % i)\n"
    )
    kinds = ("python", "C", "shell", "program", "raw", "buffer")
    assert text.splitlines() == [f"{kind} {i}" for i in range(5) for kind in kinds]


async def test_puts_of_c_is_shown(box: Driver) -> None:
    assert (
        await box.ok(
            "import ctypes; c = ctypes.CDLL(None); c.puts(b'from C'); c.fflush(None); None"
        )
        == "from C\n"
    )


async def test_what_c_holds_back_is_shown_by_the_end_of_the_cell(box: Driver) -> None:
    # stdio buffers what goes into a pipe; nobody flushes it for the user if the cell does not.
    assert await box.ok("import ctypes; _ = ctypes.CDLL(None).puts(b'held back')") == "held back\n"
    assert await box.ok("pass") == ""


async def test_stderr_of_a_program(box: Driver) -> None:
    ran = await box.run("import os; _ = os.system('echo wrong >&2')")
    assert in_order(ran) == [("stderr", "wrong\n")]


async def test_a_program_and_python_on_both_streams(box: Driver) -> None:
    ran = await box.run(
        "import os, sys\nprint('one'); os.system('echo two'); print('three', file=sys.stderr)\n"
        "os.system('echo four >&2'); print('five')"
    )
    assert in_order(ran) == [
        ("stdout", "one\ntwo\n"),
        ("stderr", "three\nfour\n"),
        ("stdout", "five\n"),
    ]


async def test_output_of_a_thread_and_of_a_fork(box: Driver) -> None:
    text = await box.ok(
        "import os, threading\nt = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "if os.fork() == 0: print('child'); os._exit(0)\n_ = os.wait(); print('parent')"
    )
    assert text == "thread\nchild\nparent\n"


async def test_logging_and_warnings(box: Driver) -> None:
    ran = await box.run(
        "import logging, warnings\nlogging.warning('logged'); warnings.warn('warned')"
    )
    assert "WARNING:root:logged\n" in ran.text("stderr")
    assert "UserWarning: warned" in ran.text("stderr")


# ---- while it runs

SOURCES = {
    "python": "print('up')",
    "no newline": "print('up', end='')",
    "stderr": "import sys; print('up', file=sys.stderr)",
    "C": "import ctypes; c = ctypes.CDLL(None); c.puts(b'up'); c.fflush(None)",
    "program": "import os; os.system('echo up')",
    "buffer": "import sys; sys.stdout.buffer.write(b'up'); sys.stdout.buffer.flush()",
    "display": "from IPython.display import display; display('up')",
}


@pytest.mark.parametrize("code", SOURCES.values(), ids=SOURCES)
async def test_output_comes_while_the_cell_runs(box: Driver, code: str) -> None:
    # The cell ends only because its output was seen.
    def act(event: Event) -> None:
        box.session.interrupt()

    ran = await box.run(f"{code}\nwhile True: pass", on_event=act)
    assert ran.outcome is Outcome.INTERRUPTED, ran.said()


async def test_output_of_a_program_that_runs_on(box: Driver) -> None:
    ran = await box.interrupted(
        "import subprocess; subprocess.run('echo up; sleep 60', shell=True)"
    )
    assert ran.outcome is Outcome.INTERRUPTED, ran.said()
    assert ran.text() == "up\n"


# ---- everything, before the reply


@pytest.mark.parametrize("size", [1, 65536, 65537, 1 << 20, (1 << 20) + 1, 8 << 20])
async def test_all_of_it_is_there_when_the_cell_ends(box: Driver, size: int) -> None:
    assert await box.ok(f"print('x' * {size}, end='')") == "x" * size
    assert await box.ok(f"import os; _ = os.system('head -c {size} /dev/zero')") == "\0" * size


async def test_many_small_writes(box: Driver) -> None:
    text = await box.ok("for i in range(20000): print(i)")
    assert text == "".join(f"{i}\n" for i in range(20000))


# ---- characters

SPLIT = "import os\nfor b in 'aé€😀z'.encode(): os.write(1, bytes([b])){between}"


async def test_a_split_character_survives(box: Driver) -> None:
    assert await box.ok(SPLIT.format(between="")) == "aé€😀z"


async def test_a_split_character_survives_a_pause(box: Driver) -> None:
    # A barrier after each byte: the kernel has read it before the next one is written.
    code = SPLIT.format(between="; sys.stdout._barrier()")
    assert await box.ok("import sys\n" + code) == "aé€😀z"


async def test_half_a_character_at_the_end(box: Driver) -> None:
    assert await box.ok("import os; _ = os.write(1, 'é'.encode()[:1])") == "\ufffd"
    assert await box.ok("print('next')") == "next\n"


async def test_what_is_no_text(box: Driver) -> None:
    assert await box.ok("import os; _ = os.write(1, b'a\\xff\\xfeb\\n')") == "a\ufffd\ufffdb\n"
    assert await box.ok("print('lone \\ud800')") == "lone \\ud800\n"


# ---- streams that the user meddles with


async def test_closed_and_replaced_streams(box: Driver) -> None:
    await box.ok("import os, sys; sys.stdout.close(); os.close(1)")
    assert await box.ok("print('again')") == "again\n"
    assert (
        await box.ok("import io, sys; old, sys.stdout = sys.stdout, io.StringIO(); print('hidden')")
        == ""
    )
    assert await box.ok("sys.stdout = old; print('shown')") == "shown\n"


async def test_redirect_and_capture(box: Driver) -> None:
    assert (
        await box.ok(
            "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as s: print('x')\nprint(repr(s.getvalue()))"
        )
        == "'x\\n'\n"
    )
    assert await box.ok("%%capture caught\nprint('kept')") == ""
    assert await box.value("caught.stdout") == "kept\n"


async def test_dup2_of_the_user(box: Driver) -> None:
    await box.ok(
        "import os; keep = os.dup(1); n = os.open('/dev/null', os.O_WRONLY); os.dup2(n, 1)"
    )
    assert await box.ok("print('a new cell, a new pipe')") == "a new cell, a new pipe\n"


# ---- rich display


async def test_rich_display(box: Driver) -> None:
    ran = await box.run(
        "from IPython.display import HTML, display\ndisplay(HTML('<b>x</b>'), metadata={'k': 1})\nHTML('<i>y</i>')"
    )
    shown, result = ran.messages("display_data")[0], ran.messages("execute_result")[0]
    assert shown.content["data"]["text/html"] == "<b>x</b>"
    assert shown.content["metadata"] == {"k": 1}
    assert result.content["data"]["text/html"] == "<i>y</i>"
    assert result.content["execution_count"] == box.count


async def test_update_display_over_two_cells(box: Driver) -> None:
    ran = await box.run(
        "from IPython.display import display; h = display('one', display_id='the-id')"
    )
    assert ran.messages("display_data")[0].content["transient"] == {"display_id": "the-id"}
    ran = await box.run("h.update('two')")
    update = ran.messages("update_display_data")[0].content
    assert update["transient"] == {"display_id": "the-id"}
    assert update["data"]["text/plain"] == "'two'"


async def test_clear_output(box: Driver) -> None:
    ran = await box.run(
        "from IPython.display import clear_output\nprint('a'); clear_output(wait=True); print('b')"
    )
    assert [kind for kind, _ in in_order(ran)] == ["stdout", "clear_output", "stdout"]
    assert ran.messages("clear_output")[0].content == {"wait": True}


async def test_traceback(box: Driver) -> None:
    ran = await box.run("def inner():\n    return 1 / 0\nprint('before')\ninner()")
    assert ran.outcome is Outcome.ERROR
    assert [kind for kind, _ in in_order(ran)] == ["stdout", "error"]
    error = ran.messages("error")[0].content
    assert (error["ename"], error["evalue"]) == ("ZeroDivisionError", "division by zero")
    assert "----> 2     return 1 / 0" in ran.trace
    assert error["traceback"] == ran.result.reply["traceback"]


async def test_pager(box: Driver) -> None:
    ran = await box.run("len?")
    page = ran.result.reply["payload"][0]
    assert page["source"] == "page"
    assert "Return the number of items" in page["data"]["text/plain"]


async def test_comms_and_buffers(box: Driver) -> None:
    ran = await box.run(
        "from comm import create_comm\nc = create_comm(target_name='t', data={'a': 1}, buffers=[b'raw'])\nc.send({'b': 2})"
    )
    opened, sent = ran.messages("comm_open")[0], ran.messages("comm_msg")[0]
    assert opened.content["target_name"] == "t"
    assert opened.content["data"] == {"a": 1}
    assert opened.buffers == (b"raw",)
    assert sent.content["data"] == {"b": 2}
    assert box.session.comms == {opened.content["comm_id"]: "t"}
    await box.ok("c.close()")
    assert box.session.comms == {}


async def test_a_comm_message_changes_the_state(box: Driver) -> None:
    ran = await box.run(
        "from comm import create_comm\ngot = []\nc = create_comm(target_name='t'); c.on_msg(lambda m: got.append(m['content']['data']))"
    )
    comm_id = ran.messages("comm_open")[0].content["comm_id"]
    events: list[Event] = []
    message = CommMessage("comm_msg", {"comm_id": comm_id, "data": {"x": 7}})
    result = await box.session.comm(message, events.append)
    assert result.committed
    assert await box.value("got") == [{"x": 7}]
    await box.ok("c.close()")


# ---- input


async def ask(box: Driver, code: str, *answers: str) -> tuple[Ran, list[InputRequest]]:
    """Run a cell and answer what it asks, one after the other."""
    left, asked = list(answers), []

    def act(event: Event) -> None:
        if isinstance(event, InputRequest):
            asked.append(event)
            box.session.answer(left.pop(0))

    return await box.run(code, on_event=act, allow_stdin=True), asked


async def test_input(box: Driver) -> None:
    ran, asked = await ask(box, "print('before'); n = input('name? '); print(repr(n))", "Zoë 😀")
    assert asked == [InputRequest("name? ", password=False)]
    assert in_order(ran) == [("stdout", "before\n"), ("input", "name? "), ("stdout", "'Zoë 😀'\n")]


async def test_getpass(box: Driver) -> None:
    ran, asked = await ask(
        box, "import getpass; p = getpass.getpass('secret: '); print(len(p))", "hush"
    )
    assert asked == [InputRequest("secret: ", password=True)]
    assert ran.text() == "4\n"


async def test_several_questions(box: Driver) -> None:
    ran, asked = await ask(box, "print([input(f'{i}? ') for i in range(5)])", *"abcde")
    assert [question.prompt for question in asked] == [f"{i}? " for i in range(5)]
    assert ran.text() == "['a', 'b', 'c', 'd', 'e']\n"


async def test_input_without_a_frontend(box: Driver) -> None:
    ran = await box.run("input('anyone? ')", allow_stdin=False)
    assert ran.outcome is Outcome.ERROR
    assert ran.result.reply["ename"] == "StdinNotImplementedError"


async def test_reading_stdin_directly_does_not_hang(box: Driver) -> None:
    assert await box.value("__import__('subprocess').run('cat', capture_output=True).stdout") == b""


async def test_a_late_answer_harms_nothing(box: Driver) -> None:
    box.session.answer("nobody asked")
    ran, _ = await ask(box, "print(input('? '))", "asked")
    assert ran.text() == "asked\n"


@pytest.mark.parametrize("length", [0, 100_000])
async def test_lengths_of_answers(box: Driver, length: int) -> None:
    ran, _ = await ask(box, "print(len(input()))", "x" * length)
    assert ran.text() == f"{length}\n"


async def test_big_messages(box: Driver) -> None:
    size = 4 << 20
    ran = await box.run(
        f"from IPython.display import display; display({{'text/plain': 'x' * {size}}}, raw=True)"
    )
    assert len(ran.messages("display_data")[0].content["data"]["text/plain"]) == size
