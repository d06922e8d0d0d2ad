"""Attacks on the gate in front of `capset` and `setns`, and from inside of the window it opens."""

from __future__ import annotations

import pytest

from sandbox_kernel.model import Outcome
from sandbox_kernel.session.pod import Pod
from tests.escape.conftest import Open
from tests.escape.probe import PRELUDE, Probe
from tests.escape.sessions import finding, finding_outside
from tests.integration.driver import Driver

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.needs("user_namespace", "overlay", "seccomp"),
    pytest.mark.escape,
]

AS_BEFORE = "variables are as they were before"
THREAD = Probe(0, "gate: capset from a background thread over commits", "never", "gate", "ok")
CHILD = Probe(0, "gate: capset from a child", "EPERM", "gate", "ok", "print(fresh(arm))")
FORGED = Probe(0, "gate: a forged announcement", "cell ended", "", "")
EXHAUST = Probe(0, "gate: notifications exhausted by 60 processes", "EPERM", "gate", "ok")
LISTENER = Probe(
    0, "gate: a listener of the cell's own", "EBUSY", "container", "ok",
    "code = ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0x7FFF0000))\n"
    "prog = ctypes.create_string_buffer(struct.pack('=HxxxxxxQ', 1, ctypes.addressof(code)))\n"
    "def act():\n"
    "    call('prctl', 38, 1, 0, 0, 0)\n"
    "    return call('seccomp', 1, 8, ctypes.addressof(prog))\n"
    "print(fresh(act))",
)  # fmt: skip
NAMESPACE = Probe(
    0, "gate: setns to its own namespaces", "EPERM", "gate", "ok",
    "arm(); fd = os.open('/proc/self/ns/uts', 0); print(call('setns', fd, 0))",
)  # fmt: skip
KEPT = Probe(
    0, "window: capabilities kept over a commit", "cell thrown away", "look at the process", "kept"
)
ENTERED = Probe(
    0, "window: capabilities kept on entering", "cell thrown away", "look at the process", "kept"
)
WINDOW = Probe(0, "window: mounts, namespaces, root in it", "EPERM", "filter", "ok")
PROBES = (THREAD, CHILD, FORGED, EXHAUST, LISTENER, NAMESPACE, KEPT, ENTERED, WINDOW)


async def forget(box: Driver) -> None:
    """Leave nothing of an attack to the next test: the session ends with it."""
    box.broken = True


HAMMER = (
    PRELUDE
    + """
import threading
seen, halt = set(), threading.Event()
def hammer():
    while not halt.is_set():
        seen.add(arm())
thread = threading.Thread(target=hammer, daemon=True)
thread.start()
"""
)


@pytest.mark.parametrize(
    ("guards", "seen"), [((), {"EPERM"}), ((THREAD.guard,), {"ok"})], ids=["refused", "twin"]
)
async def test_a_thread_hammers_over_commits(
    boxes: Open, guards: tuple[str, ...], seen: set[str]
) -> None:
    box = await boxes(*guards)
    await box.ok(HAMMER)
    for count in range(4):
        assert await box.value(f"{count} + thread.is_alive()") == count + 1
    await box.ok("halt.set(); thread.join()")
    assert await box.value("sorted(seen)") == sorted(seen)
    await forget(box)


@pytest.mark.parametrize("probe", [CHILD, NAMESPACE], ids=lambda probe: probe.id)
async def test_a_gated_call_is_refused(boxes: Open, probe: Probe) -> None:
    assert await finding(await boxes(), probe) == probe.refused
    assert await finding(await boxes(probe.guard), probe) == probe.open


async def test_the_listener_cannot_be_taken_over(boxes: Open) -> None:
    assert await finding(await boxes(), LISTENER) == LISTENER.refused
    assert finding_outside(LISTENER) == LISTENER.open


async def test_an_announcement_cannot_be_forged(boxes: Open) -> None:
    box = await boxes()
    await box.ok("x = 1")
    ran = await box.run(
        PRELUDE
        + "from sandbox_kernel.guest.wire import encode\n"
        + "os.write(3, encode({'op': 'gate', 'pid': os.getpid(), 'kind': 'enter'}))\n"
        + "while True: seen = arm(); assert seen == 'EPERM', seen"
    )
    assert ran.outcome is Outcome.CRASHED
    assert "'gate', which is no verb of a cell" in " ".join(ran.result.notes)
    assert await box.value("x") == 1


@pytest.mark.parametrize(
    ("guards", "seen"), [((), "EPERM"), ((EXHAUST.guard,), "ok")], ids=["refused", "twin"]
)
async def test_notifications_are_exhausted(boxes: Open, guards: tuple[str, ...], seen: str) -> None:
    box = await boxes(*guards)
    code = """
said, pids = set(), []
read, write = os.pipe()
for _ in range(60):
    if not (pid := os.fork()):
        os.write(write, (",".join({arm() for _ in range(200)}) + ",").encode())
        os._exit(0)
    pids.append(pid)
os.close(write)
said = b"".join(iter(lambda: os.read(read, 4096), b"")).decode()
for pid in pids: os.waitpid(pid, 0)
os.close(read)
print(*set(said.strip(",").split(",")))
"""
    assert (await box.ok(PRELUDE + code)).strip() == seen
    assert await box.value("1 + 1") == 2


PATCH = (
    PRELUDE
    + """
from sandbox_kernel.guest import enter
park, become, told = enter.park, enter.enter, {}
def keep(*ids):
    enter.libc.capset(KEPT, KEPT, 0)
    enter._become(*ids)
    call("capset", b"", b"")  # the second call of the sequence, which drops nothing
    enter.libc.set_dumpable(False)
CALLS = {
    "mount": ("mount", b"none", b"/tmp", b"tmpfs", 0, 0),
    "open_tree": ("open_tree", -100, b"/tmp", 1),
    "unshare": ("unshare", 0x20000),
    "chroot": ("chroot", b"/tmp"),
    "bpf": ("bpf", 99, 0, 0),
    "setuid": ("setresuid", 0, 0, 0),
    "setgroups": ("setgroups", 0, 0),
}
def attack(*ids):
    enter.libc.capset(KEPT, KEPT, 0)
    told.update({name: call(*CALLS[name]) for name in wanted})
    enter._become(*ids)
    enter.libc.capset(0, KEPT, 0)
    enter.libc.set_dumpable(False)
enter.park = attack
"""
)


async def test_capabilities_that_a_guest_keeps_are_seen(boxes: Open) -> None:
    box = await boxes()
    await box.ok("x = 1")
    await box.ok(PATCH + "enter.park = keep; x = 2")
    ran = await box.run("print(x)")
    assert ran.text() == "1\n"
    assert "CapEff ['00000000002400c0'] where" in " ".join(ran.result.notes), ran.said()


async def test_they_would_be_kept_if_nobody_looked(
    boxes: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pod, "_verify", lambda *_: None)
    box = await boxes("rlimits")  # a session of its own; the guard that is off does not matter
    await box.ok("x = 1")
    await box.ok(PATCH + "enter.park = keep; x = 2")
    ran = await box.run("print(x)")
    assert ran.text() == "2\n", ran.said()
    await forget(box)


KEEPING = (
    PATCH
    + """
enter.park = park
def keep_on_entering(fds, uid, gid):
    enter.libc.capset(KEPT, KEPT, 0)
    for fd in fds: enter.libc.setns(fd)
    enter._become(uid, gid)
    call("capset", b"", b"")
    enter.libc.set_dumpable(True)
enter.enter = keep_on_entering
"""
)


async def test_a_guest_that_keeps_them_on_entering_runs_no_cell(boxes: Open) -> None:
    box = await boxes()
    await box.ok("x = 1")
    await box.ok(KEEPING + "x = 2")
    ran = await box.run("print(x); " + _CAPABILITIES)
    assert ran.text() == "1\n0\n", ran.said()
    assert AS_BEFORE in " ".join(ran.result.notes)


async def test_it_would_if_nobody_looked(boxes: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pod, "_verify", lambda *_: None)
    box = await boxes("hidepid")  # a session of its own
    await box.ok(KEEPING)
    assert int((await box.run(_CAPABILITIES)).text()) == 0x2400C0
    await forget(box)


_CAPABILITIES = (
    "print(int([l for l in open('/proc/self/status') if l.startswith('CapEff')][0].split()[1], 16))"
)


@pytest.mark.parametrize(
    ("guards", "wanted", "seen"),
    [
        ((), "tuple(CALLS)", {"EPERM"}),
        ((WINDOW.guard,), "('mount', 'open_tree')", {"ok"}),
    ],
    ids=["refused", "twin"],
)
async def test_the_window_is_good_for_nothing(
    boxes: Open, guards: tuple[str, ...], wanted: str, seen: set[str]
) -> None:
    box = await boxes(*guards)
    await box.ok(f"{PATCH}wanted = {wanted}")
    # The next child was forked before its parent parked; after a roll back one is forked from
    # the head, which knows what it was told.
    assert (await box.run("os._exit(1)")).outcome is Outcome.EXITED
    told = await box.value("told")
    assert told
    assert set(told.values()) == seen, told
    await forget(box)


async def test_the_wrong_call_in_the_window_shuts_it(boxes: Open) -> None:
    box = await boxes()
    await box.ok("x = 1")
    shut = "attack = lambda *ids: (arm(), call('setns', 0, 0), park(*ids))\nenter.park = attack"
    await box.ok(f"{PATCH}x = 2\n{shut}")
    ran = await box.run("print(x)")
    assert ran.text() == "1\n", ran.said()
    assert AS_BEFORE in " ".join(ran.result.notes)
