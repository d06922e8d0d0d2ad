"""`sandbox-kernel image build` in a process of its own: real steps, interrupts, a kernel of one."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox_kernel.image.documents import Platform, digest_of
from tests.fakes.registry import FakeImage, FakeRegistry, Handler, layer
from tests.integration import leaks

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-P", "-m", "sandbox_kernel"]
TIMEOUT_S = 60.0
TIME = r"[\d.]+ m?s"

pytestmark = [pytest.mark.slow, pytest.mark.needs("memory", "processes")]


@pytest.fixture(autouse=True)
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A context, and a store of the test's own."""
    monkeypatch.setenv("SANDBOX_KERNEL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    return folder


def write(context: Path, *lines: str) -> None:
    (context / "Dockerfile").write_text("\n".join(lines) + "\n")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT_S
    )


def matches(pattern: list[str], text: str) -> bool:
    """Tell whether each line is as it stands in a pattern, where `TIME` is a time."""
    lines = [re.escape(line).replace("TIME", TIME) for line in pattern]
    return re.fullmatch("\n".join(lines) + "\n", text) is not None


def test_plain_output_is_as_documented(context: Path) -> None:
    write(
        context,
        "FROM host",
        "RUN echo one && printf '\\033[31mred\\033[0m' >&2",
        "COPY a.txt /srv/",
        "RUN touch /srv/b",
        'CMD ["python3"]',
    )
    done = run("image", "build", "--progress", "plain", "-t", "demo", context)
    assert done.returncode == 0, done.stderr
    first = [
        "[1/5] FROM host  CACHED",
        "[2/5] RUN echo one && printf '\\033[31mred\\033[0m' >&2",
        "    one",
        "    red",
        "[2/5] done: TIME",
        "[3/5] COPY a.txt /srv/  TIME",
        "[4/5] RUN touch /srv/b  TIME",
        '[5/5] CMD ["python3"]  CACHED',
    ]
    assert matches(first, done.stderr), done.stderr
    assert re.fullmatch(r"Built [0-9a-f]{12} as demo:latest, [\d.]+ \w+\n", done.stdout)
    (context / "a.txt").write_text("b")
    done = run("image", "build", "--progress", "plain", "--explain", "--json", context)
    second = [
        "[1/5] FROM host  CACHED",
        "[2/5] RUN echo one && printf '\\033[31mred\\033[0m' >&2  CACHED",
        "[3/5] COPY a.txt /srv/",
        "    not cached: a.txt changed",
        "[3/5] done: TIME",
        "[4/5] RUN touch /srv/b",
        "    not cached: it comes after a change: COPY a.txt /srv/",
        "[4/5] done: TIME",
        '[5/5] CMD ["python3"]  CACHED',
    ]
    assert matches(second, done.stderr), done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert [step["cached"] for step in steps] == [True, True, False, False, True]


def test_a_step_that_fails_names_its_line(context: Path) -> None:
    write(context, "FROM host", "", "RUN echo before && \\", "  exit 3")
    done = run("image", "build", context)
    assert (done.returncode, done.stdout) == (1, "")
    assert "    before\nError: Dockerfile:3: " in done.stderr
    assert "exit code: 3\n    3 | RUN echo before && " in done.stderr
    quiet = run("image", "build", "-q", context)
    assert quiet.stderr.startswith("before\nError: Dockerfile:3: ")


def test_limits_hold_in_a_step(context: Path) -> None:
    write(context, "FROM host", "RUN python3 -c 'b = bytearray(300 << 20)'")
    done = run("image", "build", "--memory", "64M", "--disk", "16M", context)
    assert done.returncode == 1
    assert "Dockerfile:2" in done.stderr
    assert "--memory" in done.stderr
    assert "64 MiB" in done.stderr


def test_secrets_reach_a_step_and_no_layer(context: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_A", "s3cr3t-of-the-environment")
    (context / "key").write_text("s3cr3t-of-a-file")
    write(
        context,
        "FROM host",
        "RUN --mount=type=secret,id=a --mount=type=secret,id=b,target=/b "
        "cat /run/secrets/a /b | sha256sum > /sum",
    )
    secrets = ["--secret", "id=a,env=TOKEN_A", "--secret", f"id=b,src={context / 'key'}"]
    done = run("image", "build", *secrets, context)
    assert done.returncode == 0, done.stderr
    store = Path(os.environ["SANDBOX_KERNEL_STORE"])
    kept = [path for path in store.rglob("*") if path.is_file() and not path.is_symlink()]
    assert kept
    assert not [path for path in kept if b"s3cr3t" in path.read_bytes()]


class Running:
    """A command in the background, which can be watched and signalled."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "image", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.text = ""

    def wait_for(self, words: str) -> None:
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while words not in self.text:
                assert selector.select(deadline_s - time.monotonic()), self.text
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, self.text
                self.text += data.decode()

    def end(self) -> int:
        rest, _ = self.process.communicate(timeout=TIMEOUT_S)
        self.text += rest.decode()
        return self.process.returncode


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Start commands; those that a failed test has left are ended."""
    begun: list[Running] = []

    def start(*arguments: object) -> Running:
        begun.append(Running(*arguments))
        return begun[-1]

    yield start
    for one in begun:
        if one.process.poll() is None:
            one.process.terminate()
            one.end()


def left(pid: int, mark: str) -> list[object]:
    """Give what a build has left: groups, processes, and what lies in its store half done."""
    store = Path(os.environ["SANDBOX_KERNEL_STORE"])
    found: list[object] = [*leaks.session_cgroups(pid), *leaks.with_argument(mark)]
    for name in ("staging", "leases"):
        found += (store / name).iterdir()
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupt_in_a_step_leaves_nothing(
    context: Path, number: signal.Signals, start: Callable[..., Running]
) -> None:
    mark = f"9{os.getpid()}{number}"
    write(context, "FROM host", "RUN touch /kept", f"RUN echo begun; sleep {mark}")
    before = leaks.Snapshot()
    running = start("build", context)
    running.wait_for("    begun")
    pid = running.process.pid
    assert leaks.until(lambda: bool(leaks.with_argument(mark)))
    os.kill(pid, number)
    assert running.end() == 1
    assert running.text.rstrip().endswith("Error: interrupted")
    assert "Traceback" not in running.text
    assert leaks.until(lambda: not left(pid, mark)), left(pid, mark)
    before.assert_clean()
    # The step before is cached all the same.
    again = start("build", context)
    again.wait_for("    begun")
    os.kill(again.process.pid, number)
    again.end()
    assert "[2/3] RUN touch /kept  CACHED" in again.text


def test_a_build_that_is_killed_leaves_what_the_next_takes_away(
    context: Path, start: Callable[..., Running]
) -> None:
    mark = f"9{os.getpid()}0"
    write(context, "FROM host", f"RUN echo begun; sleep {mark}")
    running = start("build", context)
    running.wait_for("    begun")
    running.process.kill()
    assert running.end() == -signal.SIGKILL
    pid = running.process.pid
    gone: Callable[[], bool] = lambda: not leaks.with_argument(mark)  # noqa: E731
    assert leaks.until(gone)
    assert run("image", "prune").returncode == 0
    write(context, "FROM host", "RUN true")
    assert run("image", "build", context).returncode == 0
    assert leaks.until(lambda: not left(pid, mark)), left(pid, mark)


def test_an_interrupt_of_a_pull_leaves_nothing(start: Callable[..., Running]) -> None:
    registry = FakeRegistry()
    asked, over = threading.Event(), threading.Event()

    def stall(handler: Handler) -> None:
        handler.begin(200, len(image.packed[0]))
        handler.wfile.write(b"begun")
        asked.set()
        over.wait(TIMEOUT_S)
        handler.hang_up()

    try:
        image = FakeImage((layer(("a", os.urandom(1000))),))
        registry.put(image)
        registry.rule("GET", f"blobs/{digest_of(image.packed[0])}", stall, 0)
        running = start("pull", f"{registry.host}/team/app:1")
        assert asked.wait(TIMEOUT_S)
        os.kill(running.process.pid, signal.SIGINT)
        assert running.end() == 1
    finally:
        over.set()
        registry.close()
    assert running.text.rstrip().endswith("Error: interrupted")
    assert left(running.process.pid, "no such argument") == []
    assert run("image", "list", "-q").stdout == ""


def test_a_base_is_pulled_for_the_platform_of_its_stage(context: Path) -> None:
    registry = FakeRegistry()
    try:
        elsewhere = Platform("linux", "s390x")
        registry.put(FakeImage((layer(("a", b"1")),), platform=elsewhere))
        name = f"{registry.host}/team/app:1"
        write(context, f"FROM --platform={elsewhere} {name}", "LABEL a=b")
        built = run("image", "build", "--json", context)
        again = run("image", "build", "--pull", "--json", context)
    finally:
        registry.close()
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["platform"] == str(elsewhere)
    assert json.loads(again.stdout)["id"] == json.loads(built.stdout)["id"]


def test_an_image_becomes_a_kernel(context: Path, tmp_path: Path) -> None:
    write(
        context,
        "FROM host",
        "RUN mkdir /opt && echo 'x = 41' > /opt/known.py",
        "ENV PYTHONPATH=/opt",
    )
    built = run("image", "build", "-q", "-t", "demo", context)
    assert built.returncode == 0, built.stderr
    done = run("install", "--prefix", tmp_path / "prefix", "--image", "demo")
    assert done.returncode == 0, done.stderr
    kernels = tmp_path / "prefix" / "share" / "jupyter" / "kernels"
    spec = json.loads((kernels / "sandbox-python" / "kernel.json").read_text())
    assert spec["argv"][-1] == "--SandboxConfig.image=demo"
    assert spec["metadata"]["sandbox_kernel"]["image"] == "demo"
    image_id = built.stdout.strip()[7:19]
    for name, words in (
        ("gone", ["'gone:latest'", "image list"]),
        (image_id, [image_id, "image tag"]),
    ):
        refused = run("install", "--prefix", tmp_path / "other", "--image", name)
        assert refused.returncode in (1, 2)
        assert all(word in refused.stderr for word in words), refused.stderr
        assert not (tmp_path / "other").exists()
