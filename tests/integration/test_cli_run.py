"""`sandbox-kernel run` with real kernels: outputs, figures, exit status, interrupts, no traces."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import v4

ROOT = str(Path(__file__).parents[2])
COMMAND = [sys.executable, "-m", "sandbox_kernel", "run"]
TIMEOUT_S = 60.0

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.needs("kernel")]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ROOT, **more}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(),
    )


def save(path: Path, *sources: str) -> Path:
    cells = [v4.new_code_cell(source) for source in sources]
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path


def test_a_notebook_runs_and_is_kept(tmp_path: Path) -> None:
    file = save(tmp_path / "in.ipynb", "x = 41\nprint('hello')", "x + 1", "import os; os.getcwd()")
    out = tmp_path / "out.ipynb"
    done = run(file, "-o", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hello\n42\n'/workspace'\n"
    assert [line[:5] for line in done.stderr.splitlines()] == ["[1/3]", "[2/3]", "[3/3]"]
    notebook = nbformat.read(out, as_version=4)
    nbformat.validate(notebook)
    first, second, _ = notebook.cells
    assert first.outputs[0].text == "hello\n"
    assert second.outputs[0].data["text/plain"] == "42"
    assert second.execution_count == 2
    assert second.metadata["sandbox"]["outcome"] == "ok"
    assert notebook.metadata.language_info.name == "python"
    assert nbformat.read(file, as_version=4).cells[0].outputs == []


def test_the_first_failure_ends_it(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("# %%\nx = 1\n# %%\n1/0\n# %%\nprint('never')\n")
    out = tmp_path / "out.ipynb"
    done = run(file, "-o", out)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "ZeroDivisionError" in done.stderr
    assert "not run: 1" in done.stderr
    cells = nbformat.read(out, as_version=4).cells
    assert [len(cell.outputs) for cell in cells] == [0, 1, 0]


def test_errors_may_be_allowed_for_all_cells_or_one(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text('# %%\n1/0\n# %%\nprint("on")\n')
    done = run(file, "--allow-errors")
    assert (done.returncode, done.stdout) == (1, "on\n")
    file.write_text('# %% tags=["raises-exception"]\n1/0\n# %%\nprint("on")\n')
    done = run(file)
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_a_limit_and_its_outcome_in_json(tmp_path: Path) -> None:
    file = save(tmp_path / "a.ipynb", "x = 1; print(x)", "b = bytearray(300 << 20)", "x")
    done = run(file, "--memory", "128M", "--allow-errors", "--json")
    assert done.returncode == 1
    content = json.loads(done.stdout)
    assert content["ok"] is False
    assert [cell["outcome"] for cell in content["cells"]] == ["ok", "memory", "ok"]
    assert content["cells"][1]["ename"] == "MemoryLimitExceeded"
    assert content["cells"][1]["sandbox"]["committed"] is False
    assert content["cells"][0]["outputs"][0]["text"] == "1\n"
    assert content["cells"][0]["sandbox"]["limits"]["memory_bytes"] == 128 << 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone.py"], "there is no file gone.py"),
        (["a.py", "-o", "no/out.ipynb"], "cannot write no/out.ipynb"),
        (["a.py", "--memory", "lots"], "lots"),
        (["a.py", "--image", "nope"], "nope"),
        (["a.py", "--frobnicate"], "--frobnicate"),
        ([], "FILE"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    tmp_path: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text("print('ran')")
    done = run(*arguments)
    assert done.returncode in ((1,) if "--image" in arguments else (2,))
    assert done.stdout == ""
    assert words in done.stderr
    assert os.listdir() == ["a.py"]


def test_modules_of_the_folder_do_not_reach_the_kernel_process(tmp_path: Path) -> None:
    trap = "import pathlib; pathlib.Path(__file__).with_name('sprung').touch()"
    for name in ("json.py", "zmq.py", "sandbox_kernel.py"):
        (tmp_path / name).write_text(trap)
    (tmp_path / "a.py").write_text("print('fine')")
    run(tmp_path / "a.py")
    assert not (tmp_path / "sprung").exists()


class Running:
    """A run in the background, which can be watched and signalled."""

    def __init__(self, file: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [*COMMAND, str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(RUN_MARK=self.mark),
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

    def kernel_pid(self) -> int:
        return next(pid for pid in marked(self.mark) if pid != self.process.pid)

    def end(self) -> int:
        rest, _ = self.process.communicate(timeout=TIMEOUT_S)
        self.text += rest.decode()
        return self.process.returncode


def marked(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def cgroups_of(pid: int) -> list[Path]:
    return list(Path("/sys/fs/cgroup").rglob(f"sandbox-kernel-{pid}-*"))


def within(seconds: float, holds: Callable[[], Any]) -> bool:
    deadline_s = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def no_trace(running: Running, kernel_pid: int) -> bool:
    return not marked(running.mark) and not cgroups_of(kernel_pid)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    file = tmp_path / "a.py"
    file.write_text("print('begun')\nwhile True: pass\n")
    return file


def test_ctrl_c_interrupts_the_cell(endless: Path) -> None:
    running = Running(endless)
    running.wait_for("begun")
    pid = running.kernel_pid()
    assert cgroups_of(pid)
    os.kill(running.process.pid, signal.SIGINT)
    assert running.end() == 1
    assert "KeyboardInterrupt" in running.text
    assert "interrupted" in running.text
    assert within(2, lambda: no_trace(running, pid))


def test_a_second_ctrl_c_ends_the_run(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "import signal\nsignal.signal(signal.SIGINT, lambda *_: print('deaf', flush=True))\n"
        "print('begun', flush=True)\nwhile True: pass\n"
    )
    running = Running(file)
    running.wait_for("begun")
    pid = running.kernel_pid()
    os.kill(running.process.pid, signal.SIGINT)
    running.wait_for("deaf")
    os.kill(running.process.pid, signal.SIGINT)
    assert running.end() == 1
    assert "Error: interrupted" in running.text
    assert "Traceback" not in running.text
    assert within(2, lambda: no_trace(running, pid))


def test_sigterm_ends_the_run(endless: Path) -> None:
    running = Running(endless)
    running.wait_for("begun")
    pid = running.kernel_pid()
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.end() == 1
    assert within(2, lambda: no_trace(running, pid))


def test_a_kernel_that_is_killed_is_told(endless: Path) -> None:
    running = Running(endless)
    running.wait_for("begun")
    pid = running.kernel_pid()
    os.kill(pid, signal.SIGKILL)
    assert running.end() == 1
    assert "the kernel ended" in running.text
    assert within(2, lambda: no_trace(running, pid))


def test_a_run_that_is_killed_leaves_nothing(endless: Path) -> None:
    running = Running(endless)
    running.wait_for("begun")
    pid = running.kernel_pid()
    running.process.kill()
    assert running.end() == -signal.SIGKILL
    assert within(5, lambda: no_trace(running, pid))
