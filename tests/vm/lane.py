"""Run the suites in one guest, user after user, and report."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.vm import image, port, source
from tests.vm.machine import Machine
from tests.vm.suites import SUITES, Suite

__all__ = ["SUITES", "Report", "Suite", "booted", "read_junit", "run_lane", "run_suite", "table"]

RESULTS = image.ROOT / "build" / "vm"
PYTEST = (source.PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "--color=no")
LANE_TIMEOUT_S = 25 * 60.0
SLOWDOWN = {"SANDBOX_KERNEL_TEST_SLOWDOWN": "5"}
"""How much longer traces of a session may take to go: the processor may be emulated."""

Tell = Callable[[str], None]


@dataclass
class Report:
    """How one suite ended."""

    user: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    """Why the suite counts as failed; empty if it does not."""


def read_junit(text: str, suite: Suite) -> Report:
    """Read pytest's own report; raises ValueError if there is none."""
    report = Report(suite.user)
    try:
        cases = list(ElementTree.fromstring(text).iter("testcase"))
    except ElementTree.ParseError as error:
        raise ValueError(f"no report of the tests: {error}") from error
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            report.failed += 1
        elif skip is None:
            report.passed += 1
        else:
            report.skipped += 1
            reason = skip.get("message") or ""
            if not any(re.search(pattern, reason) for pattern in suite.may_skip):
                report.faults.append(f"{name} was skipped: {reason[:200]}")
    if report.failed:
        report.faults.append(f"{report.failed} failed")
    if not report.passed:
        report.faults.append("no test has run")
    return report


@contextlib.contextmanager
def _shown_and_kept(path: Path) -> Iterator[port.Taker]:
    """Write what a job says to the terminal and to a file."""
    with path.open("wb") as file:

        def take(_: str, data: bytes) -> None:
            file.write(data)
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

        yield take


def run_suite(machine: Machine, suite: Suite, extra: tuple[str, ...], left_s: float) -> Report:
    """Run a suite; every way in which it can end badly is a fault in the report."""
    begin_s = time.monotonic()
    deselected = [f"--deselect={name}" for name in suite.without]
    junit = f"/tmp/junit-{suite.user}.xml"
    job = port.Job(
        suite.user,
        (*PYTEST, *deselected, f"--junitxml={junit}", *suite.tests, *extra),
        cwd=source.SOURCE,
        env=SLOWDOWN,
        timeout_s=max(1.0, min(suite.timeout_s, left_s)),
    )
    report = Report(suite.user)
    try:
        with _shown_and_kept(RESULTS / f"{suite.user}.log") as take:
            ended = port.run(machine.folder, job, take)
        if ended.timed_out:
            report.faults.append(f"not done after {job.timeout_s:.0f} s")
        else:
            found = machine.run(port.Job(suite.user, ("cat", junit), timeout_s=60))
            (RESULTS / f"{suite.user}.xml").write_bytes(found.stdout)
            report = read_junit(found.stdout.decode("utf-8", "replace"), suite)
            if ended.status and not report.faults:
                report.faults.append(f"pytest ended with {ended.status}")
    except (port.GuestError, ValueError) as error:
        report.faults.append(str(error))
    report.seconds = time.monotonic() - begin_s
    return report


@contextlib.contextmanager
def booted(tell: Tell, accelerator: str) -> Iterator[Machine]:
    """Give a guest that ends with the lane; raises ImageError, GuestError."""
    built = image.ensure(tell)
    with tempfile.TemporaryDirectory(prefix="sandbox-kernel-vm-") as name:
        machine = Machine(Path(name))
        try:
            machine.boot(built, accelerator, tell, stays=False)
            yield machine
        finally:
            machine.stop()
            with contextlib.suppress(OSError):
                (RESULTS / "console.log").write_bytes(machine.console.read_bytes())


def run_lane(
    machine: Machine, suites: tuple[Suite, ...], extra: tuple[str, ...], tell: Tell
) -> list[Report]:
    """Install the project and run the suites, one after the other: two processors, no more."""
    begin_s = time.monotonic()
    source.sync(machine)
    tell(f"wheel built and installed: {time.monotonic() - begin_s:.1f} s")
    reports = []
    for suite in suites:
        tell(f"\n== {suite.user} ==")
        left_s = begin_s + LANE_TIMEOUT_S - time.monotonic()
        reports.append(run_suite(machine, suite, extra, left_s))
    if any(report.faults for report in reports):
        with contextlib.suppress(port.GuestError):
            journal = machine.run(port.Job("root", ("journalctl", "--boot"), timeout_s=60))
            (RESULTS / "journal.txt").write_bytes(journal.stdout)
    return reports


def table(reports: list[Report]) -> str:
    """Lay the reports out, with what is wrong below."""
    lines = [f"{'user':<10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for one in reports:
        lines.append(
            f"{one.user:<10}{one.passed:>8}{one.failed:>8}{one.skipped:>9}{one.seconds:>9.1f}"
        )
    lines += [f"{one.user}: {fault}" for one in reports for fault in one.faults]
    return "\n".join(lines)
