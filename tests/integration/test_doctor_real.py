"""The probe and `doctor` on this very host, as this user, as another, and with less."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.linux import libc, probe
from sandbox_kernel.linux.cgroup import CgroupTree
from tests.fakes import doctor_host

ROOT = str(Path(__file__).parents[2])
on_v2 = pytest.mark.skipif(
    CgroupTree.detect().layout != "v2", reason="systemd is asked for a cgroup on v2 alone"
)


def run_doctor(*command: str, **options: Any) -> tuple[int, dict[str, Any]]:
    argv = [*command, sys.executable, "-m", "sandbox_kernel", "doctor", "--json"]
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=60, env=env, cwd="/usr", **options
    )
    assert done.stdout.startswith("{"), done.stderr
    return done.returncode, json.loads(done.stdout)


def by_name(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in content["findings"]}


def own_traces() -> tuple[list[str], list[str], str]:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    cgroup = Path("/proc/self/cgroup").read_text()
    groups = [str(path) for path in Path("/sys/fs/cgroup").rglob("sandbox-kernel-*-probe*")]
    return mounts, groups, cgroup


@contextmanager
def silent_bus() -> Iterator[str]:
    """Give the address of a socket that takes connections and says nothing."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as bus:
        os.chmod(folder, 0o755)
        bus.bind(f"{folder}/bus")
        os.chmod(f"{folder}/bus", 0o777)
        bus.listen()
        yield f"unix:path={folder}/bus"


def test_a_finding_has_a_reason_and_a_remedy_if_it_is_bad() -> None:
    findings = probe.findings_of_fresh_process()
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.group in probe.GROUPS
        assert finding.available is (finding.why == "")
        assert finding.available is (finding.remedy == "")


@pytest.mark.needs("kernel")
def test_where_the_kernel_runs_doctor_says_so() -> None:
    status, content = run_doctor()
    assert (status, content["ok"]) == (0, True)
    assert probe.unmet() is None
    assert probe.explain() == ""


def test_nothing_of_a_probe_stays() -> None:
    before = own_traces()
    probe.findings_of_fresh_process()
    assert own_traces() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# What root has, and what an ordinary user has.

ROOTS = {"id_range", "idmapped_mount", "idmapped_image"}
USERS = {"subordinate_ids", "workspace"}


def test_each_is_told_only_what_his_sessions_need() -> None:
    _, content = run_doctor()
    found = by_name(content)
    own, others = (ROOTS, USERS) if os.geteuid() == 0 else (USERS, ROOTS)
    assert own <= found.keys()
    assert not others & found.keys()
    assert content["user"] == ("root" if os.geteuid() == 0 else "ordinary")


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make such a host")


@as_root
def test_an_ordinary_user_without_ranges_has_one_id() -> None:
    content = doctor_host.ALONE.doctor()
    found = by_name(content)
    assert (content["user"], content["ids"]) == ("ordinary", "single")
    assert content["ids_why"] == "/etc/subuid has no range for 12345"
    assert not found["subordinate_ids"]["required"]
    assert "filter guards" in found["subordinate_ids"]["without"]
    assert "echo 12345:" in found["subordinate_ids"]["remedy"]
    assert lacking(found) == {"subordinate_ids"}


@as_root
def test_an_ordinary_user_with_ranges_uses_them() -> None:
    content = doctor_host.RANGED.doctor()
    found = by_name(content)
    assert (content["ids"], content["ids_why"]) == ("subordinate", "")
    assert lacking(found) == set()


def lacking(found: dict[str, dict[str, Any]]) -> set[str]:
    """Name what is missing of all but cgroups, which users may have or not, and an old Linux."""
    missing = {name for name, finding in found.items() if not finding["available"]}
    return {name for name in missing if found[name]["group"] != "cgroups"} - {"overlay_opaque"}


RANGED = doctor_host.RANGED
SUBUID = "/etc/subuid"


@as_root
@pytest.mark.parametrize(
    ("host", "why", "remedy"),
    [
        (replace(RANGED, no_new_privs=True), "newgidmap failed: newgidmap: ", "NoNewPrivileges="),
        (replace(RANGED, nosuid="/usr"), "newgidmap failed: newgidmap: ", "mounted nosuid"),
        (replace(RANGED, without=("/usr/bin/newuidmap",)), "there is no newuidmap", "apt install"),
        (replace(RANGED, without=("/usr/bin/newgidmap",)), "there is no newgidmap", "apt install"),
        (
            replace(RANGED, files={**RANGED.files, SUBUID: "12345:700000000:many\n"}),
            "/etc/subuid, line 1: '12345:700000000:many' is not",
            "mend that line",
        ),
        (
            replace(RANGED, files={**RANGED.files, SUBUID: "ranged:7000:9000\nyou:9000:9\n"}),
            "/etc/subuid, line 1: the ids 7000 to 15999 overlap those of /etc/subuid, line 2",
            "ids of his own",
        ),
        (
            replace(RANGED, files={**RANGED.files, SUBUID: "ranged:10000:9000\n"}),
            "hold 12345, which is somebody's own",
            "ids that nobody has",
        ),
        (
            replace(RANGED, files={**RANGED.files, SUBUID: "ranged:700000000:1022\n"}),
            "1022 ids for 12345 or ranged are less than 1023",
            "echo ranged:700001022:65536 >> /etc/subuid",
        ),
    ],
)
def test_what_hinders_a_range_leaves_one_id(host: doctor_host.Host, why: str, remedy: str) -> None:
    content = host.doctor(folder="/etc")
    finding = by_name(content)["subordinate_ids"]
    assert content["ids"] == "single"
    assert why in content["ids_why"]
    assert content["ids_why"] == finding["why"]
    assert remedy in finding["remedy"]
    assert by_name(content)["user_namespace"]["available"]


@as_root
@pytest.mark.parametrize(
    ("host", "why", "remedy"),
    [
        (replace(RANGED, max_user_namespaces=0), "No space left", "user.max_user_namespaces="),
        # For the stage, but not for the session inside of it.
        (replace(RANGED, max_user_namespaces=1), "No space left", "user.max_user_namespaces="),
        (replace(RANGED, denied_flags=libc.CLONE_NEWUSER), "clone: Operation not", "--privileged"),
        # What Ubuntu's AppArmor does: the namespace is made, and gives no rights.
        (
            replace(RANGED, denied=("chroot", "mount", "unshare", "setns", "sethostname")),
            "a user namespace can be made, but its root has no rights inside of it",
            "apparmor_restrict_unprivileged_userns=0",
        ),
    ],
)
def test_without_user_namespaces_there_are_no_ids(
    host: doctor_host.Host, why: str, remedy: str
) -> None:
    content = host.doctor()
    found = by_name(content)
    assert (content["ok"], content["ids"]) == (False, "none")
    assert why in content["ids_why"]
    assert remedy in found["user_namespace"]["remedy"]
    assert "user_namespace" in found["overlay"]["remedy"]
    assert found["pidfd"]["available"]


@as_root
@pytest.mark.parametrize("uid", [0, doctor_host.ORDINARY])
def test_a_masked_proc_is_recognised(uid: int) -> None:
    host = replace(doctor_host.MASKED, uid=uid)
    proc = by_name(host.doctor())["proc"]
    assert proc["why"].endswith("parts of this one are covered: /proc/irq, /proc/keys")
    assert "systempaths=unconfined" in proc["remedy"]


@as_root
def test_a_folder_that_cannot_be_shown_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/below")
        os.chmod(folder, 0o755)
        host = replace(doctor_host.ALONE, without=(f"{folder}/below",))
        mounted = by_name(host.doctor(folder))["workspace"]
        os.chmod(folder, 0o700)
        closed = by_name(doctor_host.ALONE.doctor(folder))["workspace"]
    assert mounted["why"] == f"another file system is mounted inside of {folder}"
    assert "--workspace none" in mounted["remedy"]
    assert "Permission denied" in closed["why"]
    assert "a folder of your own" in closed["remedy"]


@as_root
@on_v2
def test_a_user_without_a_bus_is_told_so() -> None:
    found = by_name(doctor_host.ALONE.doctor())
    assert "no user bus can be reached" in found["own_cgroup"]["why"]
    assert "enable-linger 12345" in found["own_cgroup"]["remedy"]
    assert found["memory"]["remedy"] == "first see own_cgroup"


@as_root
@on_v2
def test_a_bus_that_hangs_is_no_reason_to_hang() -> None:
    with silent_bus() as address:
        host = replace(doctor_host.ALONE, environ={"DBUS_SESSION_BUS_ADDRESS": address})
        found = by_name(host.doctor())
    assert "does not answer within 2 s" in found["own_cgroup"]["why"]


def test_a_low_limit_of_open_files_is_recognised() -> None:
    status, content = run_doctor("sh", "-c", 'ulimit -n 512; ulimit -Hn 512; exec "$@"', "sh")
    raised = by_name(content)["open_files"]
    if raised["available"]:
        pytest.skip("this user may raise hard limits (CAP_SYS_RESOURCE)")
    assert status == 1
    assert "ulimit" in raised["remedy"]
