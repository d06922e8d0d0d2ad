"""Prune takes what nothing leads to, and never what a living process uses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox_kernel.image.documents import digest_of
from sandbox_kernel.image.prune import GARBAGE, PruneOptions
from sandbox_kernel.image.store import Store
from tests.fakes.images import image_of, problems

REPO = Path(__file__).resolve().parents[2]
KEYS = [f"sha256:{number:064x}" for number in range(3)]
BASE = {"base": b"0" * 1000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path):
    with Store.open(folder) as opened:
        yield opened


def put(folder: Path, name: str | None, *files: dict[str, bytes]):
    """Put an image in and unpack it, as another process would that has ended since."""
    with Store.open(folder) as store:
        image = image_of(files).put(store, name)
        store.ensure_layers(image)
        return image


def blobs(store: Store) -> set[str]:
    return {f"sha256:{name}" for name in os.listdir(store.folder / "blobs/sha256")}


def layers(store: Store) -> set[str]:
    return {f"sha256:{name}" for name in os.listdir(store.folder / "layers/sha256")}


def test_a_prune_takes_what_no_name_leads_to_and_leaves_what_is_shared(store: Store) -> None:
    kept = put(store.folder, "kept", BASE, {"a": b"1"})
    gone = put(store.folder, "gone", BASE, {"b": b"2"})
    store.untag("gone")
    pruned = store.prune(GARBAGE)
    own = {gone.digest, gone.image_id, gone.manifest.layers[1].digest}
    assert set(pruned.blobs) == own
    assert pruned.layers == (gone.config.diff_ids[1],)
    assert pruned.size_bytes == gone.size_bytes - gone.manifest.layers[0].size_bytes + len(
        gone.manifest.raw
    ) + len(b"2")
    assert blobs(store) == set(image_of([BASE, {"a": b"1"}]).blobs)
    assert layers(store) == set(kept.config.diff_ids)
    assert problems(store) == []


def test_images_without_a_name_go_and_the_others_only_when_all_are_meant(store: Store) -> None:
    put(store.folder, "app", {"a": b"1"})
    second = put(store.folder, "app", {"a": b"2"})
    assert len(store.prune(GARBAGE).images) == 0
    assert len(store.images()) == 2
    assert len(store.prune().images) == 1
    assert [image.digest for image in store.images()] == [second.digest]
    assert store.prune(PruneOptions(all_images=True)).images == (second.digest,)
    assert (blobs(store), layers(store)) == (set(), set())


def test_what_came_later_than_is_asked_for_stays(store: Store) -> None:
    old = put(store.folder, "old", {"a": b"1"})
    new = put(store.folder, "new", {"a": b"2"})
    hour_ago_s = time.time() - 3600
    os.utime(store.folder / "blobs/sha256" / old.digest[7:], (hour_ago_s, hour_ago_s))
    pruned = store.prune(PruneOptions(all_images=True, older_than_s=1800))
    assert pruned.images == (old.digest,)
    assert [image.digest for image in store.images()] == [new.digest]


# Leases


def test_a_leased_image_stays_with_all_its_layers_until_the_lease_ends(store: Store) -> None:
    image = put(store.folder, "app", BASE, {"a": b"1"})
    with store.lease([image.digest]):
        store.untag("app")
        assert store.prune(PruneOptions(all_images=True)).size_bytes == 0
        assert layers(store) == set(image.config.diff_ids)
    assert set(store.prune().layers) == set(image.config.diff_ids)


def test_a_leased_layer_stays_without_its_image(store: Store) -> None:
    image = put(store.folder, "app", BASE, {"a": b"1"})
    store.untag("app")
    with store.lease([image.config.diff_ids[1]]):
        store.prune()
        assert layers(store) == {image.config.diff_ids[1]}


def test_an_image_in_use_keeps_its_name_when_all_are_pruned(store: Store) -> None:
    image = put(store.folder, "app", BASE)
    with store.lease([image.digest]):
        assert store.prune(PruneOptions(all_images=True)).images == ()
    assert [str(one.reference) for one in store.images()] == ["app:latest"]


def test_what_another_store_object_has_written_or_looked_at_stays(store: Store) -> None:
    with Store.open(store.folder) as other:
        written = other.put_blob(b"not named by anything yet")
        seen = digest_of(b"asked for")
        assert not other.has_blob(seen)
        store.put_blob(b"asked for")
        store.prune()
        assert blobs(store) == {written, seen}
        other.resolve(put(store.folder, "app", BASE).digest)
        store.untag("app")
        store.prune()
        assert len(layers(store)) == 1
    assert set(store.prune().blobs) >= {written, seen}
    assert (blobs(store), layers(store)) == (set(), set())


def child(folder: Path, code: str) -> subprocess.Popen[bytes]:
    """Start a process that opens the store, runs the code, says so, and waits for its end."""
    head = "import sys; from pathlib import Path; from sandbox_kernel.image.store import Store\n"
    tail = "\nprint('.', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{head}store = Store.open({str(folder)!r})\n{code}{tail}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPO,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b".\n"
    return process


def test_the_lease_of_a_process_ends_when_it_is_killed_and_not_before(store: Store) -> None:
    image = put(store.folder, "app", BASE)
    with child(store.folder, f"lease = store.lease([{image.digest!r}])") as other:
        store.untag("app")
        store.prune()
        assert layers(store) == set(image.config.diff_ids)
        other.kill()
        other.wait()
        store.prune()
        assert layers(store) == set()
    assert os.listdir(store.folder / "leases") == []


def test_what_a_process_stages_stays_while_it_lives_and_is_swept_when_it_is_killed(
    store: Store,
) -> None:
    code = "scratch = store.scratch().__enter__(); scratch.write_bytes(b'x')"
    with child(store.folder, code) as other:
        Store.open(store.folder).close()
        store.prune()
        assert len(list((store.folder / "staging").glob("*/*"))) == 1
        other.kill()
        other.wait()
        Store.open(store.folder).close()
        assert list((store.folder / "staging").glob("*/*")) == []


# The build cache


@pytest.fixture
def cached(store: Store) -> list[str]:
    """Give the layers of three records, the last used an hour ago, half an hour ago, just now."""
    made = []
    for number, key in enumerate(KEYS):
        with Store.open(store.folder) as other:
            layer = other.put_blob(bytes([number]) * 100 * (number + 1))
            other.records.put(key, {"digests": [layer], "step": f"RUN {number}"})
        used_s = time.time() - 3610 + 1800 * number
        os.utime(store.folder / "cache" / key[7:], (used_s, used_s))
        made.append(layer)
    return made


def test_the_cache_keeps_what_its_records_name(store: Store, cached: list[str]) -> None:
    assert store.prune().size_bytes == 0
    assert blobs(store) == set(cached)
    found = store.records.get(KEYS[1])
    assert found is not None
    assert (found.digests, found.value["step"]) == ((cached[1],), "RUN 1")
    assert [record.key for record in store.records.all()] == [KEYS[0], KEYS[2], KEYS[1]]


def test_the_cache_goes_when_it_is_meant(store: Store, cached: list[str]) -> None:
    pruned = store.prune(PruneOptions(build_cache=True))
    assert set(pruned.records) == set(KEYS)
    assert pruned.size_bytes == 600
    assert (blobs(store), store.records.all()) == (set(), ())


@pytest.mark.parametrize(
    ("keep_bytes", "left"), [(600, 3), (599, 2), (500, 2), (499, 1), (300, 1), (299, 0), (0, 0)]
)
def test_what_was_used_last_is_kept_up_to_a_size(
    store: Store, cached: list[str], keep_bytes: int, left: int
) -> None:
    store.prune(PruneOptions(build_cache=True, keep_bytes=keep_bytes))
    assert blobs(store) == set(cached[3 - left :])


def test_records_used_later_than_is_asked_for_stay(store: Store, cached: list[str]) -> None:
    store.prune(PruneOptions(build_cache=True, older_than_s=2700))
    assert blobs(store) == set(cached[1:])


def test_what_an_image_keeps_does_not_count_for_the_cache(store: Store) -> None:
    image = put(store.folder, "app", BASE)
    store.records.put(KEYS[0], {"digests": [image.digest]})
    assert store.disk_usage().cache_bytes == 0
    pruned = store.prune(PruneOptions(build_cache=True, keep_bytes=0))
    assert pruned.records == ()
    store.untag("app")
    assert store.disk_usage().cache_bytes == store.disk_usage().total_bytes
    assert store.prune(PruneOptions(build_cache=True, keep_bytes=0)).records == (KEYS[0],)


def test_a_record_that_cannot_be_read_counts_as_missing(store: Store, cached: list[str]) -> None:
    (store.folder / "cache" / KEYS[0][7:]).write_bytes(b"{")
    assert store.records.get(KEYS[0]) is None
    store.prune()
    assert blobs(store) == set(cached[1:])


# Disk usage


def test_disk_usage_tells_what_is_shared_and_what_is_each_images_own(store: Store) -> None:
    one = put(store.folder, "one", BASE, {"a": b"1"})
    two = put(store.folder, "two", BASE, {"b": b"22"})
    with Store.open(store.folder) as other:
        other.put_blob(b"garbage")
    with store.lease([two.digest]):
        usage = store.disk_usage()
    base_bytes = one.manifest.layers[0].size_bytes + 1000
    first, second = usage.images
    assert (first.digest, second.digest) == (one.digest, two.digest)
    assert second.names == ("docker.io/library/two:latest",)
    assert (first.shared_bytes, second.shared_bytes) == (base_bytes, base_bytes)
    assert first.unique_bytes == one.size_bytes + len(one.manifest.raw) + 1 - (base_bytes - 1000)
    assert (first.in_use, second.in_use) == (False, True)
    assert usage.images_bytes == base_bytes + first.unique_bytes + second.unique_bytes
    assert usage.unused_bytes == len(b"garbage")
    assert usage.total_bytes == usage.images_bytes + usage.unused_bytes
