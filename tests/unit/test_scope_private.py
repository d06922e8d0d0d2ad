"""Asking for a scope where no bus runs: at the socket of systemd itself."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from jeepney import HeaderFields, Parser

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux.scope import Systemd, enter_scope, find_systemd
from tests.unit.test_scope import ERROR, Bus, refuse


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Bus]:
    """Give a manager that takes calls on its own socket; it knows nothing of buses."""
    found = Bus(tmp_path)
    for method in ("Hello", "AddMatch"):
        found.answers[method] = refuse(f"{ERROR}UnknownObject")
    yield found
    found.close()


def manager(direct: Bus, *buses: str) -> Systemd:
    return Systemd("user bus", buses, "app.slice", "log in", private=f"unix:path={direct.path}")


def test_no_bus_is_greeted_there(direct: Bus, tmp_path: Path) -> None:
    unit = enter_scope(manager(direct, f"unix:path={tmp_path}/none"), proc=direct.proc)
    assert [name for name, _ in direct.calls] == ["Subscribe", "StartTransientUnit"]
    assert direct.calls[-1][1][0] == unit


def test_nothing_can_be_read_together_with_the_end_of_the_greeting(tmp_path: Path) -> None:
    """What systemd reads behind BEGIN, in the same packet, it forgets until more comes."""
    path = tmp_path / "private"
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                heard.append(client.recv(4096))
                for part in (b"OK 0123", b"4567\r\n"):
                    client.sendall(part)
                heard.append(client.recv(4096))

        server = threading.Thread(target=serve)
        server.start()
        systemd = Systemd("user bus", (), "app.slice", "log in", private=f"unix:path={path}")
        with pytest.raises(HostError, match="closed the connection"):
            enter_scope(systemd, timeout_s=5)
        server.join()
    assert heard[0].startswith(b"\0AUTH EXTERNAL ")
    assert heard[0].endswith(b"\r\nBEGIN\r\n")
    assert Parser().feed(heard[1])[0].header.fields[HeaderFields.member] == "Subscribe"


def test_a_bus_comes_first(direct: Bus, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    bus = Bus(tmp_path / "other")
    try:
        enter_scope(manager(direct, f"unix:path={bus.path}"), proc=bus.proc)
    finally:
        bus.close()
    assert direct.calls == []


def test_a_refusal_there_is_quoted(direct: Bus) -> None:
    direct.answers["StartTransientUnit"] = refuse(f"{ERROR}AccessDenied", "Not for you")
    with pytest.raises(HostError, match=rf"refuses a scope .*{direct.path}: Not for you"):
        enter_scope(manager(direct), proc=direct.proc)


def test_one_that_is_not_there_is_not_spoken_of(tmp_path: Path) -> None:
    nowhere = Systemd("user bus", (f"unix:path={tmp_path}/bus",), "app.slice", "log in")
    with pytest.raises(HostError) as caught:
        enter_scope(replace(nowhere, private=f"unix:path={tmp_path}/private"))
    assert f"{tmp_path}/bus: No such file" in caught.value.message
    assert "private" not in caught.value.message


def test_where_it_is() -> None:
    for uid, path in ((0, "/run/systemd/private"), (1000, "/run/user/1000/systemd/private")):
        assert find_systemd(uid=uid, environ={}).private == f"unix:path={path}"
