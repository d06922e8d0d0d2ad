"""What is wrong with the settings or the folder is said in the notebook, and leaves nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from tests.kernel import live
from tests.kernel.live import Live
from tests.kernel.traces import Traces

pytestmark = [pytest.mark.kernel, pytest.mark.needs("kernel")]

Start = Callable[..., Live]


def refused(kernel: Live, ename: str, *words: str) -> str:
    """Assert that cells end with one error that has these words, time and again."""
    for _ in range(2):
        ran = kernel.run("print('ran')")
        (error,) = ran.of("error")
        assert error["ename"] == ran.content["ename"] == ename, ran.said()
        assert ran.text() == ""
        for word in words:
            assert word in error["evalue"]
    Traces.of(kernel.pid).assert_gone()
    return error["evalue"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"memory": "lots"}, ["memory", "lots", "512M"]),
        ({"memory": "0"}, ["memory=0", "16 MiB"]),
        ({"memory": "-1G"}, ["-1G"]),
        ({"cpus": "many"}, ["cpus", "many"]),
        ({"wall_time": "5 parsecs"}, ["wall_time", "5 parsecs"]),
        ({"processes": "1.5"}, ["processes", "1.5"]),
        ({"memroy": "1G"}, ["memroy", "memory"]),
        ({"workspace": "sideways"}, ["sideways", "overlay"]),
        ({"grace": "soon"}, ["grace", "soon"]),
        ({"ceiling": "memory=64M"}, ["ceiling", "memory=64M"]),
        ({"waive": "seccomp"}, ["seccomp"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_setting(start: Start, values: dict[str, str], words: list[str]) -> None:
    kernel = start(**values)
    refused(kernel, "ConfigError", *words)


def test_an_unknown_image(start: Start) -> None:
    refused(start(image="no/such:image"), "ImageError", "no/such:image", "image list")


def test_more_open_files_than_the_host_allows(start: Start) -> None:
    refused(start(open_files=1 << 20), "HostError", "open_files", "limit")


def test_other_requests_are_answered_all_the_same(start: Start) -> None:
    kernel = start(memory="lots")
    assert kernel.ask("kernel_info_request")["status"] == "ok"
    assert kernel.ask("complete_request", {"code": "zi", "cursor_pos": 2})["matches"] == []
    inspected = kernel.ask("inspect_request", {"code": "zip", "cursor_pos": 3, "detail_level": 0})
    assert inspected["found"] is False
    assert kernel.ask("comm_info_request")["comms"] == {}
    assert kernel.ask("usage_request", channel="control")["kernel_memory"] == 0
    assert kernel.ask("interrupt_request", channel="control") == {"status": "ok"}
    content = {"comm_id": "x", "target_name": "y", "data": {}}
    kernel.served(kernel.tell("comm_open", content))
    assert kernel.run("%sandbox").content["ename"] == "ConfigError"


def test_a_configuration_file(start: Start, jupyter: Path) -> None:
    file = jupyter / "config" / "jupyter_sandbox_kernel_config.json"
    file.parent.mkdir(exist_ok=True)
    try:
        file.write_text(json.dumps({"SandboxConfig": {"memory": "96M", "wall_time": "9s"}}))
        limits = start(wall_time="8s").ok("pass").figures["limits"]
        assert (limits["memory_bytes"], limits["wall_time_s"]) == (96 << 20, 8)
        file.write_text("{broken")
        refused(start(), "ConfigError", file.stem)
    finally:
        file.unlink()


def test_a_bad_setting_that_is_put_right_works_at_the_next_cell(
    start: Start, jupyter: Path
) -> None:
    file = jupyter / "config" / "jupyter_sandbox_kernel_config.json"
    file.parent.mkdir(exist_ok=True)
    try:
        file.write_text(json.dumps({"SandboxConfig": {"memory": "lots"}}))
        kernel = start()
        refused(kernel, "ConfigError", "lots")
        file.write_text(json.dumps({"SandboxConfig": {"memory": "96M"}}))
        assert kernel.ok("pass").figures["limits"]["memory_bytes"] == 96 << 20
    finally:
        file.unlink()


def test_the_ceiling(start: Start) -> None:
    kernel = start("--SandboxConfig.ceiling=memory=2G", memory="128M")
    assert kernel.ok("%%sandbox memory=2G\nb = bytearray(300 << 20); del b").status == "ok"
    assert kernel.run("%%sandbox memory=3G\n1").content["ename"] == "ConfigError"
    assert kernel.run("b = bytearray(300 << 20)").content["ename"] == "MemoryLimitExceeded"


@pytest.mark.parametrize("folder", ["/proc", "/sys"])
def test_a_folder_that_cannot_be_shown(start: Start, folder: str) -> None:
    refused(start(cwd=Path(folder)), "LaunchError", folder)


def test_a_folder_that_is_gone(start: Start, jupyter: Path, tmp_path: Path) -> None:
    """Start the kernel in a folder that is removed before it looks."""
    spec = json.loads((jupyter / "path" / "kernels" / live.NAME / "kernel.json").read_text())
    script = 'rmdir "$PWD" && exec "$@"'
    spec["argv"] = ["sh", "-c", script, "sh", sys.executable, *spec["argv"][1:]]
    folder = tmp_path / "path" / "kernels" / live.NAME
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    gone = tmp_path / "gone"
    gone.mkdir()
    with mock.patch.dict("os.environ", {"JUPYTER_PATH": str(tmp_path / "path")}):
        kernel = start(cwd=gone)
    ran = kernel.run("print('ran')")
    (error,) = ran.of("error")
    assert error["ename"] in ("ConfigError", "LaunchError"), ran.said()
    assert "folder" in error["evalue"]
    Traces.of(kernel.pid).assert_gone()


def test_without_a_folder(start: Start) -> None:
    kernel = start(cwd=Path("/proc"), workspace="none")
    assert kernel.value("__import__('os').getcwd()") == "'/home/jovyan'"


@pytest.mark.parametrize(
    ("mode", "seen", "written"), [("overlay", True, False), ("ro", True, False), ("rw", True, True)]
)
def test_the_modes_of_the_folder(
    start: Start, tmp_path: Path, mode: str, seen: bool, written: bool
) -> None:
    (tmp_path / "given").write_text("text")
    kernel = start(workspace=mode)
    assert kernel.value("open('given').read()") == "'text'"
    ran = kernel.run("open('made', 'w').write('x')")
    assert (ran.status == "ok") is (mode != "ro")
    assert (tmp_path / "made").exists() is written


def test_a_read_only_folder_can_be_worked_in(start: Start, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        assert start().ok("open('made', 'w').write('x')").status == "ok"
        assert not (tmp_path / "made").exists()
    finally:
        tmp_path.chmod(0o755)
