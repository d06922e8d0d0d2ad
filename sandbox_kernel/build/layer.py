"""New layers: a tar, or a folder, becomes a blob of the store."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from sandbox_kernel.image.documents import OCI_LAYER_GZIP, Descriptor
from sandbox_kernel.image.gzip_writer import GzipWriter
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.store_blobs import BlobWriter
from sandbox_kernel.linux.tree_tar import Packing, pack
from sandbox_kernel.model import Json

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Layer:
    """One layer of an image that is built."""

    blob: Descriptor
    diff_id: str

    def as_json(self) -> Json:
        """Give an object for a record of the cache."""
        return {"blob": self.blob.as_json(), "diff_id": self.diff_id}


class LayerWriter:
    """Takes the bytes of a tar, a context manager; `layer` is there once it is left."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._opened = store.write_blob()
        self._hash = hashlib.sha256()
        self.layer: Layer | None = None

    def __enter__(self) -> LayerWriter:
        self._blob: BlobWriter = self._opened.__enter__()
        self._gzip = GzipWriter(self._blob)
        self._gzip.__enter__()
        return self

    def write(self, data: bytes, /) -> int:
        """Take some bytes."""
        self._hash.update(data)
        return self._gzip.write(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._gzip.__exit__(kind, error, trace)
            if kind is None:
                digest = self._blob.commit()
                blob = Descriptor(OCI_LAYER_GZIP, digest, self._blob.size_bytes)
                self.layer = Layer(blob, "sha256:" + self._hash.hexdigest())
        finally:
            self._opened.__exit__(kind, error, trace)
        if self.layer is not None:
            self._store.note_diff_id(self.layer.blob.digest, self.layer.diff_id)


def layer_of_tar(store: Store, tar: BinaryIO) -> Layer | None:
    """Read a tar to its end and keep it; None if it holds nothing. Raises ImageError."""
    first = tar.read(CHUNK_BYTES)
    if not first.strip(b"\0"):
        return None
    with LayerWriter(store) as writer:
        while first:
            writer.write(first)
            first = tar.read(CHUNK_BYTES)
    return writer.layer


def layer_of_folder(store: Store, folder: Path, packing: Packing) -> Layer | None:
    """Pack a folder and keep it; None if it is empty. Raises ImageError."""
    if not any(folder.iterdir()):
        return None
    with LayerWriter(store) as writer:
        pack(folder, writer, packing)
    return writer.layer
