"""Sessions of several users at once: what one does to itself, no other notices.

Run as root, who becomes each of them through a login of its own. The name keeps pytest from
collecting it on a machine that does not have these users.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.inside import talk
from tests.vm.inside.talk import Program

USERS = ("root", "ranged", "plain")
EXHAUST = "held = []\nwhile True: held.append(bytearray(8 << 20))"


@pytest.fixture(scope="module")
def logins() -> Iterator[dict[str, Program]]:
    """Start all sessions, and expect each to end well."""
    found = {user: Program(talk.login(user, talk.module("cells"))) for user in USERS}
    yield found
    assert {user: login.close() for user, login in found.items()} == dict.fromkeys(USERS, 0)


def user_ids(pid: int) -> set[int]:
    """Give the user ids of a process as the machine sees them."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return set()
    found = re.search(r"^Uid:\s+(.*)$", status, re.MULTILINE)
    return {int(word) for word in found[1].split()} if found else set()


def oom_kills(path: str) -> int:
    """Give how many processes of a group, and of those below it, the memory limit has killed."""
    words = (Path(path) / "memory.events").read_text().split()
    return int(words[words.index("oom_kill") + 1])


def test_no_two_users_share_an_id(logins: dict[str, Program]) -> None:
    ids = {
        user: set().union(*map(user_ids, login.run("pass")["pids"]))
        for user, login in logins.items()
    }
    assert all(ids.values()), ids
    # The init of root's session is of a range of its own too; nobody's session is root.
    assert 0 not in set().union(*ids.values()), ids
    assert ids["plain"] == {1001}, ids
    for one in USERS:
        for other in USERS:
            assert one == other or not ids[one] & ids[other], ids


def test_the_session_of_a_user_is_in_the_cgroup_of_the_user(logins: dict[str, Program]) -> None:
    for user, number in (("ranged", 1000), ("plain", 1001)):
        inside = f"/sys/fs/cgroup/user.slice/user-{number}.slice/user@{number}.service/"
        assert all(path.startswith(inside) for path in logins[user].begun["cgroups"])


@pytest.mark.parametrize("victim", USERS)
@pytest.mark.parametrize(
    ("code", "outcome"), [(EXHAUST, "memory"), ("import os; os.kill(-1, 9)", None)]
)
def test_what_one_user_suffers_no_other_notices(
    logins: dict[str, Program], victim: str, code: str, outcome: str | None
) -> None:
    others = {user: logins[user] for user in USERS if user != victim}
    for login in others.values():
        before = login.run("import os; kept = bytearray(64 << 20); pid = os.getpid()")
        assert before["outcome"] == "ok", before["said"]
    kills = {user: oom_kills(login.begun["cgroups"][0]) for user, login in others.items()}
    logins[victim].run("state = 'before'")

    logins[victim].send(code)
    for login in others.values():
        # While it happens, and in the same variables.
        during = login.run("len(kept), os.path.exists('/workspace')")
        assert during["outcome"] == "ok", during["said"]
    suffered = logins[victim].answer()
    assert outcome is None or suffered["outcome"] == outcome, suffered["said"]

    assert logins[victim].run("print(state)")["text"] == "before\n"
    for login in others.values():
        after = login.run("print(len(kept) >> 20); del kept")
        assert (after["outcome"], after["text"]) == ("ok", "64\n"), after["said"]
    now = {user: oom_kills(login.begun["cgroups"][0]) for user, login in others.items()}
    assert now == kills
