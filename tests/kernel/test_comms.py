"""Comms: targets in cells, both directions, buffers, widgets, and handlers that break."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernel.live import Live, Message

pytestmark = [pytest.mark.kernel, pytest.mark.needs("kernel")]

TARGET = """
heard = []
def opened(comm, msg):
    heard.append(('open', msg['content']['data'], [bytes(b) for b in msg['buffers']]))
    comm.on_msg(lambda m: on_msg(comm, m))
    comm.on_close(lambda m: heard.append(('close', m['content']['data'], [])))
    comm.send({'welcome': True})
def on_msg(comm, msg):
    data, buffers = msg['content']['data'], [bytes(b) for b in msg['buffers']]
    heard.append(('msg', data, buffers))
    if data.get('do'):
        exec(data['do'], globals())
    comm.send({'echo': data}, buffers=[b[::-1] for b in buffers])
get_ipython().kernel.comm_manager.register_target('echo', opened)
"""


class Comm:
    """The client's end of one comm."""

    def __init__(self, kernel: Live, comm_id: str) -> None:
        self.kernel = kernel
        self.comm_id = comm_id

    def say(self, kind: str, data: Message, buffers: list[bytes], **more: Any) -> list[Message]:
        content = {"comm_id": self.comm_id, "data": data, **more}
        msg_id = self.kernel.tell(f"comm_{kind}", content, buffers=buffers)
        return self.kernel.served(msg_id)

    def open(self, target: str, data: Message, *buffers: bytes) -> list[Message]:
        return self.say("open", data, list(buffers), target_name=target)

    def msg(self, data: Message, *buffers: bytes) -> list[Message]:
        return self.say("msg", data, list(buffers))

    def close(self) -> list[Message]:
        return self.say("close", {}, [])


@pytest.fixture
def comm(kernel: Live, request: pytest.FixtureRequest) -> Iterator[Comm]:
    """Give an open comm of the target `echo`."""
    kernel.ok(TARGET)
    end = Comm(kernel, f"comm of {request.node.name}")
    end.open("echo", {})
    yield end
    end.close()


def test_a_comm_that_the_client_opens(kernel: Live) -> None:
    kernel.ok(TARGET)
    end = Comm(kernel, "mine")
    (welcome,) = end.open("echo", {"a": 1}, b"raw", b"\x00\xff")
    assert welcome["msg_type"] == "comm_msg"
    assert welcome["content"] == {"comm_id": "mine", "data": {"welcome": True}}
    assert kernel.ask("comm_info_request")["comms"]["mine"] == {"target_name": "echo"}
    (echo,) = end.msg({"b": 2}, b"abc", b"")
    assert echo["content"]["data"] == {"echo": {"b": 2}}
    assert [bytes(buffer) for buffer in echo["buffers"]] == [b"cba", b""]
    assert end.close() == []
    assert "mine" not in kernel.ask("comm_info_request")["comms"]
    assert eval(kernel.value("heard")) == [
        ("open", {"a": 1}, [b"raw", b"\x00\xff"]),
        ("msg", {"b": 2}, [b"abc", b""]),
        ("close", {}, []),
    ]


def test_a_comm_that_a_cell_opens(kernel: Live) -> None:
    code = """
    from ipykernel.comm import Comm
    got = []
    c = Comm('front', data={'hello': 1}, buffers=[b'bytes'])
    c.on_msg(lambda m: got.append(m['content']['data']))
    c.send({'more': 2}, buffers=[memoryview(b'xyz')])
    print(c.comm_id)
    """
    ran = kernel.ok(code)
    opened, said = (m for m in ran.outputs if m["msg_type"].startswith("comm"))
    assert opened["content"]["target_name"] == "front"
    assert opened["content"]["data"] == {"hello": 1}
    assert [bytes(b) for b in opened["buffers"]] == [b"bytes"]
    assert [bytes(b) for b in said["buffers"]] == [b"xyz"]
    end = Comm(kernel, ran.text().strip())
    end.msg({"from": "client"})
    assert kernel.value("got") == "[{'from': 'client'}]"
    assert kernel.ok("c.close({'bye': 1})").of("comm_close")[0]["comm_id"] == end.comm_id
    assert end.comm_id not in kernel.ask("comm_info_request")["comms"]


def test_large_buffers(kernel: Live, comm: Comm) -> None:
    data = bytes(range(256)) * (4 << 12)
    (echo,) = comm.msg({}, data)
    assert bytes(echo["buffers"][0]) == data[::-1]


def test_comm_info_of_one_target(kernel: Live, comm: Comm) -> None:
    comms = kernel.ask("comm_info_request", {"target_name": "echo"})["comms"]
    assert comm.comm_id in comms
    assert kernel.ask("comm_info_request", {"target_name": "none"})["comms"] == {}


def test_an_unknown_target_is_closed(kernel: Live) -> None:
    heard = Comm(kernel, "stray").open("nobody registered this", {})
    assert [m["content"]["comm_id"] for m in heard if m["msg_type"] == "comm_close"] == ["stray"]
    assert "stray" not in kernel.ask("comm_info_request")["comms"]


def test_a_message_to_no_comm_is_no_problem(kernel: Live) -> None:
    Comm(kernel, "never opened").msg({"x": 1})
    assert kernel.value("1 + 1") == "2"


def test_output_of_a_handler_has_its_parent(kernel: Live, comm: Comm) -> None:
    heard = comm.msg({"do": "print('from the handler')"})
    assert [m["content"]["text"] for m in heard if m["msg_type"] == "stream"] == [
        "from the handler\n"
    ]


def test_an_exception_in_a_handler_is_shown_and_kept(kernel: Live, comm: Comm) -> None:
    heard = comm.msg({"do": "before = 1; 1/0"})
    text = "".join(str(m["content"]) for m in heard)
    assert "ZeroDivisionError" in text
    assert kernel.value("before") == "1"


def test_files_of_a_handler_are_kept(kernel: Live, comm: Comm) -> None:
    comm.msg({"do": "open('by handler', 'w').write('text')"})
    assert kernel.value("open('by handler').read()") == "'text'"


@pytest.mark.parametrize(
    ("do", "word"),
    [
        ("import os; os._exit(0)", "CellExited"),
        ("import os; os.kill(os.getpid(), 11)", "CellCrashed"),
        ("import ctypes; ctypes.string_at(0)", "CellCrashed"),
    ],
)
def test_a_handler_that_crashes_is_rolled_back(
    kernel: Live, comm: Comm, do: str, word: str
) -> None:
    kernel.ok("kept = 'before'; open('kept', 'w').write('before')")
    heard = comm.msg({"do": f"kept = 'after'; open('kept', 'w').write('after'); {do}"})
    assert any(m["msg_type"] == "comm_close" for m in heard)
    assert word in "".join(m["content"]["text"] for m in heard if m["msg_type"] == "stream")
    assert kernel.value("kept, open('kept').read()") == "('before', 'before')"


def test_a_handler_that_breaks_a_limit_is_rolled_back(start: Any) -> None:
    kernel = start(memory="128M", wall_time="1s", grace="1s")
    kernel.ok(TARGET + "\nkept = 'before'")
    end = Comm(kernel, "greedy")
    end.open("echo", {})
    for do, word in (
        ("kept = 0; b = bytearray(300 << 20)", "MemoryLimitExceeded"),
        ("kept = 0\nwhile True: pass", "WallTimeLimitExceeded"),
    ):
        heard = end.msg({"do": do})
        assert word in "".join(m["content"]["text"] for m in heard if m["msg_type"] == "stream")
        assert kernel.value("kept") == "'before'"


def test_a_handler_can_be_interrupted(kernel: Live, comm: Comm) -> None:
    content = {"comm_id": comm.comm_id, "data": {"do": "print('up', flush=True)\nwhile True: pass"}}
    msg_id = kernel.tell("comm_msg", content)
    kernel.until_text(msg_id, "up")
    kernel.manager.interrupt_kernel()
    kernel.served(msg_id)
    assert kernel.value("1 + 1") == "2"


def test_messages_wait_for_a_running_cell(kernel: Live, comm: Comm) -> None:
    msg_id = kernel.send("print('up', flush=True); import time; time.sleep(0.3); heard = []")
    kernel.until_text(msg_id, "up")
    comm.msg({"n": 1})
    assert kernel.result(msg_id).status == "ok"
    assert kernel.value("heard") == "[('msg', {'n': 1}, [])]"


def test_many_messages_keep_their_order(kernel: Live, comm: Comm) -> None:
    contents = [{"comm_id": comm.comm_id, "data": {"n": n}} for n in range(30)]
    ids = [kernel.tell("comm_msg", content) for content in contents]
    for msg_id in ids:
        kernel.served(msg_id)
    seen = kernel.value("[data['n'] for kind, data, _ in heard if kind == 'msg']")
    assert eval(seen) == list(range(30))


def test_comms_of_a_killed_cell_are_closed(kernel: Live) -> None:
    code = "from ipykernel.comm import Comm\nc = Comm('front'); import os; os._exit(1)"
    ran = kernel.run(code)
    opened = ran.of("comm_open")[0]["comm_id"]
    assert [content["comm_id"] for content in ran.of("comm_close")] == [opened]
    assert opened not in kernel.ask("comm_info_request")["comms"]


# ---- ipywidgets


def update(kernel: Live, comm_id: str, **state: Any) -> list[Message]:
    content = {"method": "update", "state": state, "buffer_paths": []}
    return Comm(kernel, comm_id).msg(content)


def test_a_slider(kernel: Live) -> None:
    code = """
    import ipywidgets
    seen = []
    slider = ipywidgets.IntSlider(value=3, min=0, max=10)
    slider.observe(lambda change: seen.append((change['old'], change['new'])), 'value')
    slider
    """
    ran = kernel.ok(code)
    view = ran.of("execute_result")[0]["data"]["application/vnd.jupyter.widget-view+json"]
    opened = {content["comm_id"]: content["data"]["state"] for content in ran.of("comm_open")}
    assert opened[view["model_id"]]["value"] == 3
    heard = update(kernel, view["model_id"], value=7)
    echoes = [m["content"]["data"] for m in heard if m["msg_type"] == "comm_msg"]
    assert any(echo["method"] == "echo_update" for echo in echoes)
    assert kernel.value("slider.value, seen") == "(7, [(3, 7)])"
    assert kernel.ok("slider.value = 9").of("comm_msg")[0]["data"]["state"] == {"value": 9}


def test_a_slider_lives_on_after_a_killed_cell(kernel: Live) -> None:
    ran = kernel.ok("import ipywidgets; slider = ipywidgets.IntSlider(value=3)\nslider")
    view = ran.of("execute_result")[0]["data"]["application/vnd.jupyter.widget-view+json"]
    update(kernel, view["model_id"], value=7)
    kernel.run("slider.value = 50; import os; os._exit(1)")
    assert kernel.value("slider.value") == "7"
    update(kernel, view["model_id"], value=8)
    assert kernel.value("slider.value") == "8"


def test_interactive(kernel: Live) -> None:
    code = """
    import ipywidgets
    calls = []
    def f(x):
        calls.append(x); print('x is', x)
        return x * 2
    box = ipywidgets.interactive(f, x=(0, 10))
    display(box)
    box.children[0].comm.comm_id
    """
    comm_id = eval(kernel.ok(code).result)
    update(kernel, comm_id, value=9)
    assert kernel.value("box.result, calls[-1]") == "(18, 9)"


def test_a_button_prints_into_an_output(kernel: Live) -> None:
    code = """
    import ipywidgets
    clicks = []
    out = ipywidgets.Output()
    button = ipywidgets.Button(description='go')
    @out.capture()
    def clicked(_):
        clicks.append(1); print('clicked')
    button.on_click(clicked)
    button.comm.comm_id
    """
    comm_id = eval(kernel.ok(code).result)
    heard = Comm(kernel, comm_id).msg({"method": "custom", "content": {"event": "click"}})
    assert kernel.value("clicks") == "[1]"
    states = [m["content"]["data"].get("state", {}) for m in heard if m["msg_type"] == "comm_msg"]
    assert any(state.get("msg_id") for state in states)
    assert any(m["content"].get("text") == "clicked\n" for m in heard)


def test_linked_widgets(kernel: Live) -> None:
    code = """
    import ipywidgets
    a, b = ipywidgets.IntSlider(), ipywidgets.IntText()
    link = ipywidgets.link((a, 'value'), (b, 'value'))
    a.comm.comm_id
    """
    comm_id = eval(kernel.ok(code).result)
    heard = update(kernel, comm_id, value=5)
    assert any(
        m["content"]["data"].get("state") == {"value": 5}
        for m in heard
        if m["msg_type"] == "comm_msg" and m["content"]["comm_id"] != comm_id
    )
    assert kernel.value("b.value") == "5"
