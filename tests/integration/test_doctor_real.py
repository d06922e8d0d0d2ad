"""The probe and `doctor` on this very host, as this user, as another, and with less."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.linux import probe

ROOT = str(Path(__file__).parents[2])
NOBODY = 65534


def run_doctor(*command: str, **options: Any) -> tuple[int, dict[str, Any]]:
    argv = [*command, sys.executable, "-m", "sandbox_kernel", "doctor", "--json"]
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=60, env=env, cwd="/", **options
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_is_told_what_is_missing() -> None:
    become = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    look = [*become, sys.executable, "-c", f"import os; os.listdir({ROOT!r})"]
    if subprocess.run(look, capture_output=True, cwd="/").returncode != 0:
        pytest.skip("other users cannot read this Python or the sources")
    status, content = run_doctor(*become)
    assert (status, content["ok"]) == (1, False)
    found = by_name(content)
    assert found["rootless"]["required"]
    assert not found["id_range"]["available"]
    assert "root" in found["rootless"]["remedy"]
    assert found["pidfd"]["available"]


@pytest.mark.needs("user_namespace")
def test_forbidden_user_namespaces_are_recognised() -> None:
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    status, content = run_doctor("unshare", "-U", "-r", "sh", "-c", forbid, "sh")
    found = by_name(content)
    assert status == 1
    assert "user.max_user_namespaces" in found["user_namespace"]["remedy"]
    assert "user_namespace" in found["overlay"]["remedy"]


def test_a_low_limit_of_open_files_is_recognised() -> None:
    status, content = run_doctor("sh", "-c", 'ulimit -n 512; ulimit -Hn 512; exec "$@"', "sh")
    raised = by_name(content)["open_files"]
    if raised["available"]:
        pytest.skip("this user may raise hard limits (CAP_SYS_RESOURCE)")
    assert status == 1
    assert "ulimit" in raised["remedy"]
