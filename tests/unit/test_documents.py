"""Documents of images: what is read, what is refused, and that bytes stay as they came."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import documents
from sandbox_kernel.image.documents import (
    DOCKER_CONFIG,
    DOCKER_INDEX,
    DOCKER_LAYER_GZIP,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    Descriptor,
    History,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    chain_id,
    check_digest,
    digest_of,
    parse_document,
)

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def manifest(**changes: Any) -> dict[str, Any]:
    value = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": A, "size": 10},
        "layers": [{"mediaType": OCI_LAYER_GZIP, "digest": B, "size": 20}],
    }
    value.update(changes)
    return {key: one for key, one in value.items() if one is not None}


def raw(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def entry(platform: str | None = None, digest: str = A, kind: str = OCI_MANIFEST) -> dict[str, Any]:
    found: dict[str, Any] = {"mediaType": kind, "digest": digest, "size": 5}
    if platform is not None:
        found["platform"] = Platform.parse(platform).as_json()
    return found


def index(*entries: dict[str, Any]) -> Index:
    found = parse_document(raw({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}))
    assert isinstance(found, Index)
    return found


# Digests


@pytest.mark.parametrize(
    "text",
    ["", "sha256:", "sha256:" + "A" * 64, "sha512:" + "a" * 128, A + "\n", A + "/..", None, 5],
)
def test_what_is_no_digest_is_refused(text: object) -> None:
    with pytest.raises(ImageError, match="is not a digest"):
        check_digest(text)


def test_chain_ids_are_those_of_the_image_spec() -> None:
    assert chain_id([A]) == A
    two = "sha256:" + hashlib.sha256(f"{A} {B}".encode()).hexdigest()
    assert chain_id([A, B]) == two
    assert chain_id([A, B, C]) == "sha256:" + hashlib.sha256(f"{two} {C}".encode()).hexdigest()
    with pytest.raises(ImageError, match="no layers"):
        chain_id([])


# Manifests


def test_a_manifest_keeps_its_bytes_and_so_its_digest() -> None:
    data = raw(manifest(annotations={"b": "1", "a": "2"}, unknown=[1]))
    found = Manifest.parse(data, OCI_MANIFEST)
    assert found.raw == data
    assert found.digest == digest_of(data)
    assert found.config == Descriptor(OCI_CONFIG, A, 10)
    assert found.layers == (Descriptor(OCI_LAYER_GZIP, B, 20),)
    assert found.size_bytes == 30
    assert found.annotations == (("a", "2"), ("b", "1"))


def test_dockers_manifest_is_read() -> None:
    value = manifest(
        mediaType=DOCKER_MANIFEST,
        config={"mediaType": DOCKER_CONFIG, "digest": A, "size": 10},
        layers=[{"mediaType": DOCKER_LAYER_GZIP, "digest": B, "size": 20}],
    )
    assert Manifest.parse(raw(value)).media_type == DOCKER_MANIFEST


def test_the_media_type_may_stand_inside_or_come_with_it_or_be_told_by_the_fields() -> None:
    bare = raw(manifest(mediaType=None))
    assert parse_document(bare).media_type == OCI_MANIFEST
    assert parse_document(bare, DOCKER_MANIFEST).media_type == DOCKER_MANIFEST
    assert (
        parse_document(raw(manifest()), OCI_MANIFEST + "; charset=utf-8").media_type == OCI_MANIFEST
    )


AMBIGUOUS = {
    "layers and manifests": (manifest(manifests=[]), ""),
    "a config and manifests": (manifest(layers=None, manifests=[]), ""),
    "another type inside than outside": (manifest(), DOCKER_MANIFEST),
    "an index by type, a manifest by fields": (manifest(mediaType=OCI_INDEX), ""),
    "a manifest by type, an index by fields": (
        {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "manifests": []},
        "",
    ),
    "a key in another case": (manifest(Layers=[]), ""),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_two_readers_may_read_in_two_ways_is_refused(name: str) -> None:
    value, media_type = AMBIGUOUS[name]
    with pytest.raises(ImageError, match="ambiguous"):
        parse_document(raw(value), media_type)


def test_a_key_that_stands_twice_is_refused() -> None:
    data = raw(manifest()).replace(b'"schemaVersion"', b'"layers": [], "schemaVersion"', 1)
    with pytest.raises(ImageError, match="ambiguous: the key 'layers' stands there twice"):
        parse_document(data)


REFUSED = {
    "not JSON": (b"{", "is not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "is not JSON"),
    "half a surrogate pair": (b'{"a": "\\ud800"}', "is not JSON"),
    "no number": (b'{"a": NaN}', "holds NaN"),
    "deeply nested": (b"[" * 100_000, "is not JSON"),
    "a list": (b"[]", "not a JSON object"),
    "too large": (b" " * (documents.MAX_DOCUMENT_BYTES + 1), "4194305 bytes"),
    "nothing of either kind": (b'{"schemaVersion": 2}', "neither layers nor manifests"),
    "schema 1": (b'{"schemaVersion": 1, "fsLayers": []}', "schema 1"),
    "another schema": (raw(manifest(schemaVersion=3)), "schemaVersion is 3"),
    "a text for a schema": (raw(manifest(schemaVersion="2")), "schemaVersion is '2'"),
    "an unknown type": (raw(manifest(mediaType="text/html")), "unknown media type 'text/html'"),
    "an artifact": (
        raw(
            manifest(
                config={
                    "mediaType": "application/vnd.cncf.helm.config.v1+json",
                    "digest": A,
                    "size": 1,
                }
            )
        ),
        "this is no image: .*helm",
    ),
    "an unknown layer": (
        raw(manifest(layers=[{"mediaType": "application/x-thing", "digest": B, "size": 1}])),
        "layer 0 has the unknown media type 'application/x-thing'",
    ),
    "a foreign layer": (
        raw(
            manifest(
                layers=[
                    {
                        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                        "digest": B,
                        "size": 1,
                        "urls": ["http://169.254.169.254/"],
                    }
                ]
            )
        ),
        "layer 0 is a foreign layer",
    ),
    "a digest with a path": (
        raw(manifest(config={"mediaType": OCI_CONFIG, "digest": "sha256:../../x", "size": 1})),
        "config: 'sha256:../../x' is not a digest",
    ),
    "a negative size": (
        raw(manifest(layers=[{"mediaType": OCI_LAYER_GZIP, "digest": B, "size": -1}])),
        r"layers\[0\]: size is -1",
    ),
    "a size that is true": (
        raw(manifest(layers=[{"mediaType": OCI_LAYER_GZIP, "digest": B, "size": True}])),
        "size is True",
    ),
    "a size that is a fraction": (
        raw(manifest(layers=[{"mediaType": OCI_LAYER_GZIP, "digest": B, "size": 1.5}])),
        "size is not a whole number",
    ),
    "no size": (
        raw(manifest(layers=[{"mediaType": OCI_LAYER_GZIP, "digest": B}])),
        "size is None",
    ),
    "layers that are no list": (raw(manifest(layers={})), "layers is not a list"),
    "a layer that is no object": (raw(manifest(layers=[1])), r"layers\[0\] is not an object"),
    "annotations that are no text": (raw(manifest(annotations={"a": 1})), "annotations holds '1'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_manifest_is_refused_with_the_reason(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(ImageError, match=reason):
        parse_document(data)


def test_a_manifest_that_is_built_is_canonical_and_of_its_configs_kind() -> None:
    layers = [Descriptor(OCI_LAYER_ZSTD, B, 20)]
    found = Manifest.build(Descriptor(OCI_CONFIG, A, 10), layers, {"z": "1", "a": "2"})
    assert found.raw == Manifest.build(found.config, found.layers, {"a": "2", "z": "1"}).raw
    assert found.media_type == OCI_MANIFEST
    docker = Manifest.build(
        Descriptor(DOCKER_CONFIG, A, 10), [Descriptor(DOCKER_LAYER_GZIP, B, 20)]
    )
    assert docker.media_type == DOCKER_MANIFEST


# Indexes and platforms


def test_an_index_gives_the_entry_of_the_platform() -> None:
    found = index(
        entry("linux/arm64/v8", A), entry("linux/amd64", B), entry("windows/amd64", C), entry()
    )
    assert found.choose(Platform("linux", "amd64")).digest == B
    assert found.choose(Platform("linux", "arm64")).digest == A
    assert found.choose(Platform("linux", "arm64", "v8")).digest == A


def test_the_newest_variant_that_the_processor_has_is_chosen() -> None:
    found = index(entry("linux/arm/v5", A), entry("linux/arm/v6", B), entry("linux/arm/v7", C))
    assert found.choose(Platform("linux", "arm", "v6")).digest == B
    assert found.choose(Platform("linux", "arm", "v8")).digest == C
    with pytest.raises(ImageError, match="no image for linux/amd64"):
        index(entry("linux/amd64/v3")).choose(Platform("linux", "amd64"))


def test_no_fitting_entry_is_an_error_that_names_what_is_there() -> None:
    with pytest.raises(ImageError) as caught:
        index(entry("linux/s390x"), entry("linux/amd64", B)).choose(Platform("linux", "riscv64"))
    assert caught.value.message == "the index has no image for linux/riscv64"
    assert caught.value.hint == "it has linux/amd64, linux/s390x"


def test_entries_of_other_kinds_are_passed_over() -> None:
    odd = entry("linux/amd64", A, "application/vnd.example.thing")
    attestation = entry("unknown/unknown", C)
    found = index(odd, attestation, entry("linux/amd64", B))
    assert found.choose(Platform("linux", "amd64")).digest == B
    assert index(entry(None, B)).choose(Platform("linux", "amd64")).digest == B


def test_dockers_manifest_list_is_an_index() -> None:
    value = {"schemaVersion": 2, "mediaType": DOCKER_INDEX, "manifests": [entry("linux/amd64")]}
    assert isinstance(parse_document(raw(value)), Index)
    with pytest.raises(ImageError, match="an index stands where a manifest is due"):
        Manifest.parse(raw(value))


# Configs


CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "created": "2026-01-02T03:04:05Z",
    "author": "me",
    "config": {
        "Env": ["PATH=/bin", "EMPTY=", "A=b=c"],
        "WorkingDir": "/work",
        "User": "1000:1000",
        "Entrypoint": ["/init"],
        "Cmd": ["sh"],
        "Labels": {"b": "2", "a": "1"},
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "Volumes": {"/data": {}},
        "StopSignal": "SIGTERM",
        "Shell": ["/bin/bash", "-c"],
        "Healthcheck": {"Test": ["CMD", "true"], "Interval": 3000000000},
        "OnBuild": ["RUN x"],
        "Tty": False,
    },
    "rootfs": {"type": "layers", "diff_ids": [A, B]},
    "history": [
        {"created": "2026-01-02T03:04:05Z", "created_by": "COPY x", "comment": "c"},
        {"created_by": "ENV a", "empty_layer": True},
    ],
}


def test_a_config_is_read() -> None:
    found = ImageConfig.parse(raw(CONFIG))
    assert found.env == (("PATH", "/bin"), ("EMPTY", ""), ("A", "b=c"))
    assert found.labels == (("a", "1"), ("b", "2"))
    assert found.exposed_ports == ("53/udp", "80/tcp")
    assert found.healthcheck == {"Test": ["CMD", "true"], "Interval": 3000000000}
    assert found.diff_ids == (A, B)
    assert found.history[1] == History(created_by="ENV a", empty_layer=True)
    assert found.image_id == digest_of(raw(CONFIG))
    assert found.platform == Platform("linux", "amd64")


def test_a_config_that_is_replaced_says_the_same_but_for_the_change() -> None:
    found = ImageConfig.parse(raw(CONFIG))
    changed = found.replace(user="root", cmd=())
    again = ImageConfig.parse(changed.raw)
    assert again == changed
    assert again.replace(user=found.user, cmd=found.cmd).raw == found.replace().raw
    assert b'"Cmd"' not in changed.raw


def test_nulls_of_go_are_empty() -> None:
    value = {
        **CONFIG,
        "config": {"Env": None, "Labels": None, "Healthcheck": None},
        "history": None,
    }
    found = ImageConfig.parse(raw(value))
    assert (found.env, found.labels, found.healthcheck, found.history) == ((), (), None, ())
    assert ImageConfig.parse(raw({**CONFIG, "config": None})).cmd == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rootfs": {"type": "windows", "diff_ids": []}}, "rootfs.type is 'windows'"),
        ({"rootfs": {"type": "layers", "diff_ids": ["x"]}}, "'x' is not a digest"),
        ({"config": {"Env": "A=b"}}, "config: Env is not a list"),
        ({"config": {"Cmd": [1]}}, "Cmd holds '1', not a text"),
        ({"config": {"Labels": {"a": []}}}, "Labels holds"),
        ({"config": []}, "config is not an object"),
        ({"os": 5}, "os is not a text"),
    ],
)
def test_a_bad_config_is_refused_with_the_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        ImageConfig.parse(raw({**CONFIG, **change}))


# Without a database: the tree may be another user's.
@settings(database=None)
@given(st.binary(max_size=200))
def test_no_bytes_crash_a_reader(data: bytes) -> None:
    for read in (parse_document, ImageConfig.parse):
        with pytest.raises(ImageError):
            read(data)


# Of few letters: all of Unicode takes seconds where its table cannot be kept.
TEXT = st.text("aZ09/:.-_ \0é\ud800😀", max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
KEYS = ["schemaVersion", "mediaType", "config", "layers", "manifests", "rootfs", "history", "os"]


@settings(database=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_no_document_crashes_a_reader(value: dict[str, Any]) -> None:
    for base in (manifest(), CONFIG):
        for read in (parse_document, ImageConfig.parse):
            try:
                read(json.dumps({**base, **value}).encode())
            except ImageError:
                continue
