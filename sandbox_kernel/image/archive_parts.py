"""What all kinds of archives have in common: options, blobs that are taken in, names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import Descriptor, Manifest, Platform
from sandbox_kernel.image.layer_reader import CHUNK_BYTES, Counted, LayerProgress
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage

MAX_LAYERS = 1000
MAX_IMAGES = 1000


@dataclass(frozen=True)
class ImportOptions:
    """How an archive is taken in.

    `name` is for the one image that it holds, in place of the name that stands there; a root
    file system needs one. `platform` chooses from an index, and is that of a root file system.
    """

    name: Reference | None = None
    platform: Platform | None = None
    progress: LayerProgress | None = None


@dataclass(frozen=True)
class Found:
    """An image whose blobs are in the store, before it has its names there."""

    manifest: Manifest
    names: tuple[Reference, ...]


def take_blob(
    store: Store, blob: Descriptor, file: BinaryIO, progress: LayerProgress | None
) -> None:
    """Copy a blob into the store unless it is there; raises ImageError if it is another one."""
    with store.locked(blob.digest):
        if store.has_blob(blob.digest):
            if progress is not None:
                progress.finished(blob.digest, "exists")
            return
        counted = Counted(file, blob, progress)
        with store.write_blob(blob.digest, blob.size_bytes) as writer:
            while data := counted.read(CHUNK_BYTES):
                writer.write(data)
            writer.commit()
        counted.finished("imported")


def keep(store: Store, found: Found, options: ImportOptions) -> tuple[StoredImage, ...]:
    """Give an image its names, or let it be without one."""
    raw, kind = found.manifest.raw, found.manifest.media_type
    names: tuple[Reference | None, ...] = found.names
    if options.name is not None:
        names = (options.name,)
    return tuple(store.put_image(name, raw, kind) for name in names or (None,))


def parse_name(text: str) -> Reference | None:
    """Read a name that an archive gives; None if it is none that a store can have."""
    if not text:
        return None
    try:
        return Reference.parse(text)
    except ImageError:
        return None


def check_count(what: str, count: int, most: int) -> None:
    """Refuse an archive with too many of something."""
    if count > most:
        raise ImageError(f"the archive has {count} {what}", hint=f"at most {most}")
