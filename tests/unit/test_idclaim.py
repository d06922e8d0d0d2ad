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
    firsts = sorted(first for first, _ in claims)
    assert firsts == [idclaim.FIRST_ID + n * ID_COUNT for n in range(4)]
    with pytest.raises(HostError, match="no range of user ids is free"):
        idclaim.claim()
    first, fd = claims.pop()
    os.close(fd)
    again, fd = idclaim.claim()
    assert again == first
    for open_fd in (fd, *(other for _, other in claims)):
        os.close(open_fd)


def test_a_claim_lasts_as_long_as_a_process_has_the_descriptor() -> None:
    claims = [idclaim.claim() for _ in range(4)]
    kept = os.dup(claims[0][1])
    for _, fd in claims:
        os.close(fd)
    others = [idclaim.claim() for _ in range(3)]
    assert claims[0][0] not in [first for first, _ in others]
    for fd in (kept, *(fd for _, fd in others)):
        os.close(fd)


def test_a_file_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    (tmp_path / idclaim.FILE).touch()
    (tmp_path / idclaim.FILE).chmod(0o666)
    with pytest.raises(HostError, match="it is not root's alone"):
        idclaim.claim()
