"""Every probe that is one cell: what it sees in a container, and what it would see without."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.escape.cells import PROBES
from tests.escape.conftest import Open
from tests.escape.probe import Probe
from tests.escape.sessions import finding, finding_outside

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.escape,
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Give what the host has that a cell shall not reach, by the names that probes use."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "key.json").write_text("{}")
    (folder / "file").write_text("of the host")
    with (
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.create_server(("0.0.0.0", 0)) as service,
        pytest.MonkeyPatch.context() as patch,
    ):
        for listening, address in ((named, f"{folder}/socket"), (abstract, f"\0{folder}")):
            listening.bind(address)
            listening.listen(16)
        patch.setenv("SANDBOX_PROBE_TOKEN", "secret")
        yield {
            "SOCKET": f"{folder}/socket",
            "ABSTRACT": str(folder),
            "PORT": service.getsockname()[1],
            "ADDRESS": _address(),
            "NAMES": [n for f in ("acpi", "asound", "scsi") for n in _names(Path("/proc", f))],
            "NET": os.readlink("/proc/self/ns/net"),
            "HOST_PID": os.getpid(),
            "PRIVATE": [f"{folder}/key.json", "/run/docker.sock", "/run/dbus", "/run/systemd"],
            "FOLDER": str(folder),
            "FILE_OUTSIDE": f"{folder}/file",
        }


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _address() -> str:
    """Give the address under which the host is known in its network; loopback without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing: it asks for a route
        except OSError:
            return "127.0.0.1"
        return str(sock.getsockname()[0])


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.id)
async def test_it_is_refused(boxes: Open, host: dict[str, Any], probe: Probe) -> None:
    assert await finding(await boxes(), probe, TWIN=False, **host) == probe.refused


@pytest.mark.parametrize(
    "probe", [probe for probe in PROBES if probe.guard], ids=lambda probe: probe.id
)
async def test_it_bites_without_its_guard(boxes: Open, host: dict[str, Any], probe: Probe) -> None:
    if probe.needs_root and os.geteuid() != 0:
        pytest.skip(probe.needs_root)
    if probe.guard == "container":
        seen = finding_outside(probe, TWIN=True, **host)
    else:
        box = await boxes(*probe.guards)
        if "heads' own user" in probe.guards and box.session._pod.ids.is_alone:
            pytest.skip("there is one user here: init guards the heads (container/signals.py)")
        seen = await finding(box, probe, TWIN=True, **host)
    assert seen in probe.opens
    assert seen != probe.refused


async def test_names_are_told_apart() -> None:
    ids = [probe.id for probe in PROBES]
    assert len(set(ids)) == len(ids)


async def test_no_probe_writes_to_the_host(host: dict[str, Any]) -> None:
    assert Path(host["FILE_OUTSIDE"]).read_text() == "of the host"
