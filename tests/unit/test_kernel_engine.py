from __future__ import annotations

import pytest

from sandbox_kernel.errors import (
    ConfigError,
    HostError,
    LaunchError,
    ProtocolError,
    SandboxError,
    SessionLost,
)
from sandbox_kernel.kernel.engine import Engine, SessionHolder
from sandbox_kernel.model import CellResult, Outcome, SessionSpec, Usage
from tests.fakes.session import CEILING, SPEC, FakeSession

RESULT = CellResult(Outcome.OK, True, Usage(wall_s=2.0, output_bytes=5), CEILING, "id")


class Opener:
    def __init__(self) -> None:
        self.opened: list[FakeSession] = []
        self.error: SandboxError | None = None

    def __call__(self, spec: SessionSpec) -> Engine:
        if self.error is not None:
            raise self.error
        self.opened.append(FakeSession(spec))
        return self.opened[-1]


@pytest.fixture
def opener() -> Opener:
    return Opener()


@pytest.fixture
def holder(opener: Opener) -> SessionHolder:
    return SessionHolder(lambda: SPEC, opener)


def test_one_session_is_opened_and_kept(holder: SessionHolder, opener: Opener) -> None:
    assert holder.session is None
    assert holder.usage() is None
    assert holder.acquire() is holder.acquire()
    assert len(opener.opened) == 1


def test_an_adopted_session_is_used(holder: SessionHolder, opener: Opener) -> None:
    session = FakeSession()
    holder.adopt(SPEC, session)
    assert holder.acquire() is session
    assert opener.opened == []


def test_failing_to_open_leaves_it_empty(holder: SessionHolder, opener: Opener) -> None:
    opener.error = HostError("no")
    with pytest.raises(HostError):
        holder.acquire()
    assert holder.session is None
    opener.error = None
    assert holder.acquire() is opener.opened[0]


@pytest.mark.parametrize("error", [HostError("x"), LaunchError("fork", "x")])
def test_a_session_that_never_ran_is_dropped(holder: SessionHolder, error: SandboxError) -> None:
    holder.acquire()
    assert "tries again" in holder.fail(error)
    assert holder.session is None


@pytest.mark.parametrize("error", [HostError("x"), LaunchError("fork", "x"), ProtocolError("x")])
def test_a_session_with_state_is_kept(holder: SessionHolder, error: SandboxError) -> None:
    session = holder.acquire()
    holder.record(RESULT)
    holder.fail(error)
    assert holder.session is session


def test_a_setting_that_is_wrong_costs_nothing(holder: SessionHolder) -> None:
    session = holder.acquire()
    assert holder.fail(ConfigError("x")) == ""
    assert holder.session is session


def test_a_lost_session_is_replaced(holder: SessionHolder, opener: Opener) -> None:
    holder.acquire()
    holder.record(RESULT)
    assert "variables are lost" in holder.fail(SessionLost("x"))
    assert holder.acquire() is opener.opened[1]
    assert holder.usage() is not None
    assert holder.usage().wall_s == 0.0  # type: ignore[union-attr]


def test_usage_adds_up(holder: SessionHolder) -> None:
    holder.acquire()
    holder.record(RESULT)
    holder.record(RESULT)
    usage = holder.usage()
    assert usage is not None
    assert (usage.wall_s, usage.output_bytes) == (4.0, 10)


async def test_close_is_for_good(holder: SessionHolder) -> None:
    holder.acquire()
    await holder.close()
    await holder.close()
    holder.kill()
    assert holder.fail(SessionLost("x")) == ""
    with pytest.raises(SessionLost, match="shutting down"):
        holder.acquire()
