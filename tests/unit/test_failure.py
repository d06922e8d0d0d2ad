"""Why a session could not be set up, in words that say what to do."""

from __future__ import annotations

import errno

import pytest

from sandbox_kernel.container.failure import failed


@pytest.mark.parametrize(
    ("number", "text", "hint"),
    [
        (errno.ENOSPC, "clone: No space left on device", "sysctl -w user.max_user_namespaces="),
        (errno.EAGAIN, "clone: Resource temporarily unavailable", "pids.max"),
        (errno.EMFILE, "pipe: Too many open files", "ulimit -n"),
    ],
)
def test_what_the_system_refuses_comes_with_a_remedy(number: int, text: str, hint: str) -> None:
    message = failed(OSError(number, text), "set up the session")
    assert message["cause"] == text
    assert hint in message["hint"]


def test_a_file_is_named_and_no_remedy_is_made_up() -> None:
    message = failed(OSError(errno.ENOENT, "No such file or directory", "/x"), "mount")
    assert message == {
        "op": "failed",
        "step": "mount",
        "cause": "No such file or directory (/x)",
        "hint": "",
    }
