"""A kill at any moment leaves a whole store: before every single act on files, one after another.

Each case runs in a process of its own, which forks for each kill; see `fakes/crash.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_kernel.image.prune import PruneOptions
from sandbox_kernel.image.store import Store
from tests.fakes import crash
from tests.fakes.images import image_of, problems

REPO = Path(__file__).resolve().parents[2]
OLD = image_of([{"base": b"0"}, {"old": b"1"}])
NEW = image_of([{"base": b"0"}, {"etc/new": b"2"}])
KEY = "sha256:" + "ab" * 32

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def template(folder: Path) -> None:
    """Make the store that every run begins with: one image, one cache record."""
    with Store.open(folder) as store:
        image = OLD.put(store, "old")
        store.ensure_layers(image)
        store.records.put(KEY, {"digests": [image.digest]})


def whole(store: Store) -> None:
    assert problems(store) == []
    assert len(os.listdir(store.folder / "staging")) == 1, "what was staged is not swept"


def names(store: Store) -> set[str]:
    return {str(image.reference) for image in store.images()}


# Each case: what is killed, and what must hold afterwards.


def do_create(folder: Path) -> None:
    Store.open(folder).close()


def after_create(store: Store, _killed: Path) -> None:
    OLD.put(store, "old")
    assert names(store) == {"old:latest"}


def do_put(folder: Path) -> None:
    with Store.open(folder) as store:
        NEW.put(store, "new")
        store.tag("new", "again")


def after_put(store: Store, folder: Path) -> None:
    assert names(store) in (
        {"old:latest"},
        {"old:latest", "new:latest"},
        {"old:latest", "new:latest", "again:latest"},
    )
    do_put(folder)
    assert names(store) == {"old:latest", "new:latest", "again:latest"}


def do_unpack(folder: Path) -> None:
    with Store.open(folder) as store:
        store.ensure_layers(NEW.put(store, "new"))
        store.settle()


def after_unpack(store: Store, folder: Path) -> None:
    do_unpack(folder)
    trees = store.ensure_layers(store.resolve("new"))
    assert [(trees[0] / "base").read_bytes(), (trees[1] / "etc/new").read_bytes()] == [b"0", b"2"]


def do_replace(folder: Path) -> None:
    with Store.open(folder) as store:
        NEW.put(store, "old")


def after_replace(store: Store, folder: Path) -> None:
    # The name always leads to one of the two.
    assert store.resolve("old").digest in {OLD.manifest.digest, NEW.manifest.digest}
    do_replace(folder)
    assert store.resolve("old").digest == NEW.manifest.digest


def do_prune(folder: Path) -> None:
    with Store.open(folder) as store:
        store.untag("old")
        store.prune(PruneOptions(build_cache=True))


def after_prune(store: Store, folder: Path) -> None:
    if names(store):
        store.untag("old")
    store.prune(PruneOptions(build_cache=True))
    assert names(store) == set()
    for name in ("blobs/sha256", "layers/sha256", "cache", "diff-ids", "leases"):
        assert os.listdir(store.folder / name) == [], name


CASES: dict[str, tuple[Callable[[Path], None], Callable[[Store, Path], None]]] = {
    "create": (do_create, after_create),
    "put": (do_put, after_put),
    "unpack": (do_unpack, after_unpack),
    "replace": (do_replace, after_replace),
    "prune": (do_prune, after_prune),
}
LEAST = {"create": 20, "put": 60, "unpack": 80, "replace": 50, "prune": 60}
"""How many kills there must be at least, or the counting does not work."""


def main(case: str, folder: Path) -> None:
    do, after = CASES[case]
    ready, work = folder / "ready", folder / "work"
    if case != "create":
        template(ready)

    def before() -> None:
        shutil.rmtree(work, ignore_errors=True)
        if ready.exists():
            shutil.copytree(ready, work, symlinks=True)

    def check() -> None:
        with Store.open(work) as store:
            whole(store)
            after(store, work)
            whole(store)

    print(crash.everywhere(lambda: do(work), before, check))


@pytest.mark.parametrize("case", CASES)
def test_a_kill_before_any_act_leaves_a_whole_store_in_which_it_can_be_done_again(
    case: str, tmp_path: Path
) -> None:
    code = f"from pathlib import Path; from tests.unit import test_store_crash as t; t.main({case!r}, Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= LEAST[case]
