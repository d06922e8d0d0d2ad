"""Every system call, made in a cell: which the filter lets through, compared with a kept list.

`pytest tests/golden/syscalls --update-golden` keeps what is found. Each call is made twice, with
arguments of zeros and of ones, in a process of its own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.linux.syscalls import NUMBERS
from tests.escape.probe import PRELUDE, Probe
from tests.escape.sessions import session
from tests.integration.driver import Driver, stop

pytestmark = [
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.escape,
    pytest.mark.kernel,
]

MACHINE = os.uname().machine
FOLDER = Path(__file__).parent
LAST_NUMBER = 1023
"""Linux counts to about 470; above there is nothing."""
PROBES = (
    Probe(48, "every system call, against a golden list", "as listed", "filter", "most allowed"),
)
SCAN = """
import json
from sandbox_kernel.linux.syscalls import NUMBERS
ONES = (1 << 64) - 1
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, True)
def answer(number, argument):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        me = os.getpid()
        # What would wait for ever is interrupted: it was let through.
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        said = call(number, *[argument] * 6)
        if os.getpid() == me:
            os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 64).decode()
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == -signal.SIGSYS:
        return "killed"
    # Whoever does not come back to say it has exited, or jumped to nowhere.
    return {"EPERM": "refused", "ENOSYS": "absent"}.get(said, "allowed")
known = {number: name for name, number in NUMBERS[os.uname().machine].items()}
found = {}
for number in range(LAST + 1):
    if number in known:
        pair = answer(number, 0), answer(number, ONES)
        found[known[number]] = pair[0] if pair[0] == pair[1] else "by its arguments"
    elif (said := call(number, 0, 0, 0, 0, 0, 0)) != "ENOSYS":
        found[str(number)] = said
foreign = {}
if os.uname().machine == "x86_64":
    foreign = {str(n): answer(0x40000000 | n, 0) for n in (0, 39, 165, 512, 520, 547)}
print(json.dumps({"calls": found, "x32": foreign}))
"""


async def _scan(box: Driver) -> dict[str, Any]:
    text = await box.ok(f"{PRELUDE}\nLAST = {LAST_NUMBER}\n{SCAN}", processes=256)
    scanned: dict[str, Any] = json.loads(text)
    return scanned


def _by_answer(scanned: dict[str, Any]) -> dict[str, Any]:
    """Turn {call: answer} round, in order, so that a change is one word in a list."""
    answers = sorted(set(scanned["calls"].values()))
    lists = {
        answer: sorted(name for name, said in scanned["calls"].items() if said == answer)
        for answer in answers
    }
    return {"calls": lists, "x32": scanned["x32"]}


def _calls(document: dict[str, Any]) -> dict[str, str]:
    return {name: said for said, names in document["calls"].items() for name in names}


@pytest.mark.skipif(MACHINE not in NUMBERS, reason=f"no table of system calls for {MACHINE}")
async def test_the_calls_that_are_allowed_are_the_kept_ones(tmp_path: Path, keep: bool) -> None:
    box = await session(tmp_path)
    try:
        found = _by_answer(await _scan(box))
    finally:
        await stop(box)
    path = FOLDER / f"{MACHINE}.json"
    if keep:
        path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    kept = json.loads(path.read_text("utf-8"))
    assert found["x32"] == kept["x32"]
    ours, theirs = _calls(found), _calls(kept)
    # A call that this Linux does not have is absent, whatever the filter thinks of it.
    differs = {
        name: (theirs.get(name), ours.get(name))
        for name in {*ours, *theirs}
        if ours.get(name) != theirs.get(name)
        and not (ours.get(name) == "absent" and theirs.get(name) in ("allowed", "by its arguments"))
    }
    assert differs == {}


@pytest.mark.skipif(MACHINE not in NUMBERS, reason=f"no table of system calls for {MACHINE}")
async def test_without_a_filter_another_list_is_found(tmp_path: Path) -> None:
    kept = _calls(json.loads((FOLDER / f"{MACHINE}.json").read_text("utf-8")))
    box = await session(tmp_path, "filter")
    try:
        found = (await _scan(box))["calls"]
    finally:
        await stop(box)
    opened = {name for name, said in kept.items() if said == "refused" and found[name] == "allowed"}
    assert {"mount", "umount2", "io_uring_setup", "unshare", "setns"} <= opened
