"""Archives of images, mostly hostile ones: refused with the reason, and nothing is left of them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import archive_source
from sandbox_kernel.image.archive import ImportOptions, import_archive
from sandbox_kernel.image.documents import (
    DOCKER_CONFIG,
    DOCKER_LAYER_GZIP,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    Platform,
    digest_of,
)
from sandbox_kernel.image.export import FORMATS, export_images
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import Store
from tests.fakes.images import FakeImage, image_of, problems, tar_of

IMAGE = image_of([{"etc/a": b"1"}, {"b": b"2" * 1000}])
OTHER = image_of([{"etc/a": b"1"}, {"c": b"3"}], cmd=["other"])
NAME = ImportOptions(name=Reference.parse("given:1"))
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "store") as opened:
        yield opened


Entry = tuple[str, bytes] | tarfile.TarInfo


def archive(path: Path, entries: Iterable[Entry]) -> Path:
    """Write a tar with these entries, in this order, whatever they are."""
    with tarfile.open(path, "w") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            tar.addfile(info, io.BytesIO(entry[1]))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def descriptor(image: FakeImage, name: str = "", **more: Any) -> dict[str, Any]:
    found = {
        "mediaType": OCI_MANIFEST,
        "digest": image.manifest.digest,
        "size": len(image.manifest.raw),
    }
    if name:
        found["annotations"] = {"org.opencontainers.image.ref.name": name}
    return {**found, **more}


def index(*manifests: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "manifests": manifests}).encode()


def oci(*images: tuple[FakeImage, str]) -> dict[str, bytes]:
    """Give the parts of an OCI layout."""
    parts = {"oci-layout": LAYOUT, "index.json": index(*(descriptor(*one) for one in images))}
    for image, _ in images:
        parts.update({f"blobs/sha256/{digest[7:]}": data for digest, data in image.blobs.items()})
    return parts


def docker(image: FakeImage, *tags: str) -> dict[str, bytes]:
    """Give the parts of a docker-archive."""
    names = [f"{n}/layer.tar" for n in range(len(image.manifest.layers))]
    parts = {
        name: gzip.decompress(image.blobs[layer.digest])
        for name, layer in zip(names, image.manifest.layers, strict=True)
    }
    parts[f"{image.config.image_id[7:]}.json"] = image.config.raw
    entry = {"Config": f"{image.config.image_id[7:]}.json", "RepoTags": list(tags), "Layers": names}
    return {**parts, "manifest.json": json.dumps([entry]).encode()}


def names(store: Store) -> list[str]:
    return [str(image.reference) for image in store.images()]


def untouched(store: Store) -> None:
    """Nothing has a name, nothing is staged, nothing lies beside the store."""
    assert store.images() == ()
    assert [
        one for staging in (store.folder / "staging").iterdir() for one in os.listdir(staging)
    ] == []
    assert set(os.listdir(store.folder.parent)) <= {"store", "archive", "folder"}
    assert problems(store) == []


# What is taken


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_exported_is_taken_again(store: Store, tmp_path: Path, kind: str) -> None:
    images = [IMAGE.put(store, "me/one:1"), OTHER.put(store, "me/two:1")]
    for target in ("first", "second"):
        export_images(store, images, kind, tmp_path / target)
    if kind != "oci":
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    with Store.open(tmp_path / "other") as other:
        found = import_archive(other, tmp_path / "first")
        assert [str(one.reference) for one in found] == ["me/one:1", "me/two:1"]
        assert [one.image_id for one in found] == [one.image_id for one in images]
        if kind != "docker-archive":
            assert [one.digest for one in found] == [one.digest for one in images]
        tree = other.ensure_layers(other.resolve("me/one:1"))[1]
        assert (tree / "b").read_bytes() == b"2" * 1000
        assert problems(other) == []


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_an_archive_may_be_compressed_or_come_as_a_stream(
    store: Store, tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    path = archive(tmp_path / "archive", oci((IMAGE, "app:1")).items())
    data = compress(path.read_bytes())
    path.write_bytes(data)
    assert [one.digest for one in import_archive(store, path)] == [IMAGE.manifest.digest]
    assert [one.digest for one in import_archive(store, io.BytesIO(data))] == [
        IMAGE.manifest.digest
    ]
    assert names(store) == ["app:1"]


def test_a_docker_archive_is_taken_and_gives_the_same_digest_every_time(
    store: Store, tmp_path: Path
) -> None:
    path = archive(tmp_path / "archive", docker(IMAGE, "app:1", "me/app:2").items())
    first = import_archive(store, path)
    assert [str(one.reference) for one in first] == ["app:1", "me/app:2"]
    assert {one.image_id for one in first} == {IMAGE.config.image_id}
    assert first[0].manifest.layers[0].media_type == OCI_LAYER
    assert import_archive(store, path) == first


def test_layers_of_a_docker_archive_may_be_compressed_and_linked(
    store: Store, tmp_path: Path
) -> None:
    twice = image_of([{"a": b"1"}, {"b": b"2"}, {"a": b"1"}])
    parts = docker(twice, "app")
    parts["1/layer.tar"] = gzip.compress(parts["1/layer.tar"])
    del parts["2/layer.tar"]
    hard = link("3/layer.tar", "0/layer.tar", tarfile.LNKTYPE)
    parts["manifest.json"] = parts["manifest.json"].replace(b"0/layer.tar", b"3/layer.tar")
    entries = [*parts.items(), link("2/layer.tar", "../0/layer.tar"), hard]
    (image,) = import_archive(store, archive(tmp_path / "archive", entries))
    assert image.manifest.layers[1].media_type == OCI_LAYER_GZIP
    assert image.manifest.layers[0] == image.manifest.layers[2]


def test_a_docker_archive_with_an_oci_layout_inside_is_one_image(
    store: Store, tmp_path: Path
) -> None:
    parts = oci((IMAGE, "latest"))
    parts["index.json"] = index(
        descriptor(
            IMAGE,
            annotations={
                "io.containerd.image.name": "docker.io/me/app:latest",
                "org.opencontainers.image.ref.name": "latest",
            },
        )
    )
    entry = {
        "Config": f"blobs/sha256/{IMAGE.config.image_id[7:]}",
        "RepoTags": ["me/app:latest"],
        "Layers": [f"blobs/sha256/{layer.digest[7:]}" for layer in IMAGE.manifest.layers],
    }
    parts["manifest.json"] = json.dumps([entry]).encode()
    import_archive(store, archive(tmp_path / "archive", parts.items()))
    assert names(store) == ["me/app:latest"]
    parts["manifest.json"] = docker(OTHER)["manifest.json"]
    parts[f"{OTHER.config.image_id[7:]}.json"] = OTHER.config.raw
    with pytest.raises(ImageError, match=r"ambiguous: index\.json and manifest\.json"):
        import_archive(store, archive(tmp_path / "archive", parts.items()))


def test_a_nested_index_gives_the_image_of_the_platform(store: Store, tmp_path: Path) -> None:
    nested = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [
                descriptor(OTHER, platform={"os": "linux", "architecture": "s390x"}),
                descriptor(IMAGE, platform=Platform.host().as_json()),
            ],
        }
    ).encode()
    parts = oci((IMAGE, ""), (OTHER, ""))
    parts[f"blobs/sha256/{digest_of(nested)[7:]}"] = nested
    parts["index.json"] = index(
        {
            "mediaType": OCI_INDEX,
            "digest": digest_of(nested),
            "size": len(nested),
            "annotations": {"org.opencontainers.image.ref.name": "app:1"},
        }
    )
    path = archive(tmp_path / "archive", parts.items())
    assert import_archive(store, path)[0].digest == IMAGE.manifest.digest
    other = ImportOptions(platform=Platform("linux", "s390x"))
    assert import_archive(store, path, other)[0].digest == OTHER.manifest.digest
    with pytest.raises(ImageError, match="no image for linux/riscv64"):
        import_archive(store, path, ImportOptions(platform=Platform("linux", "riscv64")))


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_the_tar_of_a_root_becomes_an_image_of_one_layer(
    store: Store, tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "archive").write_bytes(compress(tar_of({"etc/a": b"1"})))
    with pytest.raises(ImageError, match="has no name") as caught:
        import_archive(store, tmp_path / "archive")
    assert "--name" in caught.value.hint
    (image,) = import_archive(store, tmp_path / "archive", NAME)
    assert image.config.diff_ids == (digest_of(tar_of({"etc/a": b"1"})),)
    assert image.config.platform == Platform.host()
    assert (store.ensure_layers(image)[0] / "etc/a").read_bytes() == b"1"
    assert import_archive(store, tmp_path / "archive", NAME) == (image,)


def test_a_root_with_more_files_than_an_archive_has_is_known_to_be_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_source, "MAX_MEMBERS", 10)
    (tmp_path / "archive").write_bytes(tar_of({f"f{n}": b"" for n in range(11)}))
    (image,) = import_archive(store, tmp_path / "archive", NAME)
    assert len(os.listdir(store.ensure_layers(image)[0])) == 11


def test_a_name_takes_the_place_of_that_in_the_archive_and_fits_one_image(
    store: Store, tmp_path: Path
) -> None:
    import_archive(store, archive(tmp_path / "archive", oci((IMAGE, "app:1")).items()), NAME)
    assert names(store) == ["given:1"]
    two = archive(tmp_path / "archive", oci((IMAGE, "a"), (OTHER, "b")).items())
    with pytest.raises(ImageError, match="has 2 images, and given:1 is one name"):
        import_archive(store, two, NAME)


def test_an_image_without_a_name_is_kept_without(store: Store, tmp_path: Path) -> None:
    parts = oci((IMAGE, "no name / at all"))
    import_archive(store, archive(tmp_path / "archive", parts.items()))
    assert names(store) == ["None"]


# What is refused


def changed(parts: dict[str, bytes], **changes: bytes | None) -> list[Entry]:
    found = {**parts, **{name.replace("__", "."): data for name, data in changes.items()}}
    return [(name, data) for name, data in found.items() if data is not None]


def hostile() -> dict[str, tuple[list[Entry], str]]:
    """Give archives that are refused, each with the reason."""
    whole, saved = oci((IMAGE, "app:1")), docker(IMAGE, "app:1")
    config, layer = IMAGE.config.image_id[7:], IMAGE.manifest.layers[1].digest[7:]
    large = descriptor(IMAGE, "app", size=len(IMAGE.manifest.raw) + 1)
    lying = image_of([{"etc/a": b"another"}, {"b": b"2" * 1000}])
    swapped = Manifest.build(IMAGE.manifest.config, lying.manifest.layers)
    liar = FakeImage(
        swapped, IMAGE.config, {**IMAGE.blobs, **lying.blobs, swapped.digest: swapped.raw}
    )
    device = tarfile.TarInfo("oci-layout")
    device.type = tarfile.CHRTYPE
    loop = [link("0/layer.tar", "../1/layer.tar"), link("1/layer.tar", "../0/layer.tar")]
    old = {"repositories": b"{}", "0/layer.tar": b""}
    return {
        "a name that climbs": ([*whole.items(), ("../x", b"1")], "'../x', which leads out"),
        "an absolute name": ([*whole.items(), ("/etc/x", b"1")], "'/etc/x', which leads out"),
        "a name twice": (
            [*whole.items(), ("./index.json", b"{}")],
            "index.json stands there twice",
        ),
        "a blob twice": (
            [*whole.items(), (f"blobs//sha256/{layer}", b"x")],
            f"{layer} stands there twice",
        ),
        "a device": (
            [device, *changed(whole, **{"oci-layout": None})],
            "neither a file nor a link",
        ),
        "a link that leads out": (
            [*changed(saved, **{"0/layer.tar": None}), link("0/layer.tar", "../../etc/passwd")],
            "links to '../../etc/passwd', which leads out",
        ),
        "an absolute link": (
            [*changed(saved, **{"0/layer.tar": None}), link("0/layer.tar", "/etc/passwd")],
            "links to '/etc/passwd', which leads out",
        ),
        "links in a circle": (
            [*changed(saved, **{"0/layer.tar": None, "1/layer.tar": None}), *loop],
            "too many links",
        ),
        "a missing blob": (
            changed(whole, **{f"blobs/sha256/{layer}": None}),
            f"{layer} is missing in the archive",
        ),
        "a blob that is another": (
            changed(whole, **{f"blobs/sha256/{layer}": IMAGE.blobs[f"sha256:{layer}"][:-1] + b"x"}),
            "the digest does not match",
        ),
        "a blob that is longer": (
            changed(whole, **{f"blobs/sha256/{layer}": IMAGE.blobs[f"sha256:{layer}"] + b"x"}),
            "is longer than",
        ),
        "a config that is another": (
            changed(
                whole,
                **{f"blobs/sha256/{config}": b"{" + b" " * (len(IMAGE.config.raw) - 2) + b"}"},
            ),
            "the digest does not match",
        ),
        "a manifest that is another": (
            changed(
                whole, **{f"blobs/sha256/{IMAGE.manifest.digest[7:]}": IMAGE.manifest.raw + b" "}
            ),
            "its descriptor says",
        ),
        "a manifest of another size": (
            changed(whole, index__json=index(large)),
            "its descriptor says",
        ),
        "a digest with a path": (
            changed(
                whole, index__json=index(descriptor(IMAGE, digest="sha256:../../../etc/passwd"))
            ),
            "is not a digest",
        ),
        "an index with a key twice": (
            changed(whole, index__json=b'{"manifests": [], "manifests": []}'),
            "ambiguous: the key 'manifests'",
        ),
        "an index of nothing": (changed(whole, index__json=index()), "names no image"),
        "another version": (
            changed(whole, **{"oci-layout": b'{"imageLayoutVersion":"2.0.0"}'}),
            "has the version '2.0.0'",
        ),
        "a layer that the config does not name": (
            list(oci((liar, "app")).items()),
            "its DiffID is",
        ),
        "a layer that climbs": _climbing(tar_of({"a/../../../x": b"1"})),
        "docker: a layer that is another": (
            changed(saved, **{"1/layer.tar": tar_of({"b": b"no"})}),
            "the layer 1/layer.tar: the digest does not match",
        ),
        "docker: a config that is another": (
            changed(saved, **{f"{config}.json": IMAGE.config.raw + b" "}),
            f"the config {config}.json does not match",
        ),
        "docker: a layer too few": (
            changed(saved, manifest__json=_entry(saved, Layers=["0/layer.tar"])),
            "names 1 layers, the image's config 2 DiffIDs",
        ),
        "docker: a config elsewhere": (
            changed(saved, manifest__json=_entry(saved, Config="../../etc/passwd")),
            "'../../etc/passwd', which leads out",
        ),
        "docker: a bad tag": (
            changed(saved, manifest__json=_entry(saved, RepoTags=["a b"])),
            "cannot be a part of an image's name",
        ),
        "docker: nothing": (changed(saved, manifest__json=b"[]"), "names no image"),
        "docker: no list": (changed(saved, manifest__json=b"{}"), "is not a list"),
        "docker: of long ago": (list(old.items()), "older than 1.10"),
    }


def _entry(parts: dict[str, bytes], **changes: Any) -> bytes:
    (entry,) = json.loads(parts["manifest.json"])
    return json.dumps([{**entry, **changes}]).encode()


def _climbing(layer: bytes) -> tuple[list[Entry], str]:
    config = IMAGE.config.replace(diff_ids=(digest_of(layer),))
    manifest = Manifest.build(
        Descriptor(OCI_CONFIG, config.image_id, len(config.raw)),
        [Descriptor(OCI_LAYER, digest_of(layer), len(layer))],
    )
    blobs = {digest_of(data): data for data in (layer, config.raw, manifest.raw)}
    return list(oci((FakeImage(manifest, config, blobs), "app")).items()), "climbs"


HOSTILE = hostile()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_with_the_reason(
    store: Store, tmp_path: Path, name: str
) -> None:
    entries, reason = HOSTILE[name]
    path = archive(tmp_path / "archive", entries)
    with pytest.raises(ImageError) as caught:
        import_archive(store, path)
    assert reason in str(caught.value)
    untouched(store)


def test_of_two_images_none_has_a_name_if_one_is_refused(store: Store, tmp_path: Path) -> None:
    parts = oci((IMAGE, "a"), (OTHER, "b"))
    del parts[f"blobs/sha256/{OTHER.manifest.layers[1].digest[7:]}"]
    with pytest.raises(ImageError, match="is missing in the archive"):
        import_archive(store, archive(tmp_path / "archive", parts.items()))
    untouched(store)


def test_what_is_no_tar_is_refused(store: Store, tmp_path: Path) -> None:
    for data, reason in (
        (b"no tar at all" * 100, "not a tar archive"),
        (b"", "not a tar archive"),
        (gzip.compress(b"x" * 10000)[:-5], "cut off"),
        (
            archive(tmp_path / "archive", oci((IMAGE, "a")).items()).read_bytes()[:3000],
            "unexpected end of data",
        ),
    ):
        with pytest.raises(ImageError, match=reason):
            import_archive(store, io.BytesIO(data))
    (tmp_path / "archive").unlink()
    untouched(store)


def header(size_field: bytes, kind: bytes = b"0") -> bytes:
    """Give one tar header whose size field is of any kind."""
    info = tarfile.TarInfo("x")
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = size_field.ljust(12, b"\0")
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        # Base 256, with a sign: a reader that follows it reads the same header again for ever.
        (header(b"\xff" * 11 + b"\xfe") * 4, "negative size"),
        (header(b"\xff" * 10 + b"\xfe\x00") * 4, "negative size"),
        (header(b"77777777777", b"x") + b"0" * 5000, "a header of more than"),
        (header(b"77777777777", b"L") + b"0" * 5000, "a header of more than"),
    ],
)
def test_headers_that_lead_back_or_are_without_end_are_refused(
    store: Store, data: bytes, reason: str
) -> None:
    with pytest.raises(ImageError, match=reason):
        import_archive(store, io.BytesIO(data))
    untouched(store)


# Folders


def layout(folder: Path, parts: dict[str, bytes]) -> Path:
    for name, data in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_layout_in_a_folder_is_taken(store: Store, tmp_path: Path) -> None:
    folder = layout(tmp_path / "folder", oci((IMAGE, "app:1")))
    assert import_archive(store, folder)[0].digest == IMAGE.manifest.digest


def test_a_folder_that_is_no_layout_says_how_to_take_it(store: Store, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageError, match="is no OCI layout") as caught:
        import_archive(store, tmp_path / "folder")
    assert "a tar" in caught.value.hint
    with pytest.raises(ImageError, match="missing cannot be read: No such file"):
        import_archive(store, tmp_path / "missing")


def test_links_and_pipes_in_a_folder_are_not_followed(store: Store, tmp_path: Path) -> None:
    folder = layout(tmp_path / "folder", oci((IMAGE, "app:1")))
    blob = folder / "blobs/sha256" / IMAGE.manifest.layers[1].digest[7:]
    real = blob.read_bytes()
    blob.unlink()
    (folder / "elsewhere").write_bytes(real)
    blob.symlink_to(folder / "elsewhere")
    with pytest.raises(ImageError, match="cannot be read: Too many levels of symbolic links"):
        import_archive(store, folder)
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(ImageError, match="is not a file"):
        import_archive(store, folder)
    (folder / "blobs").rename(folder / "moved")
    (folder / "blobs").symlink_to(folder / "moved")
    with pytest.raises(ImageError, match="Not a directory"):
        import_archive(store, folder)
    untouched(store)


# Export


def test_an_export_takes_the_place_of_a_file_and_of_no_folder(store: Store, tmp_path: Path) -> None:
    image = IMAGE.put(store, "app")
    (tmp_path / "archive").write_bytes(b"old")
    export_images(store, [image], "oci-archive", tmp_path / "archive")
    assert tarfile.is_tarfile(tmp_path / "archive")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageError, match="is a folder"):
        export_images(store, [image], "docker-archive", tmp_path / "folder")
    export_images(store, [image], "oci", tmp_path / "folder")
    with pytest.raises(ImageError, match="cannot be written: Directory not empty"):
        export_images(store, [image], "oci", tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["archive", "folder", "store"]


def test_an_export_that_fails_leaves_what_was_there(store: Store, tmp_path: Path) -> None:
    image = IMAGE.put(store, "app")
    (store.folder / "blobs/sha256" / IMAGE.manifest.layers[1].digest[7:]).unlink()
    (tmp_path / "archive").write_bytes(b"old")
    for kind in FORMATS:
        target = tmp_path / ("folder" if kind == "oci" else "archive")
        with pytest.raises(ImageError, match="is not in the store"):
            export_images(store, [image], kind, target)
    assert (tmp_path / "archive").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["archive", "store"]


def test_an_image_of_dockers_types_becomes_one_of_ocis_in_a_layout(
    store: Store, tmp_path: Path
) -> None:
    for data in IMAGE.blobs.values():
        store.put_blob(data)
    manifest = Manifest.build(
        Descriptor(DOCKER_CONFIG, IMAGE.config.image_id, len(IMAGE.config.raw)),
        [
            Descriptor(DOCKER_LAYER_GZIP, one.digest, one.size_bytes)
            for one in IMAGE.manifest.layers
        ],
    )
    image = store.put_image("app", manifest.raw, manifest.media_type)
    export_images(store, [image], "oci", tmp_path / "folder")
    with Store.open(tmp_path / "other") as other:
        assert import_archive(other, tmp_path / "folder")[0].digest == IMAGE.manifest.digest


def test_a_format_that_is_none_is_named(store: Store, tmp_path: Path) -> None:
    image = IMAGE.put(store, "app")
    with pytest.raises(ImageError, match="'zip' is no format"):
        export_images(store, [image], "zip", tmp_path / "x")
    with pytest.raises(ImageError, match="a folder cannot be written to a stream"):
        export_images(store, [image], "oci", io.BytesIO())
    with pytest.raises(ImageError, match="no image to export"):
        export_images(store, [], "oci", tmp_path / "x")
