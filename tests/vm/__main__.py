"""A guest with systemd and cgroup v2, and its users: root, ranged, plain, nocpu.

`test` is the lane: it boots a guest, runs the suites in it, and ends it. `up` boots one that stays,
for work by hand with `exec` and `sync`, until `down`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from tests.vm import image, lane, port, source
from tests.vm.machine import ACCELERATORS, Machine

FAILED, NOT_RUN = 1, 125


def tell(text: str) -> None:
    """Say what goes on."""
    print(text, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    test = verbs.add_parser("test", help="run the suites")
    up = verbs.add_parser("up", help="boot a guest that stays")
    for verb in (test, up):
        verb.add_argument("--accelerator", choices=("auto", *ACCELERATORS), default="auto")
    test.add_argument("--user", action="append", help="only this user's suite; may be repeated")
    test.add_argument("--running", action="store_true", help="in the guest that is up already")
    test.add_argument("extra", nargs="*", metavar="ARGUMENT", help="after --: more for pytest")
    verbs.add_parser("sync", help="install the present state of the project in it")
    verbs.add_parser("down", help="end it")
    run = verbs.add_parser("exec", help="run a command in a login session")
    run.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    run.add_argument("--cwd", default="")
    run.add_argument("user")
    run.add_argument("argv", nargs="+", metavar="COMMAND")
    return parser.parse_args(argv)


def test(machine: Machine, options: argparse.Namespace) -> int:
    """Run the lane; 1 if a test failed, was skipped without a right to be, or none ran."""
    suites = tuple(suite for suite in lane.SUITES if not options.user or suite.user in options.user)
    if not suites:
        raise port.GuestError(f"no suite for {', '.join(options.user)}")
    lane.RESULTS.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if not options.running:
            machine = stack.enter_context(lane.booted(tell, options.accelerator))
        reports = lane.run_lane(machine, suites, tuple(options.extra), tell)
    print(f"\n{lane.table(reports)}")
    return FAILED if any(report.faults for report in reports) else 0


def up(machine: Machine, options: argparse.Namespace) -> int:
    """Boot a guest that stays."""
    if machine.pid:
        tell("a guest is up already")
        return 0
    machine.boot(image.ensure(tell), options.accelerator, tell, stays=True)
    return 0


def _pass_on(stream: str, data: bytes) -> None:
    target = sys.stdout.buffer if stream == "stdout" else sys.stderr.buffer
    target.write(data)
    target.flush()


def execute(machine: Machine, options: argparse.Namespace) -> int:
    """Run one command in a login session of a user; give its status."""
    job = port.Job(
        options.user,
        tuple(options.argv),
        stdin=b"" if sys.stdin.isatty() else sys.stdin.buffer.read(),
        cwd=options.cwd,
        timeout_s=options.timeout,
    )
    ended = port.run(machine.folder, job, _pass_on)
    if ended.timed_out:
        tell(f"killed after {options.timeout} s")
    return ended.status


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks."""
    options = parse(argv)
    machine = Machine(image.cache_folder() / "guest")
    try:
        if options.verb == "test":
            return test(machine, options)
        if options.verb == "up":
            return up(machine, options)
        if options.verb == "exec":
            return execute(machine, options)
        if options.verb == "sync":
            source.sync(machine)
        elif not machine.stop():
            tell("no guest is up")
    except (image.ImageError, port.GuestError) as error:
        tell(f"Error: {error}")
        return NOT_RUN
    return 0


if __name__ == "__main__":
    sys.exit(main())
