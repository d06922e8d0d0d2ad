"""`sandbox-kernel install`: what it writes, and what it refuses without writing anything."""

from __future__ import annotations

import errno
import json
import sys
import types
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager

from sandbox_kernel import __main__ as entry
from sandbox_kernel.cli import main as cli
from sandbox_kernel.cli.install import template_dir, unwritable

LOGOS = {"logo-32x32.png", "logo-64x64.png", "logo-svg.svg"}


@pytest.fixture(autouse=True)
def no_images(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Know the image `host` only, whatever is in this machine's store."""
    monkeypatch.setenv("SANDBOX_KERNEL_STORE", str(tmp_path_factory.mktemp("store")))


def install(prefix: Path, *options: str) -> int:
    return entry.main(["install", "--prefix", str(prefix), *options])


def kernels(prefix: Path) -> Path:
    return prefix / "share" / "jupyter" / "kernels"


def test_the_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install(tmp_path) == 0
    folder = kernels(tmp_path) / "sandbox-python"
    assert str(folder) in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == LOGOS | {"kernel.json"}
    spec = json.loads((folder / "kernel.json").read_text())
    assert spec == {
        "argv": [sys.executable, "-P", "-m", "sandbox_kernel", "-f", "{connection_file}"],
        "display_name": "Python 3 (sandboxed)",
        "language": "python",
        "interrupt_mode": "message",
        "metadata": {
            "debugger": False,
            "sandbox_kernel": {
                "image": "host",
                "workspace": "overlay",
                "limits": {
                    "memory": "1 GiB",
                    "cpus": "2",
                    "cpu_time": "5 min",
                    "wall_time": "5 min",
                    "processes": "128",
                    "disk": "512 MiB",
                    "output": "10 MiB",
                    "open_files": "1024",
                    "io": "none",
                },
            },
        },
    }


def test_every_option_arrives(tmp_path: Path) -> None:
    options = (
        "--name Small-1 --memory 512M --cpus 1 --cpu-time 1m --wall-time 90s --processes 64 "
        "--disk 64M --output 1M --open-files 256 --image host --workspace ro --grace 500ms "
        "--waive cpus --waive processes --ceiling memory=1G --ceiling disk=1G"
    ).split()
    assert install(tmp_path, *options, "--display-name", "Kleiner Kern ü") == 0
    spec = json.loads((kernels(tmp_path) / "small-1" / "kernel.json").read_text("utf-8"))
    assert spec["display_name"] == "Kleiner Kern ü"
    assert set(spec["argv"][6:]) == {
        "--SandboxConfig.memory=512M",
        "--SandboxConfig.cpus=1",
        "--SandboxConfig.cpu_time=1m",
        "--SandboxConfig.wall_time=90s",
        "--SandboxConfig.processes=64",
        "--SandboxConfig.disk=64M",
        "--SandboxConfig.output=1M",
        "--SandboxConfig.open_files=256",
        "--SandboxConfig.workspace=ro",
        "--SandboxConfig.grace=500ms",
        "--SandboxConfig.waive=cpus",
        "--SandboxConfig.waive=processes",
        "--SandboxConfig.ceiling=memory=1G",
        "--SandboxConfig.ceiling=disk=1G",
    }
    assert spec["metadata"]["sandbox_kernel"]["limits"]["memory"] == "512 MiB"


def test_an_old_kernelspec_is_replaced(tmp_path: Path) -> None:
    assert install(tmp_path, "--memory", "512M") == 0
    assert install(tmp_path, "--memory", "256M") == 0
    spec = json.loads((kernels(tmp_path) / "sandbox-python" / "kernel.json").read_text())
    assert spec["argv"][6:] == ["--SandboxConfig.memory=256M"]


def test_jupyter_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert install(tmp_path) == 0
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    spec = KernelSpecManager().get_kernel_spec("sandbox-python")
    assert spec.interrupt_mode == "message"
    assert spec.language == "python"


def test_user_and_sys_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    assert entry.main(["install", "--user"]) == 0
    assert (tmp_path / "data" / "kernels" / "sandbox-python" / "kernel.json").is_file()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    assert entry.main(["install", "--sys-prefix"]) == 0
    assert (kernels(tmp_path / "env") / "sandbox-python" / "kernel.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "512X"], ["512X", "512M"]),
        (["--memory", "0"], ["memory=0", "16 MiB"]),
        (["--cpus", "-1"], ["cpus", "-1"]),
        (["--processes", "1.5"], ["processes", "1.5", "whole"]),
        (["--wall-time", "soon"], ["wall_time", "soon"]),
        (["--workspace", "rx"], ["rx", "overlay"]),
        (["--grace", "x"], ["grace", "'x'"]),
        (["--waive", "all"], ["'all'", "processes"]),
        (["--name", "a/b"], ["a/b", "letters"]),
        (["--name", ".."], ["..", "letters"]),
        (["--user"], ["exclude"]),
        (["--memry", "1G"], ["--memry", "--memory"]),
        (["surprise"], ["surprise"]),
    ],
)
def test_a_bad_value_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert install(tmp_path, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert "Hint: " in captured.err
    assert all(word in captured.err for word in words), captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install(tmp_path, "--image", "debian:12") == 1
    error = capsys.readouterr().err
    assert "'debian:12'" in error
    assert "image list" in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert install(tmp_path / "file") == 1
    error = capsys.readouterr().err
    assert str(kernels(tmp_path / "file")) in error
    assert "--user" in error


def test_a_half_written_kernelspec_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, source_dir: str, **_: object) -> None:
        (kernels(tmp_path) / "sandbox-python").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(KernelSpecManager, "install_kernel_spec", full)
    assert install(tmp_path) == 1
    assert list(kernels(tmp_path).iterdir()) == []


def test_the_hint_fits_the_folder() -> None:
    error = PermissionError(errno.EACCES, "Permission denied")
    shared = unwritable(Path("/usr/local/share"), error, shared=True)
    assert shared.message == "cannot write /usr/local/share: Permission denied"
    assert "--user" in shared.hint
    assert "sudo" in shared.hint
    assert "sudo" not in unwritable(Path("/x"), error, shared=False).hint


def test_the_template_has_all() -> None:
    assert {path.name for path in template_dir().iterdir()} == LOGOS | {"kernel.json"}
    for name, side in (("logo-32x32.png", 32), ("logo-64x64.png", 64)):
        header = (template_dir() / name).read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert header[16:24] == side.to_bytes(4, "big") * 2


def test_a_connection_file_starts_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    module = types.ModuleType("sandbox_kernel.kernel.app")
    module.launch = started.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sandbox_kernel.kernel.app", module)
    assert entry.main(["-f", "k.json", "--SandboxConfig.memory=1G"]) == 0
    assert started == [["-f", "k.json", "--SandboxConfig.memory=1G"]]


@pytest.mark.parametrize("command", [["frobnicate"], ["--frobnicate"]])
def test_an_unknown_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(command) == 2
    assert "frobnicate" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--version"]) == 0
    assert cli.version() in capsys.readouterr().out
