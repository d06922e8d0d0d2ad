"""Images of a docker-archive, as `docker save`, podman and skopeo write it.

`manifest.json` names for each image a config, its layers as tars, and its tags. Layers that
stand there twice are links in old ones. The digest of a config is its image's ID; that of a tar
is in the config as DiffID, so all of it is verified.
"""

from __future__ import annotations

import re

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.archive_parts import (
    MAX_IMAGES,
    MAX_LAYERS,
    Found,
    ImportOptions,
    check_count,
    take_blob,
)
from sandbox_kernel.image.archive_source import Source, read_document
from sandbox_kernel.image.compression import compression_of
from sandbox_kernel.image.documents import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    Descriptor,
    ImageConfig,
    Manifest,
    digest_of,
)
from sandbox_kernel.image.fields import Fields, parse_objects
from sandbox_kernel.image.layer_reader import CHUNK_BYTES, Counted
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import Store

MANIFEST_FILE = "manifest.json"
OLD_FILE = "repositories"
_HEX_NAME = re.compile(r"(?:.*/)?([0-9a-f]{64})(?:\.json)?", re.ASCII)
_TYPES = {"": OCI_LAYER, "gzip": OCI_LAYER_GZIP, "zstd": OCI_LAYER_ZSTD}


def is_docker_archive(source: Source) -> bool:
    """Tell whether this is a docker-archive; raises ImageError for one of before 2016."""
    if source.has(MANIFEST_FILE):
        return True
    if source.has(OLD_FILE):
        raise ImageError(
            "the archive is of a Docker older than 1.10: it has no manifest.json",
            hint="load it into a current Docker and save it again",
        )
    return False


def image_ids(source: Source) -> frozenset[str]:
    """Give the IDs of all images of the archive; raises ImageError."""
    entries = _entries(source)
    return frozenset(digest_of(_config(source, entry)) for entry in entries)


def take_docker_archive(store: Store, source: Source, options: ImportOptions) -> tuple[Found, ...]:
    """Copy config and layers of all images into the store; raises ImageError."""
    return tuple(_take_image(store, source, entry, options) for entry in _entries(source))


def _entries(source: Source) -> tuple[Fields, ...]:
    raw = read_document(source, MANIFEST_FILE)
    entries = parse_objects(raw, "the archive's manifest.json")
    if not entries:
        raise ImageError("the archive's manifest.json names no image")
    check_count("images", len(entries), MAX_IMAGES)
    return entries


def _config(source: Source, entry: Fields) -> bytes:
    name = entry.text("Config")
    raw = read_document(source, name)
    match = _HEX_NAME.fullmatch(name)
    if match is not None and digest_of(raw) != f"sha256:{match[1]}":
        raise ImageError(f"the digest of the config {name} does not match its bytes")
    return raw


def _take_image(store: Store, source: Source, entry: Fields, options: ImportOptions) -> Found:
    raw = _config(source, entry)
    config = ImageConfig.parse(raw)
    files = entry.texts("Layers")
    check_count("layers", len(files), MAX_LAYERS)
    if len(files) != len(config.diff_ids):
        raise ImageError(
            f"the archive's manifest.json names {len(files)} layers, "
            f"the image's config {len(config.diff_ids)} DiffIDs"
        )
    # Parsed first: a name that nobody can have is told before anything is copied.
    names = tuple(Reference.parse(tag) for tag in entry.texts("RepoTags"))
    layers = [
        _take_layer(store, source, file, diff_id, options)
        for file, diff_id in zip(files, config.diff_ids, strict=True)
    ]
    config_blob = Descriptor(OCI_CONFIG, store.put_blob(raw), len(raw))
    return Found(Manifest.build(config_blob, layers), names)


def _take_layer(
    store: Store, source: Source, name: str, diff_id: str, options: ImportOptions
) -> Descriptor:
    """Copy a layer as it is, compressed or not."""
    size_bytes = source.size_bytes(name)
    with source.open(name) as file:
        compression = compression_of(file.read(6))
    if compression not in _TYPES:
        raise ImageError(f"the layer {name} is compressed by {compression}, which no image is")
    with source.open(name) as file:
        if not compression:
            # The bytes are those of the DiffID: what is there already need not be read.
            blob = Descriptor(OCI_LAYER, diff_id, size_bytes)
            try:
                take_blob(store, blob, file, options.progress)
            except ImageError as error:
                raise ImageError(f"the layer {name}: {error.message}", hint=error.hint) from None
            return blob
        counted = Counted(file, Descriptor("", diff_id, size_bytes), options.progress)
        with store.write_blob(None, size_bytes) as writer:
            while data := counted.read(CHUNK_BYTES):
                writer.write(data)
            digest = writer.commit()
        counted.finished("imported")
    return Descriptor(_TYPES[compression], digest, size_bytes)
