"""Ranges of ids: no two sessions have the same, and who dies gives his back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import idclaim
from sandbox_kernel.linux.idmap import ID_COUNT


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(idclaim, "FOLDERS", (str(tmp_path / "missing"), str(tmp_path)))
    monkeypatch.setattr(idclaim, "RANGES", 4)
    monkeypatch.setattr(idclaim, "TRIES", 4)


def test_no_range_is_claimed_twice_and_closing_frees_it() -> None:
    claims = [idclaim.claim() for _ in range(4)]
    firsts = sorted(one.first_id for one in claims)
    assert firsts == [idclaim.FIRST_ID + n * ID_COUNT for n in range(4)]
    with pytest.raises(HostError, match="no range of user ids is free"):
        idclaim.claim()
    last = claims.pop()
    os.close(last.fd)
    again = idclaim.claim()
    assert again.first_id == last.first_id
    for one in (again, *claims):
        os.close(one.fd)


def test_a_claim_lasts_as_long_as_a_process_has_the_descriptor() -> None:
    claims = [idclaim.claim() for _ in range(4)]
    kept = os.dup(claims[0].fd)
    for one in claims:
        os.close(one.fd)
    others = [idclaim.claim() for _ in range(3)]
    assert claims[0].first_id not in [one.first_id for one in others]
    for fd in (kept, *(one.fd for one in others)):
        os.close(fd)


def test_a_build_has_many_ranges_in_a_row() -> None:
    several, single = idclaim.claim(3 * ID_COUNT), idclaim.claim()
    assert several.size == 3 * ID_COUNT
    assert not several.first_id <= single.first_id < several.first_id + several.size
    with pytest.raises(HostError, match="no range of user ids is free"):
        idclaim.claim()
    for one in (several, single):
        os.close(one.fd)


def mapped(monkeypatch: pytest.MonkeyPatch, folder: Path, uids: str, gids: str) -> None:
    for name, text in (("uid_map", uids), ("gid_map", gids)):
        (folder / name).write_text(text)
    maps = (str(folder / "uid_map"), str(folder / "gid_map"))
    monkeypatch.setattr(idclaim, "MAPS", maps)


def test_root_of_a_container_takes_from_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = "0 1000 1\n1 100000 65536\n"
    mapped(monkeypatch, tmp_path, line, line)
    claims = [idclaim.claim(64 * ID_COUNT)]
    assert (claims[0].first_id, claims[0].size) == (1 + 32768, 32 * ID_COUNT)
    os.close(claims.pop().fd)
    claims = [idclaim.claim() for _ in range(4)]
    assert all(1 + 32768 <= one.first_id < 65537 for one in claims)
    for one in claims:
        os.close(one.fd)


def test_root_with_too_few_ids_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mapped(monkeypatch, tmp_path, "0 1000 1\n", "0 1000 1\n")
    with pytest.raises(HostError, match=r"too few ids for sessions: .*uid_map says 1 from 0 on"):
        idclaim.claim()


def test_a_file_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    (tmp_path / idclaim.FILE).touch()
    (tmp_path / idclaim.FILE).chmod(0o666)
    with pytest.raises(HostError, match="it is not root's alone"):
        idclaim.claim()
