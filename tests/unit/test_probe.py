"""The probe without its acts: children, remedies, and what is made of findings."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from sandbox_kernel.config import LIMITS, WAIVABLE
from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import probe, probe_child, probe_ids, probe_remedy
from sandbox_kernel.linux.probe import Finding, Trial


def failing(number: int) -> probe_child.Act:
    def act() -> str:
        raise OSError(number, os.strerror(number), "/some/path")

    return act


def finding(name: str, *, available: bool = False, required: bool = True, **more: str) -> Finding:
    fields = {"why": "" if available else "no", "remedy": "" if available else f"mend {name}"}
    return Finding(name, "limits", available, required, **{**fields, **more})


# Children.


def test_a_child_gives_the_text_of_its_act_and_nothing_else_of_it() -> None:
    def act() -> str:
        os.environ["PROBE_LEFT"] = "1"
        return f"pid {os.getpid()} ü"

    assert probe_child.call(act) != f"pid {os.getpid()} ü"
    assert "PROBE_LEFT" not in os.environ


def test_an_error_of_the_act_is_raised_here() -> None:
    with pytest.raises(PermissionError, match=r"not permitted.*/some/path"):
        probe_child.call(failing(errno.EPERM))


def test_a_host_error_has_no_errno() -> None:
    def act() -> str:
        raise HostError("it did nothing")

    with pytest.raises(OSError, match="it did nothing") as caught:
        probe_child.call(act)
    assert caught.value.errno == 0


@pytest.mark.parametrize(
    "end", [lambda: os._exit(0), lambda: os.kill(os.getpid(), 9), lambda: 1 / 0]
)
def test_a_child_that_dies_is_an_error(end: probe_child.Act) -> None:
    with pytest.raises(OSError, match="died"):
        probe_child.call(end)


def test_a_child_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_child, "TIMEOUT_S", 0.1)

    def act() -> str:
        signal.pause()
        return ""

    with pytest.raises(TimeoutError, match="no end after"):
        probe_child.call(act)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_an_error_of_the_preparation_ends_the_child() -> None:
    def prepare(_pid: int) -> None:
        raise PermissionError(errno.EPERM, "no map")

    with pytest.raises(PermissionError, match="no map"):
        probe_child.call(lambda: "", prepare=prepare)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# Trials.


def test_a_trial_says_why_and_what_to_do() -> None:
    found = Trial("overlay", "overlay", failing(errno.ENODEV), inside=False).run(None)
    assert not found.available
    assert "No such device" in found.why
    assert "modprobe overlay" in found.remedy


def test_a_trial_that_works_says_nothing() -> None:
    found = Trial("pidfd", "limits", lambda: "", inside=False, required=False).run(None)
    assert found == Finding("pidfd", "limits", available=True, required=False, why="", remedy="")


def test_without_a_user_namespace_the_others_point_at_it() -> None:
    found = Trial("proc", "namespaces", lambda: "").run(None)
    assert "user namespace" in found.why
    assert found.remedy == probe_remedy.NEEDS_USER_NAMESPACE


# Remedies.


def settings(**values: str) -> probe_remedy.Callable[[str], str]:
    return lambda name: values.get(name.rpartition(".")[2], "")


@pytest.mark.parametrize(
    ("name", "number", "values", "words"),
    [
        ("user_namespace", errno.ENOSPC, {}, "user.max_user_namespaces="),
        ("id_range", errno.ENOSPC, {}, "user.max_user_namespaces="),
        ("network_namespace", errno.ENOSPC, {}, "user.max_net_namespaces="),
        ("mount_namespace", errno.EPERM, {"max_mnt_namespaces": "0"}, "user.max_mnt_namespaces="),
        ("cgroup_namespace", errno.EINVAL, {}, "CONFIG_CGROUPS"),
        ("user_namespace", errno.EPERM, {"unprivileged_userns_clone": "0"}, "userns_clone=1"),
        (
            "user_namespace",
            errno.EPERM,
            {"apparmor_restrict_unprivileged_userns": "1"},
            "AppArmor",
        ),
        ("user_namespace", errno.EPERM, {}, "--privileged"),
        ("proc", errno.EPERM, {}, "systempaths=unconfined"),
        ("id_range", errno.EPERM, {}, "as root"),
        ("idmapped_mount", errno.EPERM, {}, "as root"),
        ("idmapped_mount", errno.EINVAL, {}, "--workspace none"),
        ("devpts", errno.EPERM, {}, "--privileged"),
        ("devpts", errno.ENODEV, {}, "Linux"),
    ],
)
def test_the_remedy_fits_the_reason(
    name: str, number: int, values: dict[str, str], words: str
) -> None:
    assert words in probe_remedy.remedy(name, number, read=settings(**values))


# Subordinate ids.


def test_a_range_is_found_by_uid_or_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert probe_ids.subordinate_range("other:1:2\n0:100000:65536\n", "t") == (100000, 65536)
    assert probe_ids.subordinate_range("root:200000:10\n", "t") == (200000, 10)


@pytest.mark.parametrize("text", ["", "other:1:2\n", "root:x:2\n", "root:\n"])
def test_no_range_is_an_error_that_names_the_table(text: str) -> None:
    with pytest.raises(HostError, match="/etc/subuid has no range"):
        probe_ids.subordinate_range(text, "/etc/subuid")


# What callers make of it.

FOUND = (
    finding("memory"),
    finding("cpus", remedy="mend memory"),
    finding("swap", required=False),
    finding("disk", available=True),
    finding("overlay", remedy=probe_remedy.NEEDS_USER_NAMESPACE),
)


def test_what_is_required_and_not_waived_is_lacking() -> None:
    assert [f.name for f in probe.lacking(FOUND)] == ["memory", "cpus", "overlay"]
    assert [f.name for f in probe.lacking(FOUND, frozenset({"memory", "overlay"}))] == ["cpus"]


def test_unmet_names_all_and_gives_each_remedy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "findings_of_fresh_process", lambda _folder: FOUND)
    error = probe.unmet()
    assert error is not None
    assert error.message == "this host cannot enforce memory: no; cpus: no; overlay: no"
    assert error.hint == "memory, cpus: mend memory"
    assert probe.explain() == "memory, cpus: mend memory"
    assert probe.unmet(frozenset({"memory", "cpus", "overlay"})) is None
    assert probe.explain(frozenset({"memory", "cpus", "overlay"})) == ""


def test_an_explanation_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.sys, "executable", "/nonexistent/python")
    assert "cannot be examined" in probe.explain()


def test_what_can_be_waived_bears_the_names_of_findings() -> None:
    names = set(probe.capabilities())
    assert set(WAIVABLE) <= names
    # The other two need nothing of the host: the kernel itself counts output and time.
    assert {limit.name for limit in LIMITS} - {"output", "wall_time"} <= names
