"""Write images out: as OCI layout, a folder or a tar, or as docker-archive.

The same images give the same bytes on every day. A file or folder is written beside its place
and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Protocol

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.archive_docker import MANIFEST_FILE
from sandbox_kernel.image.archive_oci import FULL_NAME, blob_name
from sandbox_kernel.image.compression import Hashed, open_decompressed
from sandbox_kernel.image.documents import (
    LAYERS,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    REFERENCE_NAME,
    Descriptor,
    Manifest,
    hex_of,
    render_json,
)
from sandbox_kernel.image.layer_reader import CHUNK_BYTES
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.store_files import remove
from sandbox_kernel.image.store_refs import INDEX_FILE, LAYOUT, LAYOUT_FILE, render_index
from sandbox_kernel.image.stored_image import StoredImage

OCI_FOLDER = "oci"
OCI_ARCHIVE = "oci-archive"
DOCKER_ARCHIVE = "docker-archive"
FORMATS = (OCI_FOLDER, OCI_ARCHIVE, DOCKER_ARCHIVE)
"""The names of the formats, as skopeo and podman have them."""
_OCI_LAYERS = {"": OCI_LAYER, "gzip": OCI_LAYER_GZIP, "zstd": OCI_LAYER_ZSTD}


class _Sink(Protocol):
    """Where the parts of an archive go, each name once."""

    def add(self, name: str, file: BinaryIO, size_bytes: int) -> None:
        """Write one part."""


def export_images(
    store: Store, images: Sequence[StoredImage], kind: str, target: Path | BinaryIO
) -> None:
    """Write images in one of the FORMATS to a file, folder or stream; raises ImageError.

    A file is replaced; a folder must be empty or missing.
    """
    if kind not in FORMATS:
        raise ImageError(f"{kind!r} is no format of archives", hint=f"it is {', '.join(FORMATS)}")
    if not images:
        raise ImageError("there is no image to export", hint="name one")
    write = _write_docker if kind == DOCKER_ARCHIVE else _write_layout
    if kind == OCI_FOLDER:
        if not isinstance(target, Path):
            raise ImageError("a folder cannot be written to a stream", hint=f"use {OCI_ARCHIVE}")
        with _folder_beside(target) as folder:
            write(store, images, _Folder(folder))
        return
    with (
        _file_beside(target) if isinstance(target, Path) else nullcontext(target) as file,
        tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        write(store, images, _Tar(tar))


def _write_layout(store: Store, images: Sequence[StoredImage], sink: _Sink) -> None:
    _add(sink, LAYOUT_FILE, LAYOUT)
    images = [_as_oci(image) for image in images]
    blobs: dict[str, Descriptor] = {}
    manifests = {image.manifest.digest: image.manifest.raw for image in images}
    for image in images:
        own = Descriptor(image.manifest.media_type, image.manifest.digest, len(image.manifest.raw))
        for blob in (own, image.manifest.config, *image.manifest.layers):
            blobs[blob.digest] = blob
    for digest in sorted(blobs):
        if digest in manifests:
            _add(sink, blob_name(digest), manifests[digest])
            continue
        with store.open_blob(digest) as file:
            sink.add(blob_name(digest), file, os.fstat(file.fileno()).st_size)
    _add(sink, INDEX_FILE, render_index(_entries(images)))


def _as_oci(image: StoredImage) -> StoredImage:
    """Give the image with OCI's media types: a layout has no other, as umoci reads it.

    One with Docker's types gets another digest so; its ID stays.
    """
    if image.manifest.media_type == OCI_MANIFEST:
        return image
    config = replace(image.manifest.config, media_type=OCI_CONFIG)
    layers = [
        replace(layer, media_type=_OCI_LAYERS[LAYERS[layer.media_type]])
        for layer in image.manifest.layers
    ]
    manifest = Manifest.build(config, layers, dict(image.manifest.annotations))
    return replace(image, manifest=manifest, digest=manifest.digest)


def _entries(images: Sequence[StoredImage]) -> list[Descriptor]:
    """Give the entries of index.json, named as Docker names them.

    OCI's name is the tag alone, which readers take behind the path of the layout; where two
    images have the same tag, it is the whole reference.
    """
    tags = Counter(image.reference.tag for image in images if image.reference is not None)
    entries = []
    for image in images:
        names: tuple[tuple[str, str], ...] = ()
        if image.reference is not None:
            full, tag = image.reference.full, image.reference.tag
            short = tag if tag and tags[tag] == 1 else full
            names = ((FULL_NAME, full), (REFERENCE_NAME, short))
        manifest = image.manifest
        entries.append(
            Descriptor(
                manifest.media_type,
                manifest.digest,
                len(manifest.raw),
                image.config.platform,
                names,
            )
        )
    return entries


def _write_docker(store: Store, images: Sequence[StoredImage], sink: _Sink) -> None:
    names: dict[str, list[str]] = {}
    for image in images:
        tags = names.setdefault(image.image_id, [])
        if image.reference is not None and image.reference.tag:
            # Docker takes no digest here.
            tags.append(str(replace(image.reference, digest="")))
    written: set[str] = set()
    entries = []
    by_id = {image.image_id: image for image in images}
    for image_id, image in by_id.items():
        config = f"{hex_of(image_id)}.json"
        _add(sink, config, image.config.raw)
        for blob, diff_id in zip(image.manifest.layers, image.config.diff_ids, strict=True):
            if diff_id not in written:
                _add_layer(store, blob, diff_id, sink)
                written.add(diff_id)
        layers = [_layer_name(diff_id) for diff_id in image.config.diff_ids]
        entries.append(
            {"Config": config, "RepoTags": sorted(set(names[image_id])), "Layers": layers}
        )
    _add(sink, MANIFEST_FILE, render_json(entries))


def _layer_name(diff_id: str) -> str:
    return f"{hex_of(diff_id)}.tar"


def _add_layer(store: Store, blob: Descriptor, diff_id: str, sink: _Sink) -> None:
    """Write a layer without compression: Docker takes it as it is, and its size comes first."""
    with store.scratch() as plain, store.open_blob(blob.digest) as file:
        if blob.digest == diff_id and blob.media_type == OCI_LAYER:
            sink.add(_layer_name(diff_id), file, blob.size_bytes)
            return
        hashed = Hashed(open_decompressed(file))
        with plain.open("xb") as out:
            while data := hashed.read(CHUNK_BYTES):
                out.write(data)
        if hashed.digest != diff_id:
            raise ImageError(
                f"the layer {blob.digest} has the DiffID {hashed.digest}, "
                f"its image's config says {diff_id}"
            )
        with plain.open("rb") as again:
            sink.add(_layer_name(diff_id), again, hashed.size_bytes)


def _add(sink: _Sink, name: str, data: bytes) -> None:
    sink.add(name, io.BytesIO(data), len(data))


class _Folder:
    """Parts as files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, name: str, file: BinaryIO, size_bytes: int) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as out:
            shutil.copyfileobj(file, out, CHUNK_BYTES)
            out.flush()
            os.fsync(out.fileno())


class _Tar:
    """Parts as entries, without anything of this machine or day in their headers."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._folders: set[str] = set()

    def add(self, name: str, file: BinaryIO, size_bytes: int) -> None:
        # Not left out: skopeo gives folders without an entry to root, which users cannot.
        for end, letter in enumerate(name):
            if letter == "/" and name[:end] not in self._folders:
                self._folders.add(name[:end])
                folder = tarfile.TarInfo(name[:end])
                folder.type = tarfile.DIRTYPE
                folder.mode = 0o755
                self._tar.addfile(folder)
        info = tarfile.TarInfo(name)
        info.size = size_bytes
        info.mode = 0o644
        self._tar.addfile(info, file)


@contextmanager
def _file_beside(target: Path) -> Iterator[BinaryIO]:
    if target.is_dir():
        raise ImageError(
            f"{target} is a folder", hint=f"name a file, or use the format {OCI_FOLDER}"
        )
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except OSError as error:
        raise ImageError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir()
        yield draft
        # Linux renames a folder over an empty one, and over no other.
        os.rename(draft, target)
    except FileExistsError:
        raise ImageError(f"{target} is there already", hint="name a new folder") from None
    except OSError as error:
        hint = "name a new folder" if target.exists() else ""
        raise ImageError(f"{target} cannot be written: {error.strerror}", hint=hint) from error
    finally:
        if draft.exists():
            remove(draft)
