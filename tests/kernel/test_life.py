"""Start, restart, shutdown, and every violent death: what is lost, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration import leaks
from tests.kernel import traces
from tests.kernel.live import NAME, Live

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.needs("kernel")]

Start = Callable[..., Live]


def settled(kernel: Live) -> traces.Traces:
    """Note what there is when the last cell is committed, and its guest the one head."""
    if kernel.is_free():  # inspections wait for the commit; a cell that runs has done so
        kernel.ask("inspect_request", {"code": "x", "cursor_pos": 1, "detail_level": 0})
    assert leaks.until(lambda: len(kernel.traces().heads) == 1)
    return kernel.traces()


SLEEPER = "import time; print('up', flush=True)\nwhile True: time.sleep(1)"


def test_shutdown_leaves_nothing(start: Start) -> None:
    kernel = start()
    kernel.ok("x = 1")
    noted = settled(kernel)
    assert noted.cgroups
    kernel.manager.shutdown_kernel()
    noted.assert_dead(within_s=0.5)


def test_shutdown_at_once_after_the_start_leaves_nothing(start: Start) -> None:
    kernel = start()
    noted = kernel.traces()
    kernel.manager.shutdown_kernel()
    noted.assert_dead(within_s=0.5)


def test_shutdown_ends_a_running_cell(start: Start) -> None:
    kernel = start()
    kernel.until_text(kernel.send(SLEEPER), "up")
    noted = kernel.traces()
    kernel.manager.shutdown_kernel()
    noted.assert_dead(within_s=0.5)


def test_a_shutdown_request_is_answered(start: Start) -> None:
    kernel = start()
    noted = kernel.traces()
    assert kernel.ask("shutdown_request", {"restart": False}, channel="control") == {
        "status": "ok",
        "restart": False,
    }
    noted.assert_dead()


def test_restart_begins_a_new_session(start: Start) -> None:
    kernel = start()
    kernel.ok("x = 1; open('made', 'w').close()")
    noted = kernel.traces()
    kernel.manager.restart_kernel()
    noted.assert_dead(within_s=0.5)
    kernel.client.wait_for_ready(timeout=60)
    assert kernel.run("x").content["ename"] == "NameError"
    assert kernel.value("__import__('os').path.exists('made')") == "False"
    assert kernel.pid != noted.kernel


def test_restart_by_force_in_a_running_cell(start: Start) -> None:
    kernel = start()
    kernel.until_text(kernel.send(SLEEPER), "up")
    noted = kernel.traces()
    kernel.manager.restart_kernel(now=True)
    noted.assert_dead()
    kernel.client.wait_for_ready(timeout=60)
    assert kernel.value("1 + 1") == "2"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_signal_to_the_kernel(start: Start, number: signal.Signals, busy: bool) -> None:
    kernel = start()
    kernel.ok("x = 1")
    if busy:
        kernel.until_text(kernel.send(SLEEPER), "up")
    noted = kernel.traces()
    os.kill(kernel.pid, number)
    noted.assert_dead()


def test_sigint_is_ignored(start: Start) -> None:
    kernel = start()
    kernel.ok("x = 1")
    os.kill(kernel.pid, signal.SIGINT)
    assert kernel.value("x") == "1"


def init(noted: traces.Traces) -> int:
    return noted.init


def monitor(noted: traces.Traces) -> int:
    return noted.monitor


def head(noted: traces.Traces) -> int:
    # The one before may be dying yet, and the next child be about to leave for its place.
    assert leaks.until(lambda: len(noted.heads) == 1)
    (pid,) = noted.heads
    return pid


@pytest.mark.parametrize("victim", [init, monitor, head])
def test_a_death_while_idle_costs_the_session_and_no_more(
    start: Start, victim: Callable[[traces.Traces], int]
) -> None:
    kernel = start()
    kernel.ok("x = 1")
    noted = settled(kernel)
    traces.kill(victim(noted))
    noted.assert_gone()
    lost = kernel.run("x")
    assert [error["ename"] for error in lost.of("error")] == ["SessionLost"]
    assert lost.content["ename"] == "SessionLost"
    assert "lost" in lost.content["evalue"]
    assert kernel.run("x").content["ename"] == "NameError"
    assert kernel.value("1 + 1") == "2"


@pytest.mark.parametrize("victim", [init, monitor, head])
def test_a_death_under_a_running_cell_is_told_at_once(
    start: Start, victim: Callable[[traces.Traces], int]
) -> None:
    kernel = start()
    kernel.ok("x = 1")
    msg_id = kernel.send(SLEEPER)
    kernel.until_text(msg_id, "up")
    noted = settled(kernel)
    traces.kill(victim(noted))
    lost = kernel.result(msg_id, timeout_s=10)
    noted.assert_gone()
    assert [error["ename"] for error in lost.of("error")] == ["SessionLost"]
    assert lost.content["ename"] == "SessionLost"
    assert kernel.value("1 + 1") == "2"


def test_sessions_can_be_lost_again_and_again(start: Start) -> None:
    kernel = start()
    for number in range(3):
        assert kernel.value(f"x = {number}; x") == str(number)
        noted = kernel.traces()
        traces.kill(noted.init)
        noted.assert_gone()
        assert kernel.run("x").content["ename"] == "SessionLost"


CLIENT = f"""
import sys
from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name={NAME!r})
manager.start_kernel(cwd=sys.argv[1])
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=60)
msg_id = client.execute(sys.argv[2])
while client.get_iopub_msg(timeout=60)["msg_type"] != "stream":
    pass
print(manager.provisioner.process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("code", ["print('up')", SLEEPER], ids=["idle", "busy"])
def test_the_loss_of_the_client_ends_the_kernel(tmp_path: Path, code: str) -> None:
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(tmp_path), code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with client:
        assert client.stdout is not None
        kernel_pid = int(client.stdout.readline())
        noted = traces.Traces.of(kernel_pid)
        assert noted.cgroups
        client.kill()
    assert leaks.until(lambda: not leaks.runs(kernel_pid))
    noted.assert_dead()


def test_what_a_killed_kernel_and_monitor_left_is_swept_at_the_next_start(start: Start) -> None:
    kernel = start()
    noted = kernel.traces()
    for pid in (kernel.pid, noted.monitor):
        os.kill(pid, signal.SIGSTOP)
    for pid in (noted.monitor, kernel.pid):
        traces.kill(pid)
    assert leaks.until(lambda: not noted.left().get("processes"))
    start()
    noted.assert_gone()


def test_two_kernels_share_no_user_and_no_process(start: Start) -> None:
    code = "import os; [os.readlink(f'/proc/self/ns/{kind}') for kind in ('user', 'pid')]"
    one, other = start(), start()
    assert not set(eval(one.value(code))) & set(eval(other.value(code)))
    assert one.traces().user_ids()
    assert not one.traces().user_ids() & other.traces().user_ids()


def test_two_kernels_at_work_do_not_see_each_other(start: Start) -> None:
    one, other = start(), start()
    msg_id = one.send(SLEEPER)
    one.until_text(msg_id, "up")
    seen = "import os; sorted(int(n) for n in os.listdir('/proc') if n.isdigit())"
    assert len(eval(other.value(seen))) <= 3
    killed = other.run("import os; os.kill(-1, 9); os.kill(os.getpid(), 9)")
    assert killed.content["ename"] == "CellCrashed"
    one.manager.interrupt_kernel()
    assert one.result(msg_id).content["ename"] == "KeyboardInterrupt"
