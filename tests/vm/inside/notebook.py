"""Run cells in a real kernel that Jupyter's client has started: code in, what came of it out.

Lines of JSON both ways. A request is code, or null for the cgroup of a cell that runs. Jupyter has
folders of its own here, so the user needs no home.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from sandbox_kernel.cli.main import run_command
from tests.integration import leaks
from tests.kernel import live
from tests.kernel.live import Live

SETTINGS = {"memory": "192M", "grace": "1s"}


def say(**facts: Any) -> None:
    """Tell the test one thing."""
    print(json.dumps(facts), flush=True)


def group_of(pid: int | str) -> str:
    """Give the v2 group of a process, as this process may see it."""
    lines = Path(f"/proc/{pid}/cgroup").read_text("utf-8").splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))


def group_of_cell(kernel: Live) -> str:
    """Give the group of a cell, which waits meanwhile."""
    running = kernel.send("import os; input(str(os.getpid()))", allow_stdin=True)
    inside = kernel.question()["prompt"]
    (pid,) = (pid for pid in leaks.session_processes(kernel.pid) if _inner(pid) == inside)
    found = group_of(pid)
    kernel.client.input("")
    kernel.result(running)
    return found


def _inner(pid: int) -> str:
    """Give the number of a process in its own PID namespace."""
    lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    return next(line.split()[-1] for line in lines if line.startswith("NSpid:"))


def answer(kernel: Live, request: str | None) -> None:
    """Do what was asked for, and say what came of it."""
    if request is None:
        say(cgroup=group_of_cell(kernel))
        return
    ran = kernel.run(request)
    content = ran.content
    notices = ran.text("stderr")
    error = live.plain(content.get("evalue", ""))
    say(
        status=ran.status,
        ename=content.get("ename", ""),
        evalue=error,
        text=ran.text(),
        notices=notices,
    )


def jupyter(base: Path) -> None:
    """Give Jupyter its folders, and install the kernelspec there as a user would."""
    os.environ["JUPYTER_PATH"] = str(base / "share/jupyter")
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        os.environ[name] = str(base / name.lower())
    with contextlib.redirect_stdout(sys.stderr):
        status = run_command(["install", f"--prefix={base}"])
    if status:
        sys.exit(status)


def main() -> None:
    """Keep one kernel until there is no more to do."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        notebooks = base / "notebooks"
        notebooks.mkdir()
        jupyter(base)
        own = group_of("self")
        kernel = live.start(notebooks, *live.settings(**SETTINGS))
        try:
            say(own=own, kernel=group_of(kernel.pid), uid=os.geteuid())
            for line in sys.stdin:
                answer(kernel, json.loads(line))
        finally:
            kernel.end()


if __name__ == "__main__":
    main()
