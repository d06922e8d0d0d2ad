"""A plain tar of a root file system, as `docker import` takes it: an image of one layer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.archive_parts import Found, ImportOptions
from sandbox_kernel.image.compression import Hashed, open_decompressed
from sandbox_kernel.image.documents import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    Descriptor,
    History,
    ImageConfig,
    Manifest,
    Platform,
)
from sandbox_kernel.image.gzip_writer import GzipWriter
from sandbox_kernel.image.layer_reader import CHUNK_BYTES, Counted
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.tar_devices import Range, device_ranges, kept

_KEPT = {"gzip": OCI_LAYER_GZIP, "zstd": OCI_LAYER_ZSTD}
"""Compressions that layers have; what is compressed otherwise is kept without."""
EPOCH = "1970-01-01T00:00:00Z"


def take_rootfs(
    store: Store, path: Path, plain: Path, compression: str, options: ImportOptions
) -> Found:
    """Copy a root file system into the store; raises ImageError if no name is given.

    `plain` is the file without its compression, or the same if it has none.
    """
    if options.name is None:
        raise ImageError(
            "this is the tar of a root file system, which has no name",
            hint="give it one by --name",
        )
    kind = _KEPT.get(compression, OCI_LAYER)
    blob, diff_id = _blob_of(store, (path if compression in _KEPT else plain, plain), kind, options)
    store.note_diff_id(blob.digest, diff_id)
    # Not the date of today: the same file gives the same image on every day.
    config = ImageConfig(
        platform=options.platform or Platform.host(),
        diff_ids=(diff_id,),
        history=(History(created=EPOCH, created_by="import of a root file system"),),
        created=EPOCH,
    ).render()
    config_blob = Descriptor(OCI_CONFIG, store.put_blob(config), len(config))
    return Found(Manifest.build(config_blob, [blob]), (options.name,))


def _blob_of(
    store: Store, paths: tuple[Path, Path], kind: str, options: ImportOptions
) -> tuple[Descriptor, str]:
    """Keep the file, as it is or without device nodes; give the blob and its DiffID.

    `paths` are the file to keep, and the same without compression.
    """
    path, plain = paths
    with plain.open("rb") as file:
        devices = device_ranges(file)
        if devices:
            return _without(store, file, devices)
    blob = _copy(store, path, kind, options)
    return blob, blob.digest if kind == OCI_LAYER else _diff_id(plain)


def _without(store: Store, plain: BinaryIO, left_out: tuple[Range, ...]) -> tuple[Descriptor, str]:
    """Keep a root file system without some of its bytes; give the blob and its DiffID."""
    digest = hashlib.sha256()
    with store.write_blob() as writer:
        with GzipWriter(writer) as compressed:
            for data in kept(plain, left_out, CHUNK_BYTES):
                digest.update(data)
                compressed.write(data)
        blob = Descriptor(OCI_LAYER_GZIP, writer.commit(), writer.size_bytes)
    return blob, f"sha256:{digest.hexdigest()}"


def _copy(store: Store, path: Path, kind: str, options: ImportOptions) -> Descriptor:
    size_bytes = path.stat().st_size
    with path.open("rb") as file, store.write_blob(None, size_bytes) as writer:
        # Its digest is not known yet, so the progress goes by its name.
        counted = Counted(file, Descriptor(kind, path.name, size_bytes), options.progress)
        while data := counted.read(CHUNK_BYTES):
            writer.write(data)
        digest = writer.commit()
    counted.finished("imported")
    return Descriptor(kind, digest, size_bytes)


def _diff_id(plain: Path) -> str:
    with plain.open("rb") as file:
        hashed = Hashed(open_decompressed(file))
        while hashed.read(CHUNK_BYTES):
            pass
    return hashed.digest
