"""The owned folder of a layer: what belongs to others than root, for containers with their ids.

Root gives ids away as newuidmap does it for an ordinary user, so both can run these.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.errors import HostError, ImageError
from sandbox_kernel.image import owned, owned_space, store_files
from sandbox_kernel.image.owned import owned_tree
from sandbox_kernel.image.owned_record import read_record
from sandbox_kernel.image.prune import PruneOptions
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.store_layers import boot_id
from sandbox_kernel.linux import idmap
from sandbox_kernel.linux.idmap import IdMap, Wanted
from sandbox_kernel.linux.tree_names import MODE, OPAQUE, OWNER
from sandbox_kernel.linux.tree_tar import Packing, pack
from tests.fakes.images import image_of

IS_ROOT = os.geteuid() == 0
BUILDS = Wanted(0, 0, 65536)
TIME_NS = 1_234_567_890_123_456_789
FILES = {
    "app/own": b"own",
    "app/tool": b"tool",
    "app/deep/er/file": b"deep",
    "etc/shadow": b"secret",
    "etc/passwd": b"everybody",
}

only_users = pytest.mark.skipif(IS_ROOT, reason="root removes whatever it is")


@pytest.fixture
def ids() -> IdMap:
    if IS_ROOT:
        extents = ((0, 0, 1), (1, 1 << 20, 65535))
        return IdMap("high", extents, extents)
    try:
        return idmap.find_subordinate(os.geteuid(), os.getegid(), BUILDS)
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened
    # pytest cannot: what belongs to other ids is removed by a child that has them.
    store_files.remove(tmp_path / "store")


@pytest.fixture
def tree(store: Store) -> Path:
    """Put a layer into the store that records no owner yet."""
    return store.ensure_layers(image_of([FILES]).put(store, "image"))[0]


def record(path: Path, owner: str, mode: int = 0) -> None:
    """Record what an ordinary user could not set, as unpacking does."""
    os.setxattr(path, OWNER, owner.encode())
    if mode:
        os.setxattr(path, MODE, b"%o" % mode)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def owner_of(path: Path, ids: IdMap) -> tuple[int, int]:
    """Give the owner that a file has inside."""
    info = path.lstat()
    inside = [
        {outside + n: first + n for first, outside, count in extents for n in range(count)}
        for extents in (ids.uids, ids.gids)
    ]
    return inside[0][info.st_uid], inside[1][info.st_gid]


def staged(store: Store) -> list[str]:
    """Give what is left in the staging folder of the store's object."""
    (mine,) = (store.folder / "staging").iterdir()
    return os.listdir(mine)


def test_what_belongs_to_others_is_copied_with_its_owner(
    store: Store, tree: Path, ids: IdMap
) -> None:
    record(tree / "etc/shadow", "0:42")
    record(tree / "app/deep/er", "33:33")
    shown = owned_tree(store, tree, ids)
    assert shown == tree.parent / "owned/fs"
    assert names(shown) == {"etc", "etc/shadow", "app", "app/deep", "app/deep/er"}
    assert owner_of(shown / "etc/shadow", ids) == (0, 42)
    assert (shown / "app/deep/er").is_dir()
    assert owner_of(shown / "app/deep/er", ids) == (33, 33)
    for above in ("", "etc", "app", "app/deep"):
        assert owner_of(shown / above, ids) == (0, 0)
    found = read_record(tree.parent, boot_id())
    assert found is not None
    assert (found.entries, found.size_bytes) == (2, len(b"secret"))


def test_a_copy_has_all_but_the_record(store: Store, tree: Path, ids: IdMap) -> None:
    tool, folder = tree / "app/tool", tree / "app"
    os.setxattr(tool, "user.note", b"kept")
    os.setxattr(folder, "user.note", b"of the folder")
    record(tool, "5:6", 0o4755)
    tool.chmod(0o755)
    folder.chmod(0o711)
    for path in (tool, folder):
        os.utime(path, ns=(TIME_NS, TIME_NS))
    shown = owned_tree(store, tree, ids)
    assert shown is not None
    copy, above = shown / "app/tool", shown / "app"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o4755
    assert stat.S_IMODE(above.stat().st_mode) == 0o711
    assert [path.stat().st_mtime_ns for path in (copy, above)] == [TIME_NS, TIME_NS]
    assert {key for key in os.listxattr(copy) if key.startswith("user.")} == {"user.note"}
    assert os.getxattr(above, "user.note") == b"of the folder"
    assert copy.read_bytes() == b"tool"


def test_names_of_one_file_stay_names_of_one_file(store: Store, tree: Path, ids: IdMap) -> None:
    os.link(tree / "app/own", tree / "etc/twin")
    os.link(tree / "app/own", tree / "third")
    record(tree / "app/own", "7:7")
    shown = owned_tree(store, tree, ids)
    assert shown is not None
    copies = [(shown / name).stat() for name in ("app/own", "etc/twin", "third")]
    assert len({info.st_ino for info in copies}) == 1
    assert copies[0].st_nlink == 3


def test_holes_stay_holes(store: Store, tree: Path, ids: IdMap) -> None:
    with (tree / "app/holes").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"middle")
        file.truncate(64 << 20)
    record(tree / "app/holes", "9:9")
    shown = owned_tree(store, tree, ids)
    assert shown is not None
    copy = shown / "app/holes"
    assert copy.read_bytes() == (tree / "app/holes").read_bytes()
    assert copy.stat().st_blocks * 512 < 1 << 20


def test_whiteouts_and_opaque_folders_stay_the_layers_own(
    store: Store, tree: Path, ids: IdMap
) -> None:
    os.setxattr(tree / "app", OPAQUE, b"y")
    record(tree / "app", "33:33")
    os.mknod(tree / "app/gone", stat.S_IFCHR, os.makedev(0, 0))
    (tree / "app/link").symlink_to("own")
    shown = owned_tree(store, tree, ids)
    assert shown is not None
    assert names(shown) == {"app"}
    assert OPAQUE.decode() not in os.listxattr(shown / "app")


def test_a_file_that_its_owner_may_not_read_is_copied(store: Store, tree: Path, ids: IdMap) -> None:
    record(tree / "etc/shadow", "1:1")
    record(tree / "app/deep", "2:2")
    (tree / "etc/shadow").chmod(0)
    (tree / "app/deep").chmod(0)
    shown = owned_tree(store, tree, ids)
    assert shown is not None
    assert owner_of(shown / "etc/shadow", ids) == (1, 1)
    assert owner_of(shown / "app/deep", ids) == (2, 2)
    (tree / "app/deep").chmod(0o700)


def test_an_id_that_is_not_there_keeps_its_record(store: Store, tree: Path, ids: IdMap) -> None:
    record(tree / "app", "70000:70000")
    record(tree / "etc/passwd", "0:65536")
    record(tree / "app/own", "1:1")
    shown = owned_tree(store, tree, ids)
    assert shown is not None
    assert names(shown) == {"app", "app/own"}
    assert owner_of(shown / "app", ids) == (0, 0)
    assert os.getxattr(shown / "app", OWNER) == b"70000:70000"


def test_a_layer_of_root_alone_costs_nothing(
    store: Store, tree: Path, ids: IdMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tree / "app/own", "0:0")

    def child(*_args: object) -> None:
        raise AssertionError("no child is needed")

    monkeypatch.setattr(owned, "perform", child)
    assert owned_tree(store, tree, ids) is None
    assert not (tree.parent / "owned/fs").exists()

    def look(_tree: Path) -> bool:
        raise AssertionError("what was found out is remembered")

    monkeypatch.setattr(owned, "_has_owners", look)
    assert owned_tree(store, tree, ids) is None
    other = replace(ids, uids=ids.uids[:1])
    assert owned_tree(store, tree, other) is None


def test_it_is_made_once_by_two_at_a_time(
    store: Store, tree: Path, ids: IdMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tree / "app/own", "1:1")
    orders = []

    def counted(order: dict[str, Any], ids: IdMap, *fds: int) -> dict[str, Any]:
        orders.append(order["do"])
        return owned_space.perform(order, ids, *fds)

    monkeypatch.setattr(owned, "perform", counted)
    found: list[Path | None] = []
    threads = [
        threading.Thread(target=lambda: found.append(owned_tree(store, tree, ids)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tree.parent / "owned/fs"] * 4
    assert orders == ["copy"]


def test_other_ids_have_it_made_anew(store: Store, tree: Path, ids: IdMap) -> None:
    record(tree / "app/own", "1:1")
    record(tree / "app/tool", "60000:60000")
    first = owned_tree(store, tree, ids)
    assert first is not None
    assert names(first) == {"app", "app/own", "app/tool"}
    fewer = replace(
        ids,
        uids=tuple((a, b, min(count, 1024)) for a, b, count in ids.uids),
        gids=tuple((a, b, min(count, 1024)) for a, b, count in ids.gids),
    )
    again = owned_tree(store, tree, fewer)
    assert again == first
    assert names(again) == {"app", "app/own"}
    assert staged(store) == []


def test_a_record_that_is_none_is_named_and_nothing_is_left(
    store: Store, tree: Path, ids: IdMap
) -> None:
    record(tree / "app/deep", "1:1")
    record(tree / "etc/passwd", "somebody")
    with pytest.raises(ImageError, match=r"layer [0-9a-f]{12} .*etc/passwd.*somebody"):
        owned_tree(store, tree, ids)
    assert not (tree.parent / "owned").exists()
    assert staged(store) == []


def test_a_kill_before_the_end_leaves_nothing(store: Store, tree: Path, ids: IdMap) -> None:
    record(tree / "app", "1:1")
    record(tree / "app/own", "1:1")
    pid = os.fork()
    if pid == 0:
        with pytest.MonkeyPatch.context() as patch:
            # The last step but one: all is there but its name.
            patch.setattr(owned, "_take_old_away", lambda *_args: os._exit(9))
            owned_tree(Store.open(store.folder), tree, ids)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not (tree.parent / "owned").exists()
    assert len(os.listdir(store.folder / "staging")) == 2
    with Store.open(store.folder) as swept:
        assert len(os.listdir(store.folder / "staging")) == 2  # of this object and of `store`
        assert owned_tree(swept, tree, ids) == tree.parent / "owned/fs"


def test_a_loss_of_power_has_it_made_anew_unless_it_was_flushed(
    store: Store, tree: Path, ids: IdMap
) -> None:
    record(tree / "app/own", "1:1")
    owned_tree(store, tree, ids)
    assert read_record(tree.parent, boot_id()) is not None
    assert read_record(tree.parent, "the next") is None
    store.settle()
    found = read_record(tree.parent, "the next")
    assert found is not None
    assert found.settled


def test_disk_usage_counts_it(store: Store, tree: Path, ids: IdMap) -> None:
    before = store.disk_usage()
    record(tree / "etc/shadow", "0:42")
    owned_tree(store, tree, ids)
    after = store.disk_usage()
    assert after.total_bytes - before.total_bytes == len(b"secret")
    assert after.images[0].size_bytes - before.images[0].size_bytes == len(b"secret")


# Removal


def test_a_prune_removes_it(store: Store, tree: Path, ids: IdMap) -> None:
    record(tree / "app", "33:33")
    record(tree / "app/own", "33:33")
    owned_tree(store, tree, ids)
    store.untag("image")
    pruned = store.prune()
    assert len(pruned.layers) == 1
    assert not tree.parent.exists()
    assert staged(store) == []


def test_a_child_with_the_ids_removes_what_is_theirs(store: Store, tree: Path, ids: IdMap) -> None:
    record(tree / "app", "33:33", 0o1700)
    record(tree / "app/deep/er", "34:34")
    owned_tree(store, tree, ids)
    owned_space.remove_mapped(tree.parent / "owned", ids)
    assert sorted(os.listdir(tree.parent)) == ["fs", "layer.json"]


def test_what_belongs_to_ids_that_are_lost_is_named(store: Store, tree: Path, ids: IdMap) -> None:
    record(tree / "app", "33:33")
    owned_tree(store, tree, ids)
    lost = replace(ids, uids=ids.uids[:1], gids=ids.gids[:1])
    path = tree.parent / "owned"
    with pytest.raises(ImageError, match=r"owned holds files of other ids") as told:
        owned_space.remove_mapped(path, lost)
    assert f"as root: rm -r {path}" in told.value.hint


@only_users
def test_a_prune_without_newuidmap_says_so_and_goes_on(
    store: Store, tree: Path, ids: IdMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = store.ensure_layers(image_of([{"plain": b"1"}]).put(store, "other"))[0]
    record(tree / "app", "33:33")
    record(tree / "app/own", "33:33")
    owned_tree(store, tree, ids)
    for name in ("image", "other"):
        store.untag(name)
    with monkeypatch.context() as patch:
        patch.setattr(idmap, "_on_path", lambda _name: "")
        with pytest.raises(ImageError, match=r"parts of 1 layers: .*no newuidmap") as told:
            store.prune(PruneOptions(all_images=True))
        assert "apt install uidmap" in told.value.hint
        assert not other.parent.exists()
        assert os.listdir(store.folder / "layers/sha256") == []
        assert os.listdir(store.folder / "blobs/sha256") == []
        store.close()
        assert len(os.listdir(store.folder / "staging")) == 1
    store_files.sweep(store.folder / "staging")
    assert os.listdir(store.folder / "staging") == []


# The way back: what a tar says of a file that still has its record


def packed_owners(folder: Path, packing: Packing) -> dict[str, tuple[int, int]]:
    out = io.BytesIO()
    pack(folder, out, packing)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        return {one.name: (one.uid, one.gid) for one in tar}


@pytest.mark.skipif(not IS_ROOT, reason="in a container whoever packs is root")
def test_an_owner_that_was_given_since_wins_over_the_record(tmp_path: Path) -> None:
    given = {"kept": (0, 0), "user": (5, 0), "group": (0, 6), "both": (5, 6)}
    for name, owner in given.items():
        (tmp_path / name).touch()
        record(tmp_path / name, "33:34")
        os.chown(tmp_path / name, *owner)
    found = packed_owners(tmp_path, Packing(0))
    assert {name: found[name] for name in given} == {
        "kept": (33, 34), "user": (5, 34), "group": (33, 6), "both": (5, 6),
    }  # fmt: skip


@only_users
def test_what_an_ordinary_user_made_is_roots_unless_it_says_otherwise(tmp_path: Path) -> None:
    for name in ("plain", "app"):
        (tmp_path / name).touch()
    record(tmp_path / "app", "33:34")
    found = packed_owners(tmp_path, Packing(0))
    assert (found["plain"], found["app"]) == ((0, 0), (33, 34))
