"""What doctor says on each kind of host is what was kept; and what was kept is true to the code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from sandbox_kernel.cli import doctor
from sandbox_kernel.linux import probe, probe_remedy
from tests.fakes import doctor_host
from tests.fakes.doctor_host import Host
from tests.golden import documents
from tests.golden.documents import comparable, normalised

KINDS = (
    "hybrid-root",
    "hybrid-plain",
    "hybrid-ranged",
    "hybrid-no-user-namespaces",
    "hybrid-no-rights",
    "hybrid-masked-proc",
    "v2-root",
    "v2-ranged",
    "v2-plain",
    "v2-ranged-no-cpu",
    "v2-no-user-namespaces",
    "v2-masked-proc",
    "v2-no-bus",
)


def this_host() -> dict[str, Any]:
    """Run doctor here as it is."""
    argv = [sys.executable, "-m", "sandbox_kernel", "doctor", "--json"]
    env = {**os.environ, "PYTHONPATH": doctor_host.ROOT}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, env=env, cwd="/usr")
    assert done.stdout.startswith("{"), done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def compare(kind: str, document: dict[str, Any], *, keep: bool) -> None:
    found = normalised(document)
    if keep:
        documents.write(kind, found)
    if not documents.path_of(kind).exists():
        pytest.skip(f"no document of a host {kind} is kept: keep one with --update-golden")
    kept = documents.read(kind)
    assert comparable(found, kept) == comparable(kept, found)


def test_this_host_is_of_a_kind_that_is_known(keep: bool) -> None:
    compare(documents.kind_of_host(), this_host(), keep=keep)


HYBRID = {
    "plain": doctor_host.ALONE,
    "ranged": doctor_host.RANGED,
    "no-rights": replace(doctor_host.ALONE, denied=("chroot", "mount", "unshare", "sethostname")),
}
V2 = {"no-bus": doctor_host.ALONE}
BOTH = {
    "no-user-namespaces": doctor_host.NO_NAMESPACES,
    "masked-proc": doctor_host.MASKED,
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make such a host")
@pytest.mark.parametrize("name", [*BOTH, *HYBRID, *V2])
def test_a_host_with_less_is_of_a_kind_that_is_known(name: str, keep: bool) -> None:
    layout = documents.layout_of_host()
    made: dict[str, Host] = {**BOTH, **(V2 if layout == "v2" else HYBRID)}
    if name not in made:
        pytest.skip(f"such a host has another layout than {layout}")
    compare(f"{layout}-{name}", made[name].doctor(), keep=keep)


# What is kept, wherever this runs.


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest) -> dict[str, Any]:
    return documents.read(request.param)


def test_every_kind_is_kept_and_no_other() -> None:
    assert {path.stem for path in documents.FOLDER.glob("*.json")} == set(KINDS)


def test_a_document_has_the_fields_of_this_version(kept: dict[str, Any]) -> None:
    findings = [probe.Finding(**fields) for fields in kept["findings"]]
    host = doctor.Host(kept["layout"], kept["user"], probe.ids_of(findings))
    assert json.loads(doctor.document(findings, host)) == kept


def test_a_document_says_why_and_what_to_do(kept: dict[str, Any]) -> None:
    for finding in kept["findings"]:
        missing = not finding["available"]
        assert missing is (finding["why"] != "") is (finding["remedy"] != "")
        assert (missing and not finding["required"]) is (finding["without"] != "")
        assert "\n" not in finding["remedy"]


def test_a_pointer_leads_to_a_remedy(kept: dict[str, Any]) -> None:
    by_name = {finding["name"]: finding for finding in kept["findings"]}
    for finding in kept["findings"]:
        if finding["remedy"] in probe_remedy.POINTERS:
            target = by_name[finding["remedy"].rpartition(" ")[2]]
            assert target["required"]
            assert target["remedy"] not in ("", *probe_remedy.POINTERS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_told_of_that_kind(kind: str) -> None:
    document = documents.read(kind)
    layout, _, what = kind.partition("-")
    assert document["layout"] == layout
    missing = [f["name"] for f in document["findings"] if f["required"] and not f["available"]]
    assert document["ok"] is (missing == [])
    assert (document["user"] == "root") is (what in ("root", "masked-proc"))
    ids = {"root": "high", "masked-proc": "high", "ranged": "subordinate", "plain": "single"}
    ids |= {"ranged-no-cpu": "subordinate", "no-bus": "single"}
    assert document["ids"] == ids.get(what, "none")
    alone = {"masked-proc": ["proc"], "ranged-no-cpu": ["cpus"]}
    if kind in ("hybrid-root", "v2-root", "v2-ranged", "v2-plain"):
        assert missing == []
    elif what in alone:
        assert missing == alone[what]
    elif what in ("no-user-namespaces", "no-rights"):
        assert "user_namespace" in missing
    else:
        assert {"memory", "cpus", "processes"} <= set(missing)


# The pure part.


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (
            "/sys/fs/cgroup/memory/a/0af/sandbox-kernel-12-3456-probe: no",
            "/sys/fs/cgroup/.../sandbox-kernel-PID-TICKS-probe: no",
        ),
        (
            "/sys/fs/cgroup/sandbox-kernel-12-3456-trial",
            "/sys/fs/cgroup/.../sandbox-kernel-PID-TICKS-trial",
        ),
        (
            "/sys/fs/cgroup/user.slice/user-7.slice/user@7.service/a/sandbox-kernel-9-0123abcd.scope",
            "/sys/fs/cgroup/.../sandbox-kernel-PID-ID.scope",
        ),
        ("/sys/fs/cgroup/a/cgroup.procs: no", "/sys/fs/cgroup/.../cgroup.procs: no"),
        ("in /user.slice/session-c15.scope", "in /user.slice/session-N.scope"),
        ("systemctl restart user@1001.service", "systemctl restart user@N.service"),
        ("processes of others: [1, 22, 333]", "processes of others: [PID]"),
        ("/etc/subuid has no range for 7 or me", "/etc/subuid has no range for USER"),
        ("echo me:165536:65536 >> /etc/subuid", "echo USER:FIRST:65536 >> /etc/subuid"),
        ("unix:path=/run/user/1001/bus", "unix:path=/run/user/UID/bus"),
        ("Operation not permitted", "Operation not permitted"),
        ("sysctl -w user.max_user_namespaces=10000", "sysctl -w user.max_user_namespaces=10000"),
        ("boot Linux 5.12 or newer", "boot Linux 5.12 or newer"),
    ],
)
def test_what_is_volatile_is_replaced(text: str, normal: str) -> None:
    document = {"version": 1, "ids_why": text, "findings": [{"why": text, "required": True}]}
    assert normalised(document) == {
        "version": 1,
        "ids_why": normal,
        "findings": [{"why": normal, "required": True}],
    }
    assert normalised(normalised(document)) == normalised(document)


def optional(name: str, *, available: bool, why: str = "") -> dict[str, Any]:
    return {"name": name, "available": available, "required": False, "why": why}


def test_an_optional_thing_of_another_machine_is_no_difference() -> None:
    has = {"findings": [optional("swap", available=True)]}
    lacks = {"findings": [optional("swap", available=False, why="no")]}
    lacks_otherwise = {"findings": [optional("swap", available=False, why="none")]}
    assert comparable(has, lacks) == comparable(lacks, has)
    assert comparable(lacks, lacks_otherwise) != comparable(lacks_otherwise, lacks)
    assert comparable(has, {"findings": []}) != comparable({"findings": []}, has)


def test_what_a_kind_is_made_of_is_a_difference() -> None:
    for required, name in ((True, "memory"), (False, "subordinate_ids")):
        has = {"findings": [{**optional(name, available=True), "required": required}]}
        lacks = {"findings": [{**optional(name, available=False), "required": required}]}
        assert comparable(has, lacks) != comparable(lacks, has)
