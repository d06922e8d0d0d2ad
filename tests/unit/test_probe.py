"""The probe without its acts: children, remedies, and what is made of findings."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from sandbox_kernel.config import LIMITS, WAIVABLE
from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import (
    idmap,
    probe,
    probe_acts,
    probe_cgroups,
    probe_child,
    probe_ids,
    probe_remedy,
    probe_trials,
)
from sandbox_kernel.linux.cgroup import CgroupTree
from sandbox_kernel.linux.probe import Finding, Ids
from sandbox_kernel.linux.probe_ids import Ground
from sandbox_kernel.linux.probe_trials import HERE, Trial


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


def refusing(message: str, hint: str = "") -> probe_child.Act:
    def act() -> str:
        raise HostError(message, hint=hint)

    return act


def test_a_host_error_of_the_act_keeps_its_remedy() -> None:
    with pytest.raises(HostError, match="it did nothing") as caught:
        probe_child.call(refusing("it did nothing", "mend it"))
    assert (caught.value.message, caught.value.hint) == ("it did nothing", "mend it")


def test_an_error_passes_through_more_than_one_child() -> None:
    with pytest.raises(PermissionError, match=r"not permitted \(/some/path\)"):
        probe_child.call(lambda: probe_child.call(failing(errno.EPERM)))
    with pytest.raises(HostError, match="no") as caught:
        probe_child.call(lambda: probe_child.call(refusing("no", "mend it")))
    assert caught.value.hint == "mend it"


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
    found = Trial("overlay", "overlay", failing(errno.ENODEV), place=HERE).run(None)
    assert not found.available
    assert "No such device" in found.why
    assert "modprobe overlay" in found.remedy


def test_a_trial_that_works_says_nothing() -> None:
    found = Trial("pidfd", "limits", lambda: "", place=HERE, required=False).run(None)
    assert found == Finding("pidfd", "limits", available=True, required=False, why="", remedy="")


def test_what_the_act_knows_of_the_remedy_goes_before_the_table() -> None:
    trial = Trial("overlay", "overlay", refusing("it is odd", "mend it so"), place=HERE)
    assert (trial.run(None).why, trial.run(None).remedy) == ("it is odd", "mend it so")
    trial = Trial("overlay", "overlay", refusing("it is odd"), place=HERE)
    assert "modprobe overlay" in trial.run(None).remedy


def test_without_a_user_namespace_the_others_point_at_it() -> None:
    for place in (probe_trials.BESIDE, probe_trials.INSIDE):
        found = Trial("proc", "namespaces", lambda: "", place=place).run(None)
        assert "user namespace" in found.why
        assert found.remedy == probe_remedy.NEEDS_USER_NAMESPACE


def test_what_is_not_required_says_what_is_different_without_it() -> None:
    trial = Trial("subordinate_ids", "ids", failing(errno.EPERM), place=HERE, required=False)
    assert "filter guards" in trial.run(None).without
    trial = Trial("subordinate_ids", "ids", lambda: "", place=HERE, required=False)
    assert trial.run(None).without == ""


def test_every_trial_has_a_name_of_its_own_and_a_group() -> None:
    firsts = (probe_trials.HIGH, probe_trials.SUBORDINATE, probe_trials.SINGLE)
    for own in (probe_trials.of_root("/"), probe_trials.of_user("/")):
        trials = (*firsts, *own, *probe_trials.of_all())
        assert len({trial.name for trial in trials}) == len(trials)
        assert {trial.group for trial in trials} <= set(probe.GROUPS)
    optional = {trial.name for trial in (*trials, *probe_trials.of_root("/")) if not trial.required}
    assert optional | {"swap", "freeze", "io"} == set(probe_remedy.WITHOUT)


# The ground: user namespaces as sessions have them.


def shown_ids() -> str:
    return f"{os.getresuid()} {os.getresgid()} {os.getgroups()}"


@pytest.mark.needs("user_namespace")
def test_a_single_id_is_that_of_the_cell_and_of_init() -> None:
    ground = Ground(idmap.single(os.geteuid(), os.getegid()))
    told = ground.inside(shown_ids)
    assert told.startswith("(1000, 1000, 1000) (1000, 1000, 1000)")


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives ids away")
@pytest.mark.needs("id_range")
def test_in_a_high_range_an_act_has_the_part_of_root() -> None:
    ground = Ground(idmap.high(probe_ids.FIRST_ID))
    assert ground.inside(shown_ids) == "(0, 0, 0) (0, 0, 0) []"


@pytest.mark.needs("user_namespace", "mount_namespace")
def test_what_was_done_beside_is_there_inside() -> None:
    def first() -> str:
        probe_acts.stage()
        os.mkdir("made")
        return ""

    ground = Ground(idmap.single(os.geteuid(), os.getegid()))
    found = ground.inside(lambda: f"{os.listdir()} {os.getcwd()}", first=first)
    assert found == f"['made'] {probe_acts.STAGE}"
    assert os.getcwd() != probe_acts.STAGE


def test_a_path_with_a_pid_is_told_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(pid: int, _ids: idmap.IdMap) -> None:
        raise PermissionError(errno.EPERM, "no", f"/proc/{pid}/uid_map")

    monkeypatch.setattr(idmap, "write", write)
    with pytest.raises(PermissionError, match="/proc/PID/uid_map"):
        Ground(idmap.single(os.geteuid(), os.getegid())).beside(lambda: "")


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
        ("id_range", errno.EPERM, {}, "as an ordinary user"),
        ("idmapped_mount", errno.EPERM, {}, "--privileged"),
        ("idmapped_mount", errno.EINVAL, {}, "--workspace none"),
        ("workspace", errno.EACCES, {}, "a folder of your own"),
        ("workspace", errno.EINVAL, {}, "neither an overlay's"),
        ("devices", errno.EACCES, {}, "without nodev"),
        ("devpts", errno.EPERM, {}, "--privileged"),
        ("devpts", errno.ENODEV, {}, "Linux"),
    ],
)
def test_the_remedy_fits_the_reason(
    name: str, number: int, values: dict[str, str], words: str
) -> None:
    assert words in probe_remedy.remedy(name, number, read=settings(**values))


def test_rights_that_are_taken_away_are_told_from_a_namespace_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chroot(_path: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chroot", chroot)
    with pytest.raises(HostError, match="root has no rights") as caught:
        probe_acts.own_namespace()
    assert "apparmor_restrict_unprivileged_userns" in caught.value.hint


# Which ids there are.


def ids_found(**available: bool) -> Ids:
    return probe.ids_of([finding(name, available=value) for name, value in available.items()])


def test_root_has_a_high_range_or_none() -> None:
    assert ids_found(id_range=True, user_namespace=True) == Ids("high", "")
    assert ids_found(id_range=False, user_namespace=True) == Ids("none", "no")


def test_an_ordinary_user_has_a_range_or_one_id_or_none() -> None:
    assert ids_found(subordinate_ids=True, user_namespace=True) == Ids("subordinate", "")
    assert ids_found(subordinate_ids=False, user_namespace=True) == Ids("single", "no")
    assert ids_found(subordinate_ids=False, user_namespace=False) == Ids("none", "no")


def test_what_is_of_no_use_to_this_user_is_a_capability_all_the_same() -> None:
    known = probe.capabilities()
    tried = {finding.name for finding in probe.findings_of_fresh_process()}
    assert {"id_range", "idmapped_mount", "subordinate_ids", "workspace"} <= known.keys()
    for name in known.keys() - tried - {probe.KERNEL}:
        assert known[name] == "not of use to this user"


# Control groups.


def test_without_a_group_of_its_own_the_limits_point_at_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def acquire() -> CgroupTree:
        raise HostError("the user bus does not answer within 2 s", hint="log in anew")

    monkeypatch.setattr(CgroupTree, "acquire", acquire)
    found = {finding.name: finding for finding in probe.probe()}
    own = found["own_cgroup"]
    assert (own.why, own.remedy) == ("the user bus does not answer within 2 s", "log in anew")
    for name in set(probe_cgroups.ALL) - {"own_cgroup"}:
        assert not found[name].available
        assert found[name].remedy == probe_remedy.NEEDS_OWN_CGROUP
    assert "own_cgroup: log in anew" in probe._remedies(probe.lacking(found.values()))
    assert "memory" not in probe._remedies([found["own_cgroup"], found["memory"]])


def test_a_reason_is_parted_from_its_remedy() -> None:
    assert probe_cgroups._split("it is not there (mend it)") == (0, "it is not there", "mend it")
    assert probe_cgroups._split("it is not there") == (0, "it is not there", "")


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
