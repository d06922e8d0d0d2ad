"""Take archives of images in: docker-archive, OCI layout, or a plain root file system.

What it is is told by what is in it, whatever it is called and however it is compressed. Names,
sizes and digests are checked, and nothing is extracted but layers, by `unpack`.
"""

from __future__ import annotations

import stat
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.archive_docker import (
    image_ids,
    is_docker_archive,
    take_docker_archive,
)
from sandbox_kernel.image.archive_oci import is_layout, take_layout
from sandbox_kernel.image.archive_parts import Found, ImportOptions, keep
from sandbox_kernel.image.archive_rootfs import take_rootfs
from sandbox_kernel.image.archive_source import FolderSource, Source, TarSource
from sandbox_kernel.image.compression import compression_of, open_decompressed
from sandbox_kernel.image.layer_reader import CHUNK_BYTES
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage

__all__ = ["ImportOptions", "import_archive"]


def import_archive(
    store: Store, source: Path | BinaryIO, options: ImportOptions | None = None
) -> tuple[StoredImage, ...]:
    """Take all images of an archive into the store, and unpack their layers.

    The source is a folder, a file, or a stream such as standard input. Gives the images, once
    for each name. Raises ImageError; no image of the archive has a name then.
    """
    options = options or ImportOptions()
    with ExitStack() as stack:
        path = source if isinstance(source, Path) else _spool(store, source, stack)
        found = _take(store, path, options, stack)
    if options.name is not None and len(found) > 1:
        raise ImageError(f"the archive has {len(found)} images, and {options.name} is one name")
    for one in found:
        raw, kind = one.manifest.raw, one.manifest.media_type
        store.ensure_layers(store.check_image(None, raw, kind), options.progress)
    return tuple(image for one in found for image in keep(store, one, options))


def _take(store: Store, path: Path, options: ImportOptions, stack: ExitStack) -> tuple[Found, ...]:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        return _take_folder(store, path, options)
    if not stat.S_ISREG(mode):
        raise ImageError(f"{path} is neither a file nor a folder", hint="pipe it in, and name -")
    with path.open("rb") as file:
        compression = compression_of(file.read(6))
    plain = _decompress(store, path, stack) if compression else path
    source = TarSource.read(plain)
    found = _take_images(store, source, options) if source is not None else None
    return found or (take_rootfs(store, path, plain, compression, options),)


def _take_folder(store: Store, path: Path, options: ImportOptions) -> tuple[Found, ...]:
    found = _take_images(store, FolderSource(path), options)
    if found is None:
        raise ImageError(
            f"{path} is no OCI layout: it has no oci-layout and index.json",
            hint="a root file system comes as a tar, on standard input for example",
        )
    return found


def _take_images(store: Store, source: Source, options: ImportOptions) -> tuple[Found, ...] | None:
    """Take what the source holds; None if it is no archive of images."""
    layout, docker = is_layout(source), is_docker_archive(source)
    if not layout:
        return take_docker_archive(store, source, options) if docker else None
    found = take_layout(store, source, options)
    # Docker 25 and newer write both, of the same blobs.
    if docker and image_ids(source) != {one.manifest.config.digest for one in found}:
        raise ImageError("the archive is ambiguous: index.json and manifest.json name other images")
    return found


def _spool(store: Store, stream: BinaryIO, stack: ExitStack) -> Path:
    """Write a stream to a file: the names of an archive may stand at its end."""
    path = stack.enter_context(store.scratch())
    with path.open("xb") as file:
        while data := stream.read(CHUNK_BYTES):
            file.write(data)
    return path


def _decompress(store: Store, path: Path, stack: ExitStack) -> Path:
    plain = stack.enter_context(store.scratch())
    with path.open("rb") as file, plain.open("xb") as out:
        reader = open_decompressed(file)
        while data := reader.read(CHUNK_BYTES):
            out.write(data)
    return plain
