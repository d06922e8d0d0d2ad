"""The store: what is put in comes out, whole or not at all, and by one process at a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import store as store_module
from sandbox_kernel.image.documents import OCI_LAYER, Descriptor, chain_id, digest_of
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.store_files import remove_tree
from tests.fakes.images import image_of, problems, tar_of

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "store") as opened:
        yield opened


class Notes:
    """A progress that is written down."""

    def __init__(self) -> None:
        self.total: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.ends: list[str] = []

    def started(self, digest: str, total_bytes: int) -> None:
        self.total[digest] = total_bytes

    def advanced(self, digest: str, count_bytes: int) -> None:
        self.done[digest] = self.done.get(digest, 0) + count_bytes

    def finished(self, digest: str, note: str) -> None:
        self.ends.append(note)


def entries(store: Store) -> list[dict]:
    return json.loads((store.folder / "index.json").read_bytes())["manifests"]


# The folder


def test_a_new_store_is_an_oci_layout_that_only_its_owner_may_enter(store: Store) -> None:
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert json.loads((store.folder / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    assert entries(store) == []


def test_a_store_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(ImageError, match="others may enter the store") as caught:
        Store.open(tmp_path / "open")
    assert caught.value.hint == f"chmod 700 {tmp_path / 'open'}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_store_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(ImageError, match="belongs to user 12345"):
        Store.open(tmp_path / "theirs")


def test_a_store_that_cannot_be_made_says_how_to_name_another(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="cannot be made: File exists") as caught:
        Store.open(tmp_path / "file" / "store")
    assert "SANDBOX_KERNEL_STORE" in caught.value.hint


def test_the_folder_is_the_users_roots_or_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("SANDBOX_KERNEL_STORE", raising=False)
    monkeypatch.setattr(store_module.os, "geteuid", lambda: 1000)
    assert store_module.default_folder() == tmp_path / "sandbox-kernel/images"
    monkeypatch.setattr(store_module.os, "geteuid", lambda: 0)
    assert store_module.default_folder() == Path("/var/lib/sandbox-kernel/images")
    monkeypatch.setenv("SANDBOX_KERNEL_STORE", str(tmp_path / "mine"))
    assert store_module.default_folder() == tmp_path / "mine"


# Blobs


def test_a_blob_comes_out_as_it_went_in(store: Store) -> None:
    digest = digest_of(b"hello")
    assert not store.has_blob(digest)
    with store.write_blob(digest, 5) as writer:
        writer.write(b"he")
        writer.write(b"llo")
        assert not store.has_blob(digest)
        assert writer.commit() == digest
    assert store.has_blob(digest)
    assert store.read_blob(digest) == b"hello"
    with store.open_blob(digest) as file:
        assert file.read() == b"hello"


@pytest.mark.parametrize(
    ("digest", "size", "data", "reason"),
    [
        (digest_of(b"a"), None, b"b", "the digest does not match"),
        (digest_of(b"ab"), 2, b"a", "has 1 bytes and should have 2"),
        (digest_of(b"ab"), 2, b"abc", "is longer than the 2 bytes"),
    ],
)
def test_a_blob_that_is_not_what_it_should_be_is_refused_and_leaves_nothing(
    store: Store, digest: str, size: int | None, data: bytes, reason: str
) -> None:
    def write() -> None:
        with store.write_blob(digest, size) as writer:
            writer.write(data)
            writer.commit()

    with pytest.raises(ImageError, match=reason):
        write()
    assert not store.has_blob(digest)
    assert os.listdir(store.folder / "blobs/sha256") == []
    assert _staged(store) == []


def test_a_blob_without_commit_is_not_there(store: Store) -> None:
    with store.write_blob(digest_of(b"a"), 1) as writer:
        writer.write(b"a")
    assert not store.has_blob(digest_of(b"a"))
    assert _staged(store) == []


def test_a_missing_a_large_and_a_damaged_blob_are_named(store: Store) -> None:
    digest = store.put_blob(b"x" * 100)
    with pytest.raises(ImageError, match="has more than 99 bytes"):
        store.read_blob(digest, 99)
    (store.folder / "blobs/sha256" / digest[7:]).write_bytes(b"y" * 100)
    with pytest.raises(ImageError, match=f"{digest} of the store is damaged"):
        store.read_blob(digest)
    missing = digest_of(b"missing")
    with pytest.raises(ImageError, match=f"{missing} is not in the store"):
        store.open_blob(missing)


@pytest.mark.parametrize("name", ["sha256:../../etc/passwd", "../x", "", "sha256:" + "a" * 63])
def test_no_digest_leads_out_of_the_store(store: Store, name: str) -> None:
    for use in (store.has_blob, store.open_blob, store.read_blob, store.diff_id):
        with pytest.raises(ImageError, match="is not a digest"):
            use(name)
    with pytest.raises(ImageError, match="is not a digest"), store.write_blob(name, 1):
        pass


# Images and names


def test_an_image_is_found_by_name_by_digest_and_by_the_beginning_of_either_id(
    store: Store,
) -> None:
    image = image_of([{"a": b"1"}]).put(store, "me/app:1")
    assert image.reference is not None
    assert image.reference.full == "docker.io/me/app:1"
    for text in (
        "me/app:1",
        "docker.io/me/app:1",
        f"me/app@{image.digest}",
        image.digest,
        image.image_id,
        image.digest[7:19],
        image.image_id[7:11],
    ):
        found = store.resolve(text)
        assert found.digest == image.digest, text
        assert found.config == image.config


def test_an_image_that_is_not_there_is_named_and_the_hint_says_what_to_do(store: Store) -> None:
    with pytest.raises(ImageError, match="there is no image 'debian:12' in the store") as caught:
        store.resolve("debian:12")
    assert "image list" in caught.value.hint
    with pytest.raises(ImageError, match="there is no image 'abcdef"):
        store.resolve("abcdef012345")
    with pytest.raises(ImageError, match="cannot be a part of an image"):
        store.resolve("a b")


def test_a_beginning_that_two_images_share_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = image_of([{"a": b"1"}]).put(store, "one")
    for number in range(1000):
        other = image_of([{"a": b"1"}], cmd=[str(number)])
        # Two digests with the same four digits at the beginning are not found in a test.
        if other.manifest.digest[7:9] == first.digest[7:9]:
            break
    other.put(store, "two")
    monkeypatch.setattr(
        "sandbox_kernel.image.resolve._PREFIX", re.compile(r"(?:sha256:)?([0-9a-f]{2,64})")
    )
    with pytest.raises(ImageError, match="is ambiguous: it begins the digests of several images"):
        store.resolve(f"sha256:{first.digest[7:9]}")


def test_a_name_that_moves_leaves_the_image_without_one(store: Store) -> None:
    old = image_of([{"a": b"1"}]).put(store, "app")
    new = image_of([{"a": b"2"}]).put(store, "app")
    assert store.resolve("app").digest == new.digest
    assert [(one.reference and str(one.reference), one.digest) for one in store.images()] == [
        (None, old.digest),
        ("app:latest", new.digest),
    ]
    store.tag(old.digest, "old:1")
    assert len(entries(store)) == 2
    assert store.resolve("old:1").digest == old.digest


def test_the_same_image_twice_is_one_entry(store: Store) -> None:
    for _ in range(2):
        image_of([{"a": b"1"}]).put(store, None)
    assert len(entries(store)) == 1
    for _ in range(2):
        image_of([{"a": b"1"}]).put(store, "app")
    image_of([{"a": b"1"}]).put(store, None)
    assert [str(one.reference) for one in store.images()] == ["app:latest"]


def test_untag_takes_one_name_and_a_digest_with_several_needs_force(store: Store) -> None:
    image = image_of([{"a": b"1"}]).put(store, "a")
    for name in ("b", "c"):
        store.tag("a", name)
    assert store.untag("b") == ("docker.io/library/b:latest",)
    with pytest.raises(ImageError, match=r"has the names .*/a:latest, .*/c:latest"):
        store.untag(image.digest)
    assert store.untag(image.digest[7:19], force=True) == (
        "docker.io/library/a:latest",
        "docker.io/library/c:latest",
    )
    assert entries(store) == []


def test_a_tag_with_a_digest_is_refused(store: Store) -> None:
    image_of([{"a": b"1"}]).put(store, "a")
    with pytest.raises(ImageError, match="has a digest"):
        store.tag("a", "b@" + digest_of(b""))


def test_an_image_is_not_kept_unless_it_is_whole(store: Store) -> None:
    image = image_of([{"a": b"1"}, {"b": b"2"}])
    layer = image.manifest.layers[1]
    for digest, data in image.blobs.items():
        if digest != layer.digest:
            store.put_blob(data)
    with pytest.raises(ImageError, match=f"not whole: the blob {layer.digest} is missing"):
        store.put_image("a", image.manifest.raw)
    assert entries(store) == []


def test_sizes_and_counts_of_the_documents_must_agree(store: Store) -> None:
    image = image_of([{"a": b"1"}, {"b": b"2"}])
    image.put(store, None)
    lying = json.loads(image.manifest.raw)
    lying["layers"][0]["size"] += 1
    with pytest.raises(ImageError, match="bytes, the manifest says"):
        store.put_image("a", json.dumps(lying).encode())
    short = json.loads(image.manifest.raw)
    del short["layers"][1]
    with pytest.raises(ImageError, match="has 1 layers, the image's config 2 DiffIDs"):
        store.put_image("a", json.dumps(short).encode())


def test_what_other_programs_wrote_into_the_index_stays(store: Store) -> None:
    image = image_of([{"a": b"1"}]).put(store, "a")
    index = json.loads((store.folder / "index.json").read_bytes())
    index["manifests"].append(
        {
            "mediaType": image.manifest.media_type,
            "digest": image.digest,
            "size": len(image.manifest.raw),
            "annotations": {"org.opencontainers.image.ref.name": "latest", "org.example": "x"},
        }
    )
    (store.folder / "index.json").write_text(json.dumps(index))
    store.tag("a", "b")
    kept = [one for one in entries(store) if "org.example" in one.get("annotations", {})]
    assert [one["annotations"]["org.example"] for one in kept] == ["x"]
    assert store.resolve("latest").digest == image.digest


def test_history_is_the_chain_the_last_step_first(store: Store) -> None:
    image = image_of([{"a": b"1"}, {"b": b"2"}]).put(store, "a")
    first, second = image.config.diff_ids
    rows = store.history(image)
    assert [row.created_by for row in rows] == ["step 1", "step 0"]
    assert [row.chain_id for row in rows] == [chain_id([first, second]), first]
    assert [row.diff_id for row in rows] == [second, first]
    assert [row.size_bytes for row in rows] == [
        layer.size_bytes for layer in reversed(image.manifest.layers)
    ]


# Layers


def test_layers_are_unpacked_once_and_shared_by_images(store: Store) -> None:
    first = image_of([{"etc/a": b"1"}, {"b": b"2"}]).put(store, "one")
    second = image_of([{"etc/a": b"1"}, {"c": b"3"}]).put(store, "two")
    notes = Notes()
    one = store.ensure_layers(first, notes)
    two = store.ensure_layers(second, notes)
    assert notes.ends == ["unpacked"] * 3
    assert one[0] == two[0]
    assert (one[0] / "etc/a").read_bytes() == b"1"
    assert one[0] == store.folder / "layers/sha256" / first.config.diff_ids[0][7:] / "fs"
    assert store.diff_id(first.manifest.layers[0].digest) == first.config.diff_ids[0]
    assert notes.total == notes.done
    layers = store.session_layers(second)
    assert tuple(Path(layers.folder) / name for name in layers.names) == two
    assert problems(store) == []


def test_a_layer_that_is_not_what_the_config_says_is_refused_and_leaves_nothing(
    store: Store,
) -> None:
    digest = store.put_blob(tar_of({"a": b"1"}))
    blob = Descriptor(OCI_LAYER, digest, len(tar_of({"a": b"1"})))
    wrong = digest_of(b"another")
    with pytest.raises(ImageError, match=f"its DiffID is {digest}, not {wrong}"):
        store.ensure_layer(blob, wrong)
    assert os.listdir(store.folder / "layers/sha256") == []
    assert store.diff_id(digest) is None
    assert _staged(store) == []


def test_a_layer_that_climbs_is_refused_and_nothing_outside_is_touched(store: Store) -> None:
    data = tar_of({"../../../../escaped": b"1"})
    blob = Descriptor(OCI_LAYER, store.put_blob(data), len(data))
    before = sorted(os.listdir(store.folder.parent))
    with pytest.raises(ImageError, match="its name climbs by"):
        store.ensure_layer(blob, blob.digest)
    assert sorted(os.listdir(store.folder.parent)) == before
    assert _staged(store) == []


def test_a_layer_of_which_the_record_was_lost_is_unpacked_again(store: Store) -> None:
    image = image_of([{"a": b"1"}]).put(store, "a")
    (tree,) = store.ensure_layers(image)
    (tree.parent / "layer.json").write_bytes(b"")
    (tree / "a").unlink()
    assert (store.ensure_layers(image)[0] / "a").read_bytes() == b"1"


def test_a_layer_that_was_not_flushed_before_the_machine_went_down_is_unpacked_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = image_of([{"a": b"1"}]).put(store, "a")
    other = image_of([{"b": b"1"}]).put(store, "b")
    store.ensure_layers(image)
    store.settle()
    store.ensure_layers(other)
    (tmp_path / "boot").write_text("the-next-boot\n")
    monkeypatch.setattr("sandbox_kernel.image.store_layers._BOOT", tmp_path / "boot")
    notes = Notes()
    store.ensure_layers(image, notes)
    assert notes.ends == []
    store.ensure_layers(other, notes)
    assert notes.ends == ["unpacked"]


def test_a_layer_that_links_to_files_below_is_kept_for_its_chain(store: Store) -> None:
    import io
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("copy")
        info.type, info.linkname = tarfile.LNKTYPE, "a"
        tar.addfile(info)
    top = out.getvalue()
    blob = Descriptor(OCI_LAYER, store.put_blob(top), len(top))
    trees = []
    for content in (b"1", b"2"):
        below = tar_of({"a": content})
        lower = store.ensure_layer(
            Descriptor(OCI_LAYER, store.put_blob(below), len(below)), digest_of(below)
        )
        tree = store.ensure_layer(blob, blob.digest, lowers=[lower])
        assert tree.parent.name == chain_id([digest_of(below), blob.digest])[7:]
        assert store.ensure_layer(blob, blob.digest, lowers=[lower]) == tree
        trees.append((tree / "copy").read_bytes())
    assert trees == [b"1", b"2"]


# Locks


def test_who_waits_for_a_lock_is_told_and_gets_it_when_it_is_free(store: Store) -> None:
    waiting, order = threading.Event(), []

    def second() -> None:
        with store.locked("sha256:ab", on_wait=waiting.set):
            order.append("second")

    with store.locked("sha256:ab"):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert [name for name in os.listdir(store.folder / "locks") if name.startswith("sha256")] == []


@pytest.mark.parametrize("name", ["../x", "", "a/b", "A", ".", "x" * 201])
def test_a_lock_has_a_plain_name(store: Store, name: str) -> None:
    with pytest.raises(ImageError, match="is not the name of a lock"), store.locked(name):
        pass


# Several processes


def run_all(code: str, folder: Path, count: int) -> list[str]:
    """Start processes that wait for each other at a gate; give what each printed."""
    ready_read, ready_write = os.pipe()
    go_read, go_write = os.pipe()
    head = (
        "import os, sys; from pathlib import Path\n"
        "from sandbox_kernel.image.store import Store\n"
        "from tests.fakes.images import image_of\n"
        "from tests.unit.test_store import Notes\n"
        "folder, number, ready, go = Path(sys.argv[1]), *map(int, sys.argv[2:])\n"
        "def gate():\n    os.write(ready, b'.'); os.read(go, 1)\n"
    )
    children = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                head + code,
                str(folder),
                str(n),
                str(ready_write),
                str(go_read),
            ],
            pass_fds=(ready_write, go_read),
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        for n in range(count)
    ]
    os.close(ready_write)
    arrived = b""
    while len(arrived) < count and (more := os.read(ready_read, count)):
        arrived += more
    os.write(go_write, b"." * count)
    said = [child.communicate(timeout=100)[0] for child in children]
    for fd in (ready_read, go_read, go_write):
        os.close(fd)
    assert [child.returncode for child in children] == [0] * count
    return said


def test_names_given_by_many_processes_at_once_are_all_kept(tmp_path: Path) -> None:
    code = (
        "store = Store.open(folder)\n"
        "gate()\n"
        "for turn in range(5):\n"
        "    image_of([{'a': b'%d' % number}]).put(store, f'app:{number}-{turn}')\n"
    )
    run_all(code, tmp_path / "store", 4)
    with Store.open(tmp_path / "store") as store:
        names = {image.reference.tag for image in store.images() if image.reference}
        assert names == {f"{number}-{turn}" for number in range(4) for turn in range(5)}
        assert problems(store) == []


def test_processes_that_open_a_new_store_at_once_lose_nothing(tmp_path: Path) -> None:
    code = (
        "gate()\nstore = Store.open(folder)\nimage_of([{'a': b'1'}]).put(store, f'app:{number}')\n"
    )
    run_all(code, tmp_path / "store", 4)
    with Store.open(tmp_path / "store") as store:
        assert len(store.images()) == 4


def test_of_processes_that_want_the_same_layer_one_unpacks_it(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        files = {f"d{n // 100}/f{n}": b"x" * 1000 for n in range(2000)}
        image = image_of([files], zipped=False).put(store, "app")
        code = (
            "store = Store.open(folder)\n"
            "image, notes = store.resolve('app'), Notes()\n"
            "gate()\n"
            "print(store.ensure_layers(image, notes)[0], *notes.ends)\n"
        )
        said = [one.split() for one in run_all(code, tmp_path / "store", 3)]
        assert {one[0] for one in said} == {str(store.ensure_layers(image)[0])}
        notes = [one[1:] for one in said]
        assert notes.count(["unpacked"]) == 1
        assert all(one in (["unpacked"], ["shared"], []) for one in notes)
        assert problems(store) == []


# Removal


def test_a_tree_is_removed_whatever_its_modes_and_depth_are(tmp_path: Path) -> None:
    deep = fd = os.open(tmp_path, os.O_RDONLY)
    os.mkdir("top", dir_fd=fd)
    fd = os.open("top", os.O_RDONLY, dir_fd=fd)
    # Deeper than a path can be long, and than Python's stack.
    for _ in range(3000):
        os.mkdir("d" * 10, dir_fd=fd)
        below = os.open("d" * 10, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    os.close(deep)
    for mode in (0o000, 0o111, 0o444, 0o500):
        folder = tmp_path / "top" / f"{mode:o}"
        folder.mkdir()
        (folder / "file").touch(mode)
        (folder / "sub").mkdir()
        (folder / "sub").chmod(mode)
        folder.chmod(mode)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (tmp_path / "top/link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "top")
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(tmp_path / "kept") == ["file"]


def test_what_dead_processes_staged_is_swept_and_what_living_ones_did_is_not(
    tmp_path: Path,
) -> None:
    with Store.open(tmp_path / "store") as store, store.scratch() as path:
        path.write_bytes(b"of a living one")
        dead = store.folder / "staging" / "dead"
        (dead / "0/fs").mkdir(parents=True)
        (dead / "0/fs").chmod(0o000)
        Store.open(tmp_path / "store").close()
        assert not dead.exists()
        assert path.read_bytes() == b"of a living one"


def _staged(store: Store) -> list[str]:
    return [name for one in (store.folder / "staging").iterdir() for name in os.listdir(one)]
