"""The map of a session's ids: from the tables of subordinate ids to the maps in /proc."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import idmap, idmap_tables, libc
from sandbox_kernel.linux.idmap import ID_COUNT, IdMap, high, nested, single, subordinate

ME = {"table": "/etc/subuid", "uid": 1000, "name": "me"}
LAST = (1 << 32) - 2


def mapped(extents: tuple[idmap.Extent, ...]) -> dict[int, int]:
    """Give each id inside with the one outside; an id that is mapped twice is an error."""
    pairs = [(i + n, o + n) for i, o, count in extents for n in range(count)]
    assert len({outside for _, outside in pairs}) == len(dict(pairs)) == len(pairs)
    return dict(pairs)


# The three kinds.


def test_root_gives_a_range_of_its_own() -> None:
    ids = high(1 << 30)
    assert (ids.kind, ids.root, ids.is_alone) == ("high", 0, False)
    assert ids.outside_uid(0) == ids.outside_gid(0) == 1 << 30
    assert ids.outside_uid(1023) == (1 << 30) + 1023


def test_a_single_id_is_the_cells_and_inits_and_the_heads() -> None:
    ids = single(501, 20)
    assert (ids.kind, ids.root, ids.is_alone) == ("single", 1000, True)
    assert (ids.outside_uid(1000), ids.outside_gid(1000)) == (501, 20)


def test_with_a_range_the_cell_is_the_user_himself() -> None:
    ids = subordinate((501, 20), ((100000, 65536),), ((200000, 65536),))
    assert (ids.kind, ids.root, ids.is_alone) == ("subordinate", 0, False)
    assert ids.uids == ((0, 100000, 1000), (1000, 501, 1), (1001, 101000, 23))
    assert ids.gids == ((0, 200000, 1000), (1000, 20, 1), (1001, 201000, 23))


def test_a_range_may_be_in_pieces() -> None:
    ids = subordinate((5, 5), ((10, 990), (2000, 20), (3000, 13)), ((50, 1023),))
    assert ids.uids == (
        (0, 10, 990),
        (990, 2000, 10),
        (1000, 5, 1),
        (1001, 2010, 10),
        (1011, 3000, 13),
    )


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=40).filter(lambda c: sum(c) >= ID_COUNT - 1)
)
def test_every_id_is_mapped_once_however_the_ranges_are_cut(counts: list[int]) -> None:
    ranges = tuple((10_000 * (n + 1), count) for n, count in enumerate(counts))
    uids = mapped(subordinate((7, 7), ranges, ranges).uids)
    assert uids.keys() == set(range(ID_COUNT))
    assert uids[1000] == 7
    allowed = [first + n for first, count in ranges for n in range(count)]
    assert [uids[i] for i in range(ID_COUNT) if i != 1000] == allowed[: ID_COUNT - 1]


def test_too_few_ids_are_refused() -> None:
    with pytest.raises(HostError, match="1022 subordinate ids are less than 1023"):
        subordinate((7, 7), ((100000, 1000), (200000, 22)), ((100000, 65536),))


@pytest.mark.parametrize(
    "ids",
    [high(1 << 30), single(5, 6), subordinate((5, 6), ((100, 1023),), ((100, 9), (300, 1014)))],
)
def test_a_map_survives_json(ids: IdMap) -> None:
    assert IdMap.from_json(json.loads(json.dumps(ids.as_json()))) == ids


def test_an_id_that_is_not_mapped_is_an_error() -> None:
    with pytest.raises(HostError, match="user id 0 is not mapped"):
        single(5, 6).outside_uid(0)
    with pytest.raises(HostError, match="group id 1024 is not mapped"):
        high(1 << 30).outside_gid(1024)


def test_a_namespace_inside_has_the_same_ids_line_by_line() -> None:
    inner = nested(subordinate((5, 6), ((100, 1023),), ((100, 9), (300, 1014))))
    assert inner.uids == ((0, 0, 1000), (1000, 1000, 1), (1001, 1001, 23))
    assert inner.gids == ((0, 0, 9), (9, 9, 991), (1000, 1000, 1), (1001, 1001, 23))
    assert (inner.root, inner.is_alone) == (0, False)
    assert nested(single(5, 6)) == IdMap("single", ((1000, 1000, 1),), ((1000, 1000, 1),))


# The tables.


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("me:100000:65536\n", ((100000, 65536),)),
        ("1000:100000:65536", ((100000, 65536),)),
        ("# of us\n\nyou:1:x\nyou:x:1\nyou\n:5:5\nme:200000:1023\n", ((200000, 1023),)),
        ("me:300000:1000\n1000:100000:23\n", ((100000, 23), (300000, 1000))),
        ("me:100000:65536\n1000:100000:65536\n", ((100000, 65536),)),
        ("me:100000:1000\nme:100500:1000\n1000:101500:500\n", ((100000, 2000),)),
        ("me:100000:1000\nme:100100:100\nme:200000:500\n", ((100000, 1000), (200000, 500))),
        ("you:100000:65536\nme:165536:65536\nthem:231072:65536\n", ((165536, 65536),)),
        (f"me:{LAST - 1022}:1023\n", ((LAST - 1022, 1023),)),
        ("me:100000:65536\r\n", ((100000, 65536),)),
    ],
)
def test_ranges_are_found(text: str, ranges: tuple[idmap_tables.Range, ...]) -> None:
    assert idmap.ranges(text, **ME) == ranges


@pytest.mark.parametrize(
    "line",
    [
        "me",
        "me:",
        "me:100000",
        "me:100000:",
        "me::65536",
        "me:x:65536",
        "me:100000:65536:1",
        "me:-1:65536",
        "me:+1:65536",
        "me:0x10:65536",
        "me:1e5:65536",
        "me:100000:0",
        "me:١٢٣:65536",
        "1000:100000:many",
        f"me:{LAST - 1022}:1024",
        f"me:{LAST + 1}:1",
        "me:1:99999999999",
        "me:" + "9" * 5000 + ":1",
    ],
)
def test_a_malformed_line_of_ones_own_is_named(line: str) -> None:
    with pytest.raises(
        HostError, match=r"/etc/subuid, line 3: .* is not NAME:FIRST:COUNT"
    ) as caught:
        idmap.ranges(f"\nme:100000:65536\n{line}\n", **ME)
    assert "mend" in caught.value.hint


@pytest.mark.parametrize(
    "other",
    ["you:100000:65536", "1001:99999:2", "you:165535:1", "you:50000:200000", "you:100010:1"],
)
def test_ids_of_two_users_are_nobodys(other: str) -> None:
    with pytest.raises(HostError, match=r"line 1: the ids 100000 to 165535 overlap.*line 2, of"):
        idmap.ranges(f"me:100000:65536\n{other}\n", **ME)


def test_a_range_with_the_own_id_or_that_of_another_is_refused() -> None:
    with pytest.raises(HostError, match=r"line 1: .* hold 1000, which is somebody's own"):
        idmap.ranges("me:500:1023\n", **ME)
    with pytest.raises(HostError, match="hold 120000, which"):
        idmap.ranges("me:100000:65536\n", **ME, taken={120000, 130000})
    assert idmap.ranges("me:500:1023\n", **ME, taken={1, 499, 1523})


def test_too_small_ranges_are_named_with_their_lines() -> None:
    with pytest.raises(HostError, match="line 1 and /etc/subuid, line 3: 1022 ids for 1000 or me"):
        idmap.ranges("me:100000:1000\n\nme:200000:22\n", **ME)


def test_without_a_range_the_remedy_names_one_that_is_free() -> None:
    text = "you:100000:65536\nthem:300000:10\nme2:5:5\n"
    with pytest.raises(HostError, match="/etc/subuid has no range for 1000 or me") as caught:
        idmap.ranges(text, **ME, taken={1000, 300500})
    assert "echo me:300501:65536 >> /etc/subuid" in caught.value.hint


@given(st.text(alphabet="me:0123456789\n #you-x", max_size=80))
def test_no_text_of_a_table_is_worse_than_an_error_or_a_range(text: str) -> None:
    try:
        found = idmap.ranges(text, **ME)
    except HostError as error:
        assert error.message.startswith("/etc/subuid")
    else:
        assert sum(count for _, count in found) >= 1023
        assert all(start + count - 1 <= LAST for start, count in found)


def test_ids_that_people_have_are_read_from_their_tables() -> None:
    assert set(idmap_tables.taken_ids("root:x:0:0::/:\n#\nme:x:1000:1000:\nodd:x:y\n")) == {0, 1000}


# The choice.


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a folder before all others on PATH, with tools that say yes and do nothing."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("newuidmap", "newgidmap"):
        write_tool(tmp_path / name, "exit 0")
    return tmp_path


def write_tool(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_tools_are_looked_for_along_the_path(tools: Path) -> None:
    assert idmap.tools() == (f"{tools}/newuidmap", f"{tools}/newgidmap")


@pytest.mark.parametrize("name", ["newuidmap", "newgidmap"])
def test_a_missing_tool_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: known(path) and not path.endswith(name))
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    if not known("/usr/bin/newuidmap"):
        monkeypatch.setattr(os.path, "isfile", lambda path: not path.endswith(name))
    with pytest.raises(HostError, match=f"there is no {name}") as caught:
        idmap.tools()
    assert "uidmap" in caught.value.hint
    ids, reason = idmap.choose(501, 20)
    assert ids == single(501, 20)
    assert reason.startswith(f"there is no {name} (")


def tables(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    monkeypatch.setattr(idmap, "read", lambda path: texts.get(os.path.basename(path), ""))
    monkeypatch.setattr(idmap, "user_name", lambda uid: "me")


def test_the_ranges_of_both_tables_are_chosen(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables(monkeypatch, subuid="me:100000:65536\n", subgid="501:200000:65536\n")
    ids, reason = idmap.choose(501, 20)
    assert (ids.kind, reason) == ("subordinate", "")
    assert (ids.outside_uid(0), ids.outside_gid(0)) == (100000, 200000)
    assert (ids.outside_uid(1000), ids.outside_gid(1000)) == (501, 20)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({}, "/etc/subuid has no range for 501 or me"),
        ({"subuid": "me:100000:65536"}, "/etc/subgid has no range for 501 or me"),
        ({"subuid": "me:100000:x"}, "/etc/subuid, line 1"),
        ({"subuid": "me:1000:65536", "passwd": "you:x:1001:1001::/:\n"}, "hold 1001"),
        (
            {"subuid": "me:100000:65536", "subgid": "me:1000:65536", "group": "us:x:1002:\n"},
            "/etc/subgid, line 1: the ids 1000 to 66535 hold 1002",
        ),
    ],
)
def test_a_fault_of_the_tables_leaves_a_single_id_and_says_why(
    tools: Path, monkeypatch: pytest.MonkeyPatch, texts: dict[str, str], reason: str
) -> None:
    tables(monkeypatch, **texts)
    ids, why = idmap.choose(501, 20)
    assert ids == single(501, 20)
    assert reason in why


def test_a_table_that_cannot_be_read_is_a_reason(tmp_path: Path) -> None:
    assert idmap_tables.read(str(tmp_path / "none")) == ""
    with pytest.raises(HostError, match="cannot be read: Is a directory"):
        idmap_tables.read(str(tmp_path))


# Writing.


@contextmanager
def namespace() -> Iterator[int]:
    """Give a process in a user namespace without a map."""
    pid = libc.clone(libc.CLONE_NEWUSER)
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def maps_of(pid: int) -> list[list[list[int]]]:
    texts = [Path(f"/proc/{pid}/{kind}_map").read_text() for kind in ("uid", "gid")]
    return [[[int(n) for n in line.split()] for line in text.splitlines()] for text in texts]


@pytest.mark.needs("user_namespace")
def test_a_single_id_is_written_and_groups_are_given_up() -> None:
    with namespace() as pid:
        idmap.write(pid, single(os.geteuid(), os.getegid()))
        assert maps_of(pid) == [[[1000, os.geteuid(), 1]], [[1000, os.getegid(), 1]]]
        assert Path(f"/proc/{pid}/setgroups").read_text() == "deny\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives ids away")
@pytest.mark.needs("id_range")
def test_a_high_range_is_written_and_groups_stay() -> None:
    with namespace() as pid:
        idmap.write(pid, high(1 << 30))
        assert maps_of(pid) == [[[0, 1 << 30, 1024]]] * 2
        assert Path(f"/proc/{pid}/setgroups").read_text() == "allow\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root needs no subordinate ids")
def test_the_own_range_is_written_by_the_tools() -> None:
    ids, why = idmap.choose(os.geteuid(), os.getegid())
    if ids.kind == "single":
        pytest.skip(f"this user has no ranges: {why}")
    with namespace() as pid:
        idmap.write(pid, ids)
        assert maps_of(pid) == [[list(e) for e in ids.uids], [list(e) for e in ids.gids]]


@pytest.mark.needs("user_namespace")
def test_a_map_is_written_once() -> None:
    with namespace() as pid:
        idmap.write(pid, single(os.geteuid(), os.getegid()))
        with pytest.raises(PermissionError, match=rf"/proc/{pid}/setgroups|/proc/{pid}/uid_map"):
            idmap.write(pid, single(os.geteuid(), os.getegid()))


SUBORDINATE = subordinate((501, 20), ((100000, 65536),), ((200000, 65536),))


def test_a_tool_gets_the_lines_and_nothing_of_the_environment(tools: Path, tmp_path: Path) -> None:
    write_tool(tools / "newgidmap", f'echo "$*" > {tmp_path}/said; env > {tmp_path}/env')
    with pytest.raises(HostError, match="wrote another map"):
        idmap.write(os.getpid(), SUBORDINATE)
    lines = "0 200000 1000 1000 20 1 1001 201000 23"
    assert (tmp_path / "said").read_text() == f"{os.getpid()} {lines}\n"
    assert "HOME" not in (tmp_path / "env").read_text()


def test_a_tool_that_says_yes_and_does_nothing_is_caught(tools: Path) -> None:
    with pytest.raises(HostError, match="newuidmap wrote another map than it was told to"):
        idmap.write(os.getpid(), SUBORDINATE)


@pytest.mark.parametrize("name", ["newuidmap", "newgidmap"])
def test_a_tool_that_fails_is_quoted(tools: Path, name: str) -> None:
    write_tool(tools / name, 'echo "uid range"; echo "range not\n allowed" >&2; exit 1')
    with pytest.raises(HostError, match=f"/{name} failed: range not allowed") as caught:
        idmap.write(os.getpid(), SUBORDINATE)
    assert "setuid" in caught.value.hint


def test_a_tool_that_fails_in_silence_or_is_killed_gives_its_status(tools: Path) -> None:
    write_tool(tools / "newgidmap", "exit 3")
    with pytest.raises(HostError, match="newgidmap failed: status 3"):
        idmap.write(os.getpid(), SUBORDINATE)
    write_tool(tools / "newgidmap", "kill -9 $$")
    with pytest.raises(HostError, match="newgidmap failed: status -9"):
        idmap.write(os.getpid(), SUBORDINATE)


def test_a_tool_that_cannot_be_run_is_named(tools: Path) -> None:
    (tools / "newgidmap").write_text("#!/nonexistent/sh\n")
    with pytest.raises(HostError, match="newgidmap cannot be run: No such file"):
        idmap.write(os.getpid(), SUBORDINATE)


def test_a_tool_that_floods_is_cut(tools: Path) -> None:
    write_tool(tools / "newgidmap", "seq 1 50000 >&2; echo the end >&2; exit 1")
    with pytest.raises(HostError, match="49999 50000 the end") as caught:
        idmap.write(os.getpid(), SUBORDINATE)
    assert len(caught.value.message) < 1200


@pytest.mark.parametrize(
    "script", ["exec tail -f /dev/null", "exec tail -f /dev/null 2>&-", "exec yes >&2"]
)
def test_a_tool_that_hangs_is_killed(
    tools: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(idmap, "TOOL_TIMEOUT_S", 0.2)
    write_tool(tools / "newgidmap", script)
    with pytest.raises(HostError, match=r"newgidmap does not end after 0\.2 s"):
        idmap.write(os.getpid(), SUBORDINATE)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_without_new_privileges_the_remedy_says_so(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tool(tools / "newgidmap", "exit 1")
    known = idmap.read

    def read(path: str) -> str:
        return known(path).replace("NoNewPrivs:\t0", "NoNewPrivs:\t1")

    monkeypatch.setattr(idmap, "read", read)
    with pytest.raises(HostError) as caught:
        idmap.write(os.getpid(), SUBORDINATE)
    assert "NoNewPrivileges" in caught.value.hint
