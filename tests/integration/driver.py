"""A small driver over `session.Session`, as the integration tests use it."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox_kernel.config import SandboxConfig, limits_of
from sandbox_kernel.image.host import host_image
from sandbox_kernel.model import (
    CellResult,
    Event,
    Execution,
    InputRequest,
    Limits,
    Message,
    Outcome,
    SessionSpec,
    Stream,
)
from sandbox_kernel.session.session import Session
from tests.integration import leaks

DEFAULTS = limits_of(SandboxConfig())
GRACE_S = 1.0
CELL_TIMEOUT_S = 30.0
PAST_PRINT_S = 0.03

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def plain(text: str) -> str:
    """Give `text` without terminal colours."""
    return _COLOURS.sub("", text)


@dataclass
class Ran:
    """One cell that has ended: its result and what it gave away."""

    result: CellResult
    events: list[Event]

    @property
    def outcome(self) -> Outcome:
        return self.result.outcome

    def text(self, name: str = "stdout") -> str:
        """Give all that came on a standard stream."""
        return "".join(e.text for e in self.events if isinstance(e, Stream) and e.name == name)

    def messages(self, msg_type: str) -> list[Message]:
        """Give the messages of one type."""
        return [e for e in self.events if isinstance(e, Message) and e.msg_type == msg_type]

    @property
    def trace(self) -> str:
        """Give the traceback, of the error or of where a time limit found the cell."""
        lines = list(self.result.traceback) or list(self.result.reply.get("traceback", []))
        return plain("\n".join(lines))

    def said(self) -> str:
        """Say all there is, for the message of a failed assertion."""
        return (
            f"{replace(self.result, reply={})}\n{self.trace}\n{plain(self.text('stderr'))[-3000:]}"
        )


@dataclass
class Driver:
    """One session and the shortest way to run cells in it."""

    session: Session
    limits: Limits
    workspace: Path
    broken: bool = False
    count: int = 0
    seen: list[Event] = field(default_factory=list)

    async def run(
        self,
        code: str,
        *,
        timeout_s: float = CELL_TIMEOUT_S,
        on_event: Callable[[Event], None] | None = None,
        allow_stdin: bool = False,
        silent: bool = False,
        expressions: dict[str, str] | None = None,
        **limits: Any,
    ) -> Ran:
        """Run a cell; `limits` are fields of Limits that differ from the session's."""
        self.count += 1
        events: list[Event] = []

        def sink(event: Event) -> None:
            events.append(event)
            if on_event is not None:
                on_event(event)

        execution = Execution(
            code,
            silent=silent,
            store_history=not silent,
            execution_count=self.count,
            allow_stdin=allow_stdin,
            user_expressions=expressions or {},
        )
        running = self.session.execute(execution, replace(self.limits, **limits), sink)
        try:
            return Ran(await asyncio.wait_for(running, timeout_s), events)
        except BaseException:
            self.broken = True
            raise

    async def ok(self, code: str, **options: Any) -> str:
        """Run a cell that must end well; give its stdout."""
        ran = await self.run(code, **options)
        assert ran.outcome is Outcome.OK, ran.said()
        assert ran.result.committed
        return ran.text()

    async def value(self, expression: str, **options: Any) -> Any:
        """Give the value of an expression that the session evaluates to a literal."""
        return ast.literal_eval(await self.ok(f"print(repr({expression}))", **options))

    async def interrupted(self, code: str, *, at: str = "up", **options: Any) -> Ran:
        """Run a cell and interrupt it when it has printed `at`, or asks for input."""
        loop = asyncio.get_running_loop()
        acted = False

        def act(event: Event) -> None:
            nonlocal acted
            printed = isinstance(event, Stream) and at in event.text
            if not acted and (printed or isinstance(event, InputRequest)):
                acted = True
                # By then the cell has most often come to what follows its print; it must be
                # interrupted wherever it is.
                loop.call_later(PAST_PRINT_S, self.session.interrupt)

        return await self.run(code, on_event=act, **options)

    # ---- the session seen from the host

    @property
    def lost(self) -> bool:
        pod = self.session._begun
        return pod is None or pod.failure is not None

    @property
    def cgroups(self) -> tuple[str, ...]:
        return self.session._pod.cgroup.paths

    def processes(self) -> set[int]:
        """Give all processes of the session."""
        return set().union(*map(leaks.processes_in, self.cgroups))

    def in_group(self, name: str) -> set[int]:
        """Give the processes of the session's group `name`: init or heads."""
        return set().union(*(leaks.processes_in(f"{path}/{name}") for path in self.cgroups))

    def cell_groups(self) -> set[str]:
        """Give the names of the cells' groups that exist."""
        names: set[str] = set()
        for path in self.cgroups:
            names.update(name for name in os.listdir(path) if name.startswith("cell-"))
        return names


def make_spec(workspace: Path, limits: Limits = DEFAULTS, **changes: Any) -> SessionSpec:
    """Give the spec of a session as the kernel would, with a folder for the notebook."""
    spec = SessionSpec(
        session_id=secrets.token_hex(6),
        image=host_image(),
        workspace=str(workspace),
        workspace_mode="overlay",
        limits=limits,
        ceiling=limits,
        grace_s=GRACE_S,
    )
    return replace(spec, **changes)


async def start(workspace: Path, limits: Limits = DEFAULTS, **changes: Any) -> Driver:
    """Start a session and wait until it can run cells."""
    session = Session(make_spec(workspace, limits, **changes))
    session.begin()
    try:
        await asyncio.wait_for(session.ready(), CELL_TIMEOUT_S)
    except BaseException:
        await session.close()
        raise
    return Driver(session, limits, workspace)


async def stop(driver: Driver) -> None:
    """Close a session within a bounded time."""
    await asyncio.wait_for(driver.session.close(), 10)


async def assert_quiet(driver: Driver) -> None:
    """Assert that a session between two cells is init, guests that wait, and nothing else."""

    def noise() -> list[str]:
        found = []
        if len(groups := driver.cell_groups()) > 3:  # the next, a spare, and a resident one
            found.append(f"groups {sorted(groups)}")
        # Init, the builder of the spare, the head, the next child.
        if len(pids := driver.processes()) > 5:
            found.append(f"processes {sorted(pids)}")
        zombies = [pid for pid in pids if leaks.state(pid) == "Z"]
        if zombies:
            found.append(f"zombies {zombies}")
        return found

    deadline_s = asyncio.get_running_loop().time() + leaks.GONE_S
    while (found := noise()) and asyncio.get_running_loop().time() < deadline_s:
        await asyncio.sleep(0.02)  # the session itself may have work to do: let it
    assert not found, found
    assert not leaks.zombies(), leaks.zombies()


@dataclass
class Shared:
    """The session that the tests of a module share; a broken one is replaced."""

    folder: Path
    driver: Driver | None = None
    before: leaks.Snapshot | None = None

    async def get(self) -> Driver:
        if self.driver is not None and (self.driver.broken or self.driver.lost):
            await self.end(check=False)
        if self.driver is None:
            self.before = leaks.Snapshot()
            self.driver = await start(self.folder)
        return self.driver

    async def end(self, *, check: bool = True) -> None:
        if self.driver is None:
            return
        driver, self.driver = self.driver, None
        await stop(driver)
        if check and not driver.broken:
            assert self.before is not None
            self.before.assert_clean()
