"""The VM lane's own parts: what it makes of reports, of answers, and of an image half built."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm import image, lane, port

PASSED = '<testcase classname="a" name="well"/>'
FAILED = '<testcase classname="a" name="bad"><failure message="no"/></testcase>'
BROKEN = '<testcase classname="a" name="broken"><error message="no"/></testcase>'
SKIPPED = '<testcase classname="a" name="left"><skipped message="no cgroups here"/></testcase>'

REPORTS = {
    "all is well": (PASSED, (1, 0, 0), []),
    "a failure": (PASSED + FAILED, (1, 1, 0), ["1 failed"]),
    "an error": (PASSED + BROKEN, (1, 1, 0), ["1 failed"]),
    "a skip": (PASSED + SKIPPED, (1, 0, 1), ["a::left was skipped: no cgroups here"]),
    "nothing": ("", (0, 0, 0), ["no test has run"]),
}


def junit(cases: str) -> str:
    return f"<testsuites><testsuite>{cases}</testsuite></testsuites>"


@pytest.mark.parametrize(("cases", "counts", "faults"), REPORTS.values(), ids=REPORTS)
def test_a_report(cases: str, counts: tuple[int, int, int], faults: list[str]) -> None:
    report = lane.read_junit(junit(cases), lane.Suite("u", ()))
    assert (report.passed, report.failed, report.skipped) == counts
    assert report.faults == faults


def test_a_skip_with_a_right_to_be_is_no_fault() -> None:
    suite = lane.Suite("u", (), may_skip=("^no cgroups",))
    assert lane.read_junit(junit(PASSED + SKIPPED), suite).faults == []


def test_skips_alone_prove_nothing() -> None:
    suite = lane.Suite("u", (), may_skip=("^no cgroups",))
    assert lane.read_junit(junit(SKIPPED), suite).faults == ["no test has run"]


@pytest.mark.parametrize("text", ["", "<testsuites>", "cat: no such file"])
def test_no_report_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no report"):
        lane.read_junit(text, lane.Suite("u", ()))


NAMED = sorted({name for suite in lane.SUITES for name in (*suite.tests, *suite.without)})


@pytest.mark.parametrize("name", NAMED)
def test_what_a_suite_names_is_there(name: str) -> None:
    path, _, test = name.partition("::")
    assert (image.ROOT / path).exists()
    if test:
        text = (image.ROOT / path).read_text("utf-8")
        assert f"def {test.partition('[')[0]}(" in text


def test_all_that_is_inside_runs() -> None:
    """The names there keep pytest from collecting them anywhere else."""
    inside = image.ROOT / "tests/vm/inside"
    found = {path.name for path in inside.glob("*.py") if "def test_" in path.read_text("utf-8")}
    named = {Path(name).name for suite in lane.SUITES for name in suite.tests}
    assert found
    assert found <= named


Guest = Callable[[socket.socket, dict[str, Any]], None]


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Callable[[Guest], Path]]:
    """Answer one job at port 0 in the place of a guest."""
    with socket.socket(socket.AF_UNIX) as listening:
        threads: list[threading.Thread] = []

        def begin(act: Guest) -> Path:
            listening.bind(str(tmp_path / "port0"))
            listening.listen()

            def serve() -> None:
                link, _ = listening.accept()
                with link, link.makefile("rb") as lines:
                    assert lines.readline() == b"\n"
                    act(link, json.loads(lines.readline()))

            threads.append(threading.Thread(target=serve))
            threads[0].start()
            return tmp_path

        yield begin
        for thread in threads:
            thread.join()


def say(link: socket.socket, *messages: dict[str, Any]) -> None:
    for message in messages:
        link.sendall(json.dumps(message).encode() + b"\n")


def as_data(text: bytes) -> str:
    return base64.b64encode(text).decode()


def test_a_job_and_its_answer(guest: Callable[[Guest], Path]) -> None:
    asked: dict[str, Any] = {}

    def act(link: socket.socket, request: dict[str, Any]) -> None:
        asked.update(request)
        link.sendall(b'the rest of an answer cut sh"}\n')
        say(link, {"id": "another", "status": 9, "timed_out": False})
        say(link, {"id": request["id"], "stream": "stdout", "data": as_data(b"out")})
        say(link, {"id": request["id"], "stream": "stderr", "data": as_data(b"err")})
        say(link, {"id": request["id"], "status": 3, "timed_out": False})

    job = port.Job("plain", ("id", "-u"), env={"A": "b"}, cwd="/", stdin=b"\x00", timeout_s=30)
    ended = port.run(guest(act), job)
    assert (ended.status, ended.stdout, ended.stderr) == (3, b"out", b"err")
    assert asked.pop("id")
    assert asked == {
        "user": "plain",
        "argv": ["id", "-u"],
        "env": {"A": "b"},
        "cwd": "/",
        "stdin": as_data(b"\x00"),
        "timeout_s": 30,
    }


def test_a_guest_that_ends_is_named(guest: Callable[[Guest], Path]) -> None:
    folder = guest(lambda link, _: None)
    with pytest.raises(port.GuestError, match="ended while it ran"):
        port.run(folder, port.Job("root", ("true",), timeout_s=30))


def test_a_guest_that_says_nothing_is_not_waited_for(
    guest: Callable[[Guest], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(port, "GRACE_S", 0.01)
    folder = guest(lambda link, _: link.recv(1) and None)
    with pytest.raises(port.GuestError, match="does not answer in time"):
        port.run(folder, port.Job("root", ("true",), timeout_s=0))


def test_no_guest_is_named(tmp_path: Path) -> None:
    with pytest.raises(port.GuestError, match="no guest listens at"):
        port.run(tmp_path, port.Job("root", ("true",)))


def test_an_image_is_taken_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (image.cache_folder() / "building-by-one-that-was-killed").mkdir(parents=True)
    built: list[Path] = []

    def build(target: Path, tell: image.Tell) -> None:
        (target / "disk.ext4").write_text("half")
        built.append(target)
        if len(built) == 1:
            raise image.ImageError("mmdebstrap ended with 1")

    monkeypatch.setattr(image, "_build", build)
    said: list[str] = []
    with pytest.raises(image.ImageError):
        image.ensure(said.append)
    assert sorted(path.name for path in image.cache_folder().iterdir()) == ["lock"]
    first = image.ensure(said.append)
    assert first == image.ensure(said.append)
    assert len(built) == 2
    assert said == [f"image {first.folder.name}: from the cache"]


def test_an_image_is_known_by_what_goes_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = image.content_key()
    for path in image.GUEST.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(image, "GUEST", tmp_path)
    assert image.content_key() == before
    (tmp_path / "agent.py").write_text("another")
    assert image.content_key() != before
    monkeypatch.undo()
    monkeypatch.setattr(image, "requirements", lambda: ["click"])
    assert image.content_key() != before


def test_the_guest_gets_what_the_project_needs() -> None:
    wanted = image.requirements()
    assert any(line.startswith("ipykernel") for line in wanted)
    names = {line.split(">")[0] for line in wanted}
    assert set(image.TEST_DEPENDENCIES) <= names
