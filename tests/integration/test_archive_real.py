"""Archives and layouts between this store and the tools that people have."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from sandbox_kernel.image.archive import ImportOptions, import_archive
from sandbox_kernel.image.documents import OCI_LAYER_ZSTD, chain_id
from sandbox_kernel.image.export import export_images
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import Store
from tests.fakes.images import image_of, problems

pytestmark = pytest.mark.programs("skopeo", "umoci", "podman")

ONE = image_of([{"etc/a": b"1", "bin/x": b"x" * 5000}, {"etc/b": b"2"}])
TWO = image_of([{"etc/a": b"1", "bin/x": b"x" * 5000}, {"etc/c": b"3"}])


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def stack():
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def other(tmp_path: Path):
    with Store.open(tmp_path / "other") as opened:
        yield opened


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def copy(source: str, target: str) -> None:
    run("skopeo", "--insecure-policy", "copy", source, target)


def inspect(source: str) -> dict:
    return json.loads(run("skopeo", "inspect", source))


def test_the_store_itself_is_a_layout_that_skopeo_and_umoci_read(store: Store) -> None:
    image = ONE.put(store, "me/app:1")
    found = inspect(f"oci:{store.folder}:docker.io/me/app:1")
    assert found["Digest"] == image.digest
    assert found["Layers"] == [layer.digest for layer in image.manifest.layers]
    assert run("umoci", "ls", "--layout", store.folder).split() == ["docker.io/me/app:1"]


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
def test_skopeo_takes_what_is_exported_with_the_same_config_and_layers(
    store: Store, tmp_path: Path, kind: str
) -> None:
    images = [ONE.put(store, "me/app:1"), TWO.put(store, "me/app:2")]
    export_images(store, images, kind, tmp_path / "out")
    for image, tag in zip(images, "12", strict=True):
        name = f"docker.io/me/app:{tag}" if kind == "docker-archive" else tag
        copy(f"{kind}:{tmp_path / 'out'}:{name}", f"dir:{tmp_path / tag}")
        manifest = json.loads((tmp_path / tag / "manifest.json").read_bytes())
        config = (tmp_path / tag / manifest["config"]["digest"][7:]).read_bytes()
        assert config == image.config.raw
        if kind != "docker-archive":
            assert [one["digest"] for one in manifest["layers"]] == [
                one.digest for one in image.manifest.layers
            ]


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive", "dir-to-oci"])
def test_what_skopeo_writes_is_taken(store: Store, other: Store, tmp_path: Path, kind: str) -> None:
    export_images(store, [ONE.put(store, "me/app:1")], "oci", tmp_path / "out")
    name = "docker.io/me/app:5"
    if kind == "dir-to-oci":
        # Docker's types come so: skopeo keeps them.
        copy(f"oci:{tmp_path / 'out'}:1", f"docker-archive:{tmp_path / 'saved'}:{name}")
        copy(f"docker-archive:{tmp_path / 'saved'}", f"dir:{tmp_path / 'dir'}")
        copy(f"dir:{tmp_path / 'dir'}", f"oci:{tmp_path / 'in'}:{name}")
    else:
        copy(f"oci:{tmp_path / 'out'}:1", f"{kind}:{tmp_path / 'in'}:{name}")
    (image,) = import_archive(other, tmp_path / "in")
    assert str(image.reference) == "me/app:5"
    assert image.config.diff_ids == ONE.config.diff_ids
    assert image.config.env == ONE.config.env
    trees = other.ensure_layers(image)
    assert (trees[1] / "etc/b").read_bytes() == b"2"
    assert problems(other) == []


def test_zstd_layers_of_skopeo_are_taken(store: Store, other: Store, tmp_path: Path) -> None:
    # From an archive, whose layers are not compressed: skopeo keeps what is.
    export_images(store, [ONE.put(store, "app")], "docker-archive", tmp_path / "out")
    zstd = ["--dest-compress", "--dest-compress-format=zstd"]
    source, target = f"docker-archive:{tmp_path / 'out'}", f"oci:{tmp_path / 'in'}:app"
    run("skopeo", "--insecure-policy", "copy", *zstd, source, target)
    (image,) = import_archive(other, tmp_path / "in")
    assert {layer.media_type for layer in image.manifest.layers} == {OCI_LAYER_ZSTD}
    assert image.config.diff_ids == ONE.config.diff_ids


def test_umoci_unpacks_what_is_exported_to_the_same_files(store: Store, tmp_path: Path) -> None:
    image = ONE.put(store, "app:1")
    export_images(store, [image], "oci", tmp_path / "out")
    rootless = ["--rootless"] if os.geteuid() else []
    run("umoci", "unpack", *rootless, "--image", f"{tmp_path / 'out'}:1", tmp_path / "bundle")
    for tree in store.ensure_layers(image):
        for path in (path for path in tree.rglob("*") if path.is_file()):
            found = tmp_path / "bundle/rootfs" / path.relative_to(tree)
            assert found.read_bytes() == path.read_bytes()
    stat = json.loads(run("umoci", "stat", "--json", "--image", f"{tmp_path / 'out'}:1"))
    assert [row["layer"]["digest"] for row in stat["history"]] == [
        layer.digest for layer in image.manifest.layers
    ]


def test_what_umoci_builds_is_taken_with_its_whiteouts(store: Store, tmp_path: Path) -> None:
    layout, bundle = tmp_path / "layout", tmp_path / "bundle"
    rootless = ["--rootless"] if os.geteuid() else []
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:base")
    for tag, change in (("one", _first), ("two", _second)):
        shutil.rmtree(bundle, ignore_errors=True)
        source = "base" if tag == "one" else "one"
        run("umoci", "unpack", *rootless, "--image", f"{layout}:{source}", bundle)
        change(bundle / "rootfs")
        run("umoci", "repack", "--image", f"{layout}:{tag}", bundle)
    run(
        "umoci", "config", "--config.cmd", "sh", "--config.env", "A=b=c", "--image", f"{layout}:two"
    )
    found = {str(image.reference): image for image in import_archive(store, layout)}
    assert set(found) == {"base:latest", "one:latest", "two:latest"}
    image = found["two:latest"]
    assert image.config.cmd == ("sh",)
    assert ("A", "b=c") in image.config.env
    lower, upper = store.ensure_layers(image)
    assert (lower / "gone").read_bytes() == b"1"
    assert (upper / "gone").is_char_device()
    assert (upper / "new").read_bytes() == b"2"
    assert found["one:latest"].config.diff_ids == image.config.diff_ids[:1]
    assert store.history(image)[-1].chain_id == chain_id(image.config.diff_ids[:1])
    assert problems(store) == []


def _first(root: Path) -> None:
    (root / "gone").write_bytes(b"1")
    (root / "kept").write_bytes(b"1")


def _second(root: Path) -> None:
    (root / "gone").unlink()
    (root / "new").write_bytes(b"2")


def test_the_tar_of_a_root_goes_through_skopeo_and_umoci_unharmed(
    store: Store, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/hosts").write_bytes(b"127.0.0.1\n")
    (root / "link").symlink_to("/etc/hosts")
    run("tar", "-C", root, "-czf", tmp_path / "root.tar.gz", ".")
    options = ImportOptions(name=Reference.parse("base:1"))
    (image,) = import_archive(store, tmp_path / "root.tar.gz", options)
    export_images(store, [image], "oci-archive", tmp_path / "out")
    copy(f"oci-archive:{tmp_path / 'out'}:1", f"oci:{tmp_path / 'layout'}:1")
    assert inspect(f"oci:{tmp_path / 'layout'}:1")["Digest"] == image.digest
    rootless = ["--rootless"] if os.geteuid() else []
    run("umoci", "unpack", *rootless, "--image", f"{tmp_path / 'layout'}:1", tmp_path / "bundle")
    assert (tmp_path / "bundle/rootfs/link").readlink() == Path("/etc/hosts")
    stat = json.loads(run("umoci", "stat", "--json", "--image", f"{tmp_path / 'layout'}:1"))
    assert len(stat["history"]) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="podman of an ordinary user needs subordinate ids")
@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_podman_takes_what_is_exported_and_gives_it_back(
    store: Store, other: Store, tmp_path: Path, stack: ExitStack, kind: str
) -> None:
    image = ONE.put(store, "me/app:1")
    export_images(store, [image], kind, tmp_path / "out")
    # It takes no path of more than 50 characters for its run-time files.
    short = stack.enter_context(tempfile.TemporaryDirectory())
    podman = ["podman", f"--root={short}/root", f"--runroot={short}/run", "--storage-driver=vfs"]
    run(*podman, "load", "--quiet", "--input", tmp_path / "out")
    (found,) = json.loads(run(*podman, "images", "--format=json"))
    assert f"sha256:{found['Id']}" == image.image_id
    run(*podman, "save", "--quiet", f"--format={kind}", "--output", tmp_path / "back", found["Id"])
    (back,) = import_archive(other, tmp_path / "back", ImportOptions(name=Reference.parse("b")))
    assert back.image_id == image.image_id
    assert problems(other) == []
