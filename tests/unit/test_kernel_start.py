"""The start and the end of a kernel process, up to the first message."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox_kernel.errors import ConfigError, ImageError
from sandbox_kernel.kernel.app import SpecReader, read_settings
from tests.fakes.client import ROOT, TIMEOUT_S, fake_kernel


@pytest.fixture
def config_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(tmp_path))
    return tmp_path


def test_settings_come_from_arguments_over_files(config_dir: Path) -> None:
    (config_dir / "jupyter_sandbox_kernel_config.py").write_text(
        "c.SandboxConfig.memory = '2G'\nc.SandboxConfig.cpus = 1\n"
    )
    settings = read_settings(["--SandboxConfig.memory=512M", "--SandboxConfig.waive=seccomp"])
    assert settings.memory == "512M"
    assert settings.cpus == 1
    assert settings.waive == ["seccomp"]


def test_a_name_with_a_slip_is_no_setting(config_dir: Path) -> None:
    with pytest.raises(ConfigError, match="memry"):
        read_settings(["--SandboxConfig.memry=512M"])


def test_every_session_has_a_new_id_and_this_folder(config_dir: Path) -> None:
    reader = SpecReader(["-f", "x.json", "--SandboxConfig.memory=64M"])
    first, second = reader.read(), reader.read()
    assert first.session_id != second.session_id
    assert first.workspace == str(Path.cwd())
    assert first.ceiling.memory_bytes == 64 << 20
    assert SpecReader(["--SandboxConfig.workspace=none"]).read().workspace == ""


@pytest.mark.parametrize(
    ("argument", "error", "words"),
    [
        ("--SandboxConfig.memory=lots", ConfigError, "lots"),
        ("--SandboxConfig.memory=0", ConfigError, "memory=0"),
        ("--SandboxConfig.image=nowhere", ImageError, "nowhere"),
        ("--SandboxConfig.workspace=mine", ConfigError, "mine"),
    ],
)
def test_bad_settings_name_the_value(
    config_dir: Path, argument: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        SpecReader([argument]).read()


def test_only_what_is_needed_is_loaded() -> None:
    program = (
        "import sys, json\n"
        "from sandbox_kernel.kernel import app\n"
        "early = sorted(sys.modules)\n"
        "from sandbox_kernel.kernel.lazy import defer\n"
        "defer('jupyter_client', {'write_connection_file': 'connect'}); defer('IPython')\n"
        "import sandbox_kernel.kernel.host\n"
        "print(json.dumps([early, sorted(sys.modules)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=60
    )
    early, late = json.loads(done.stdout)
    assert not {"zmq", "tornado", "asyncio", "ipykernel", "IPython"} & set(early)
    assert "IPython.core.interactiveshell" not in late
    assert "jupyter_client.manager" not in late
    assert "matplotlib_inline" not in late


def test_a_deferred_package_is_whole_when_asked() -> None:
    program = (
        "from sandbox_kernel.kernel.lazy import defer\n"
        "defer('jupyter_client', {'write_connection_file': 'connect'})\n"
        "defer('no_such_package_at_all')\n"
        "import sys, jupyter_client.session\n"
        "assert 'jupyter_client.manager' not in sys.modules\n"
        "from jupyter_client import write_connection_file, localinterfaces\n"
        "assert 'jupyter_client.manager' not in sys.modules\n"
        "from jupyter_client import KernelManager\n"
        "assert KernelManager.__module__ == 'jupyter_client.manager'\n"
        "import jupyter_client.session as again\n"
        "assert jupyter_client.session is again and jupyter_client.__version__\n"
        "assert not hasattr(jupyter_client, 'no_such_name')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


def test_a_kernel_without_a_file_writes_one_and_removes_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.session", "-f", str(path)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env={**os.environ, "JPY_PARENT_PID": "0"},
    )
    assert process.stderr is not None
    line = process.stderr.readline().decode()
    assert str(path) in line
    assert json.loads(path.read_text())["shell_port"] > 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=TIMEOUT_S) == 0
    process.stderr.close()
    assert not path.exists()


def test_sigterm_ends_the_kernel_cleanly() -> None:
    with fake_kernel() as kernel:
        msg_id = kernel.kc.execute("wait")
        kernel.await_iopub(msg_id, "execute_input")
        provisioner = kernel.manager.provisioner
        assert provisioner is not None
        provisioner.process.terminate()
        assert provisioner.process.wait(timeout=TIMEOUT_S) == 0


@pytest.mark.parametrize("wrapped", [False, True], ids=["direct", "behind a wrapper"])
def test_the_kernel_ends_with_its_client(tmp_path: Path, wrapped: bool) -> None:
    """Start a client that starts a kernel, kill the client, and wait for the kernel's end."""
    program = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-m', 'tests.fakes.session', '-f', sys.argv[1]]\n"
        "if sys.argv[2] == 'True':\n"
        "    command = ['sh', '-c', '\"$@\"; exit', 'sh', *command]\n"
        "env = {**os.environ, 'JPY_PARENT_PID': str(os.getpid())}\n"
        "subprocess.Popen(command, stderr=1, env=env).wait()\n"
    )
    path = tmp_path / "c.json"
    client = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(wrapped)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    assert client.stdout is not None
    assert client.stdout.readline()
    client.kill()
    client.wait()
    # The kernel holds the other end of the pipe, which ends when the kernel does.
    try:
        assert _ends(client.stdout.fileno(), within_s=3.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(client.pid, signal.SIGKILL)
        client.stdout.close()


def _ends(fd: int, *, within_s: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLHUP | select.POLLIN)
    while poller.poll(within_s * 1000):
        if not os.read(fd, 4096):
            return True
    return False
