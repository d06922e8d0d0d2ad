"""Asking systemd for a scope, over real sockets of the test's own that speak D-Bus, or do not."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jeepney import (
    DBusAddress,
    HeaderFields,
    Message,
    Parser,
    new_error,
    new_method_return,
    new_signal,
)

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import scope
from sandbox_kernel.linux.scope import Systemd, delegation_remedy, enter_scope, find_systemd

JOB = "/org/freedesktop/systemd1/job/7"
OTHER_JOB = "/org/freedesktop/systemd1/job/8"
SYSTEMD = DBusAddress(
    "/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager"
)
ERROR = "org.freedesktop.DBus.Error."
STEPS = ("Hello", "AddMatch", "Subscribe", "StartTransientUnit")


class Bus:
    """A bus with systemd on it, for one client; tests replace what it answers by method."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.move_to("/user.slice/session-1.scope")
        self.path = folder / "bus"
        self.calls: list[tuple[str, Any]] = []
        self.greeting = b"OK 0123456789abcdef\r\n"
        self.answers: dict[str, Callable[[Message], list[Message] | None]] = {}
        self.result = "done"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def manager(self, *before: str) -> Systemd:
        return Systemd("user bus", (*before, f"unix:path={self.path}"), "app.slice", "log in")

    def enter(self, *, timeout_s: float = 5.0) -> str:
        return enter_scope(self.manager(), proc=self.proc, timeout_s=timeout_s)

    def move_to(self, path: str) -> None:
        (self.proc / "self/cgroup").write_text(f"1:name=systemd:/x\n0::{path}\n")

    def _serve(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        with client:
            try:
                self._talk(client)
            except (ConnectionError, BrokenPipeError):
                pass

    def _talk(self, client: socket.socket) -> None:
        line = self._line(client)
        assert line == b"\0AUTH EXTERNAL %b" % str(os.geteuid()).encode().hex().encode()
        client.sendall(self.greeting)
        assert self._line(client) == b"BEGIN"
        parser, serial = Parser(), 100
        while data := client.recv(4096):
            for message in parser.feed(data):
                answers = self._answer(message)
                if answers is None:
                    return
                for answer in answers:
                    serial += 1
                    client.sendall(answer.serialise(serial=serial))

    def _line(self, client: socket.socket) -> bytes:
        text = b""
        while not text.endswith(b"\r\n"):
            data = client.recv(1)
            if not data:
                raise ConnectionResetError
            text += data
        return text[:-2]

    def _answer(self, message: Message) -> list[Message] | None:
        method = message.header.fields[HeaderFields.member]
        self.calls.append((method, message.body))
        default: Callable[[Message], list[Message]] = {
            "Hello": lambda m: [new_method_return(m, "s", (":1.7",))],
            "StartTransientUnit": self.start,
        }.get(method, lambda m: [new_method_return(m)])
        return self.answers.get(method, default)(message)

    def start(self, message: Message) -> list[Message]:
        unit = message.body[0]
        self.move_to(f"/user.slice/user@1000.service/app.slice/{unit}")
        return [
            removed(OTHER_JOB, "other.service", "failed"),
            new_method_return(message, "o", (JOB,)),
            new_signal(SYSTEMD, "UnitNew", "so", (unit, "/x")),
            removed(JOB, unit, self.result),
        ]

    def properties(self) -> dict[str, tuple[str, object]]:
        """Give those of the last request."""
        return dict(next(body[2] for name, body in reversed(self.calls) if name == STEPS[-1]))


def removed(job: str, unit: str, result: str) -> Message:
    return new_signal(SYSTEMD, "JobRemoved", "uoss", (int(job[-1]), job, unit, result))


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    found = Bus(tmp_path)
    yield found
    found.close()


def refuse(name: str, text: str = "no") -> Callable[[Message], list[Message]]:
    return lambda message: [new_error(message, name, "s", (text,))]


# --- what is asked for ----------------------------------------------------------------------


def test_scope_is_made_and_named_after_the_process(bus: Bus) -> None:
    unit = bus.enter()
    assert scope.UNIT_NAME.fullmatch(unit)
    assert unit.startswith(f"sandbox-kernel-{os.getpid()}-")
    name, mode, _, auxiliary = bus.calls[-1][1]
    assert (name, mode, auxiliary) == (unit, "fail", [])
    assert bus.properties() == {
        "PIDs": ("au", [0]),
        "Delegate": ("b", True),
        "Description": ("s", "Jupyter kernel in a sandbox"),
        "Slice": ("s", "app.slice"),
        "CollectMode": ("s", "inactive-or-failed"),
        "TasksMax": ("t", 2**64 - 1),
    }


def test_it_listens_before_it_asks(bus: Bus) -> None:
    bus.enter()
    assert [name for name, _ in bus.calls] == list(STEPS)
    assert "member='JobRemoved'" in bus.calls[1][1][0]


@pytest.mark.parametrize("name", ["PropertyReadOnly", "UnknownProperty", "InvalidArgs"])
def test_older_systemd_is_asked_for_less(bus: Bus, name: str) -> None:
    def answer(message: Message) -> list[Message]:
        if len(message.body[2]) == 6:
            return refuse(ERROR + name)(message)
        return bus.start(message)

    bus.answers["StartTransientUnit"] = answer
    bus.enter()
    assert set(bus.properties()) == {"PIDs", "Delegate", "Description", "Slice"}


def test_end_of_the_job_may_come_before_the_answer(bus: Bus) -> None:
    def answer(message: Message) -> list[Message]:
        other, reply, unit_new, end = bus.start(message)
        return [end, other, unit_new, reply]

    bus.answers["StartTransientUnit"] = answer
    assert bus.enter()


def test_next_address_is_tried_when_nobody_listens_at_the_first(bus: Bus, tmp_path: Path) -> None:
    manager = bus.manager("tcp:host=localhost,port=1", f"unix:path={tmp_path}/none")
    assert enter_scope(manager, proc=bus.proc)


# --- whom it is asked -----------------------------------------------------------------------


def test_root_asks_the_system() -> None:
    manager = find_systemd(uid=0, environ={"DBUS_SESSION_BUS_ADDRESS": "unix:path=/x"})
    assert manager.addresses == ("unix:path=/run/dbus/system_bus_socket",)
    assert (manager.bus, manager.slice_name) == ("system bus", "system.slice")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ["unix:path=/run/user/1000/bus"]),
        (
            {"XDG_RUNTIME_DIR": "/r"},
            ["unix:path=/r/bus", "unix:path=/run/user/1000/bus"],
        ),
        (
            {"DBUS_SESSION_BUS_ADDRESS": "unix:abstract=a", "XDG_RUNTIME_DIR": "/run/user/1000"},
            ["unix:abstract=a", "unix:path=/run/user/1000/bus"],
        ),
        (
            {"DBUS_SESSION_BUS_ADDRESS": "disabled", "XDG_RUNTIME_DIR": "r"},
            ["unix:path=/run/user/1000/bus"],
        ),
    ],
)
def test_addresses_of_a_user(environ: dict[str, str], expected: list[str]) -> None:
    manager = find_systemd(uid=1000, environ=environ)
    assert list(manager.addresses) == expected
    assert "enable-linger 1000" in manager.remedy


# --- what goes wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_bus_that_falls_silent(bus: Bus, step: str) -> None:
    bus.answers[step] = lambda message: []
    with pytest.raises(HostError, match=r"user bus at unix:path=.* does not answer within 0\.2 s"):
        bus.enter(timeout_s=0.2)
    assert bus.calls[-1][0] == step


def test_job_that_never_ends(bus: Bus) -> None:
    bus.answers["StartTransientUnit"] = lambda message: bus.start(message)[:-1]
    with pytest.raises(HostError, match="does not answer within"):
        bus.enter(timeout_s=0.2)


@pytest.mark.parametrize("accepts", [True, False])
def test_socket_that_is_silent_from_the_start(tmp_path: Path, accepts: bool) -> None:
    """Somebody listens; it accepts and says nothing, or its queue is full."""
    path = tmp_path / "bus"
    manager = Systemd("user bus", (f"unix:path={path}",), "app.slice", "log in")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(5 if accepts else 0)
        first.connect(str(path))
        with pytest.raises(HostError, match=r"does not answer within 0\.2 s \(look for"):
            enter_scope(manager, timeout_s=0.2)


def test_time_is_limited_by_default() -> None:
    assert scope.BUS_TIMEOUT_S == 2.0


@pytest.mark.parametrize("step", STEPS)
def test_bus_that_closes_half_way(bus: Bus, step: str) -> None:
    bus.answers[step] = lambda message: None
    with pytest.raises(HostError, match=r"no user bus can be reached: .*closed the connection"):
        bus.enter()


def test_bus_that_rejects_the_user(bus: Bus) -> None:
    bus.greeting = b"REJECTED EXTERNAL\r\n"
    with pytest.raises(HostError, match=r"no user bus can be reached: .*REJECTED.*log in"):
        bus.enter()


def test_something_else_listens_there(bus: Bus) -> None:
    bus.greeting = b"HTTP/1.1 400 Bad Request\r\n"
    with pytest.raises(HostError, match="400 Bad Request"):
        bus.enter()


class Noise(Message):
    """Bytes that are no message."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialise(self, serial: int | None = None, fds: object = None) -> bytes:
        return self._data


@pytest.mark.parametrize("data", [b"\xff" * 64, b"l" + b"\0" * 63, b"l\x02\0\x01" + b"\x01" * 60])
def test_answer_that_is_no_message(bus: Bus, data: bytes) -> None:
    bus.answers["AddMatch"] = lambda message: [Noise(data)]
    with pytest.raises(HostError, match=r"does not speak D-Bus|does not answer"):
        bus.enter(timeout_s=0.5)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    manager = Systemd(
        "user bus",
        (f"unix:path={tmp_path}/dead", f"unix:path={tmp_path}/none", "nonsense"),
        "app.slice",
        "log in anew",
    )
    with pytest.raises(HostError) as caught:
        enter_scope(manager)
    assert "dead: Connection refused" in caught.value.message
    assert "none: No such file or directory" in caught.value.message
    assert "nonsense: " in caught.value.message
    assert caught.value.hint == "log in anew"


@pytest.mark.parametrize("name", ["ServiceUnknown", "NameHasNoOwner", "Spawn.ChildExited"])
def test_bus_without_systemd(bus: Bus, name: str) -> None:
    bus.answers["Subscribe"] = refuse(ERROR + name)
    with pytest.raises(HostError, match="no systemd is on it"):
        bus.enter()


def test_refusal_is_quoted(bus: Bus) -> None:
    bus.answers["StartTransientUnit"] = refuse(f"{ERROR}AccessDenied", "Not for you")
    with pytest.raises(HostError, match=r"refuses a scope .*: Not for you \[.*AccessDenied\]") as e:
        bus.enter()
    assert "Delegate=yes" in e.value.hint


@pytest.mark.parametrize("result", ["failed", "canceled", "timeout", "dependency"])
def test_job_that_fails(bus: Bus, result: str) -> None:
    bus.result = result
    with pytest.raises(HostError, match=f"ended as '{result}'"):
        bus.enter()


def test_done_but_not_moved(bus: Bus) -> None:
    def answer(message: Message) -> list[Message]:
        messages = bus.start(message)
        bus.move_to("/user.slice/session-1.scope")
        return messages

    bus.answers["StartTransientUnit"] = answer
    with pytest.raises(HostError, match=r"is in the cgroup /user\.slice/session-1\.scope"):
        bus.enter()


def test_jeepney_is_missing(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jeepney", None)
    with pytest.raises(HostError, match="pip install jeepney"):
        bus.enter()


def test_no_descriptor_is_left(bus: Bus) -> None:
    bus.answers["Subscribe"] = refuse(f"{ERROR}AccessDenied")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(HostError):
        bus.enter()
    bus.close = lambda: None  # type: ignore[method-assign] - closed here, to be counted
    bus._thread.join(10)
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    bus._listener.close()


@pytest.mark.programs("dbus-daemon")
def test_real_bus_that_systemd_is_not_on(tmp_path: Path) -> None:
    """As `dbus-launch` makes one for a remote desktop."""
    config = tmp_path / "bus.conf"
    config.write_text(
        f"<busconfig><listen>unix:path={tmp_path}/bus</listen><auth>EXTERNAL</auth>"
        '<policy context="default"><allow send_destination="*" eavesdrop="true"/>'
        '<allow eavesdrop="true"/><allow own="*"/></policy></busconfig>'
    )
    argv = ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as d:
        assert d.stdout is not None
        address = d.stdout.readline().strip()
        manager = Systemd("user bus", (address,), "app.slice", "log in")
        try:
            with pytest.raises(HostError, match="no systemd is on it"):
                enter_scope(manager, timeout_s=10)
        finally:
            d.kill()


# --- remedies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "parts"),
    [
        ("", ["user@1000.service'", "where a system service starts Jupyter"]),
        ("/user.slice/user@7.service/app.slice/x.scope", ["restart user@7.service'"]),
        ("/system.slice/jupyterhub.service/sub", ["edit jupyterhub.service", "Delegate=yes"]),
    ],
)
def test_remedy_for_a_controller(group: str, parts: list[str]) -> None:
    text = delegation_remedy(group, uid=1000)
    assert [part for part in parts if part not in text] == []
    assert "\n" not in text
    if "user@" in text:
        assert "/etc/systemd/system/user@.service.d/delegate.conf" in text
        assert "'Delegate=cpu cpuset io memory pids'" in text
        assert re.search(r"daemon-reload.*log in anew", text)
