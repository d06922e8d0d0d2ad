"""Pull and push: an image between a store and a registry, several blobs at once.

What is there already is not moved. A blob is locked by its digest while it comes, so two pullers
wait for one. A store leases what it is asked for, which keeps a prune away from it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import (
    MAX_DOCUMENT_BYTES,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    parse_document,
)
from sandbox_kernel.image.parallel import each
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.registry import Registry, RegistryOptions
from sandbox_kernel.image.stored_image import StoredImage

MAX_LAYERS = 1000
MAX_INDEXES = 3
"""How deep an index may lie in others."""


class Progress(Protocol):
    """Who is told how far a transfer is; called from several threads at once."""

    def started(self, digest: str, total_bytes: int) -> None:
        """Take note of a blob that is looked at now."""

    def advanced(self, digest: str, count_bytes: int) -> None:
        """Take note of so many bytes more."""

    def finished(self, digest: str, note: str) -> None:
        """Take note of the end of a blob: `exists`, `pulled`, `pushed` or `mounted`."""


class BlobWriter(Protocol):
    """A blob of a store that is being written."""

    def write(self, data: bytes) -> object:
        """Append bytes."""

    def commit(self) -> str:
        """Verify size and digest, and keep the blob."""


class BlobStore(Protocol):
    """What a transfer needs of a store."""

    def has_blob(self, digest: str) -> bool:
        """Tell whether a blob is there."""

    def open_blob(self, digest: str) -> BinaryIO:
        """Open a blob for reading."""

    def read_blob(self, digest: str, limit_bytes: int = ...) -> bytes:
        """Give the bytes of a small blob, verified."""

    def write_blob(
        self, digest: str | None, size_bytes: int | None
    ) -> AbstractContextManager[BlobWriter]:
        """Write a blob, which is there once it was committed."""

    def locked(self, name: str) -> AbstractContextManager[object]:
        """Hold the lock of a blob."""

    def put_image(
        self, reference: Reference | None, manifest: bytes, media_type: str
    ) -> StoredImage:
        """Give an image, whose blobs are there, its name."""

    def resolve(self, text: str) -> StoredImage:
        """Find an image; raises ImageError."""


def pull(
    reference: Reference,
    store: BlobStore,
    progress: Progress,
    options: RegistryOptions | None = None,
) -> StoredImage:
    """Bring an image into the store under its reference; raises ImageError.

    A reference with a digest, of which everything is there, needs no network.
    """
    with contextlib.ExitStack() as stack:
        return _Pull(reference, store, progress, options or RegistryOptions(), stack).run()


def push(
    reference: Reference,
    image: StoredImage,
    store: BlobStore,
    progress: Progress,
    options: RegistryOptions | None = None,
) -> str:
    """Send an image to a registry under a reference; give its digest there. Raises ImageError.

    Its documents and layers are sent as they are, so the digest is the one that it has here.
    """
    options = options or RegistryOptions()
    manifest = image.manifest
    if reference.digest and reference.digest != manifest.digest:
        raise ImageError(
            f"{reference} cannot be pushed: the image has the digest {manifest.digest}",
            hint="name a tag instead of a digest",
        )
    blobs = _distinct((*manifest.layers, manifest.config))
    stop = threading.Event()
    registry = Registry(
        reference, options, stop, push=True, mount_from=_neighbour(reference, image.reference)
    )

    def send(blob: Descriptor) -> None:
        progress.started(blob.digest, blob.size_bytes)
        note = registry.upload(
            blob,
            lambda: store.open_blob(blob.digest),
            lambda count: progress.advanced(blob.digest, count),
        )
        progress.finished(blob.digest, note)

    with contextlib.closing(registry):
        each(blobs, send, options.parallel, stop, registry.abort)
        version = reference.tag or manifest.digest
        return registry.put_manifest(version, manifest.raw, manifest.media_type)


def _neighbour(reference: Reference, origin: Reference | None) -> str:
    """Give the repository of the same registry from which the blobs may be mounted."""
    if origin is None or origin.registry != reference.registry:
        return ""
    return origin.repository if origin.repository != reference.repository else ""


class _Pull:
    """One pull."""

    def __init__(
        self,
        reference: Reference,
        store: BlobStore,
        progress: Progress,
        options: RegistryOptions,
        stack: contextlib.ExitStack,
    ) -> None:
        self._reference = reference
        self._store = store
        self._progress = progress
        self._options = options
        self._stack = stack
        self._stop = threading.Event()
        self._opened: Registry | None = None

    def run(self) -> StoredImage:
        """Fetch what is missing, and name the image."""
        manifest = self._find_manifest()
        if len(manifest.layers) > MAX_LAYERS:
            raise ImageError(
                f"{self._reference} has {len(manifest.layers)} layers",
                hint=f"at most {MAX_LAYERS} are taken",
            )
        if manifest.config.size_bytes > MAX_DOCUMENT_BYTES:
            raise ImageError(f"the config of {self._reference} is too large")
        layers = _distinct((*manifest.layers, manifest.config))[:-1]
        self._fetch(manifest.config)
        self._check_config(manifest)
        if not all(self._store.has_blob(layer.digest) for layer in layers):
            # Made here, before threads could make two.
            self._registry()
        each(layers, self._fetch, self._options.parallel, self._stop, self._abort)
        return self._store.put_image(self._reference, manifest.raw, manifest.media_type)

    def _find_manifest(self) -> Manifest:
        """Give the image's manifest, through indexes, each step verified by its digest."""
        raw, media_type = self._document(self._reference.digest or self._known_digest())
        for _ in range(MAX_INDEXES + 1):
            found = parse_document(raw, media_type)
            if isinstance(found, Manifest):
                return found
            self._keep(found)
            try:
                entry = found.choose(self._options.platform)
            except ImageError as error:
                raise ImageError(f"{self._reference}: {error.message}", hint=error.hint) from None
            raw, _ = self._document(entry.digest)
            if len(raw) != entry.size_bytes:
                raise ImageError(
                    f"{entry.digest} of {self._reference} has {len(raw)} bytes, the index says "
                    f"{entry.size_bytes}"
                )
            media_type = entry.media_type
        raise ImageError(f"{self._reference}: more than {MAX_INDEXES} indexes lie in each other")

    def _known_digest(self) -> str:
        """Give the digest that the tag has now if the store knows the image, else nothing.

        Registries count a HEAD less than the manifest itself.
        """
        try:
            self._store.resolve(self._reference.full)
        except ImageError:
            return ""
        return self._registry().manifest_digest(self._reference.tag)

    def _document(self, digest: str) -> tuple[bytes, str]:
        if digest and self._store.has_blob(digest):
            # What a disk has damaged is fetched again.
            with contextlib.suppress(ImageError):
                return self._store.read_blob(digest, MAX_DOCUMENT_BYTES), ""
        return self._registry().manifest(digest or self._reference.tag)

    def _keep(self, index: Index) -> None:
        """Keep an index, which names what a tag is, for the next pull."""
        if not self._store.has_blob(index.digest):
            with self._store.write_blob(index.digest, len(index.raw)) as writer:
                writer.write(index.raw)
                writer.commit()

    def _fetch(self, blob: Descriptor) -> None:
        self._progress.started(blob.digest, blob.size_bytes)
        note = "exists"
        if not self._store.has_blob(blob.digest):
            with self._store.locked(blob.digest):
                # Whoever had the lock may have brought it.
                if not self._store.has_blob(blob.digest):
                    self._download(blob)
                    note = "pulled"
        self._progress.finished(blob.digest, note)

    def _download(self, blob: Descriptor) -> None:
        with self._store.write_blob(blob.digest, blob.size_bytes) as writer:

            def write(data: bytes) -> None:
                writer.write(data)
                self._progress.advanced(blob.digest, len(data))

            self._registry().download(blob, write)
            writer.commit()

    def _check_config(self, manifest: Manifest) -> None:
        try:
            raw = self._store.read_blob(manifest.config.digest, MAX_DOCUMENT_BYTES)
        except ImageError:
            self._download(manifest.config)
            raw = self._store.read_blob(manifest.config.digest, MAX_DOCUMENT_BYTES)
        config = ImageConfig.parse(raw)
        if len(config.diff_ids) != len(manifest.layers):
            raise ImageError(
                f"{self._reference} has {len(manifest.layers)} layers, its config names "
                f"{len(config.diff_ids)}"
            )
        wanted, made = self._options.platform or Platform.host(), config.platform
        # Variants are often left out of a config; the index has them.
        if made.architecture and (made.os, made.architecture) != (wanted.os, wanted.architecture):
            raise ImageError(
                f"{self._reference} was made for {made}, not for {wanted}",
                hint="name the platform, if that is what you want",
            )

    def _registry(self) -> Registry:
        if self._opened is None:
            self._opened = Registry(self._reference, self._options, self._stop)
            self._stack.callback(self._opened.close)
        return self._opened

    def _abort(self) -> None:
        if self._opened is not None:
            self._opened.abort()


def _distinct(blobs: Sequence[Descriptor]) -> list[Descriptor]:
    """Give each blob once; raises ImageError if one has two sizes."""
    found: dict[str, Descriptor] = {}
    for blob in blobs:
        if found.setdefault(blob.digest, blob).size_bytes != blob.size_bytes:
            raise ImageError(f"the manifest is ambiguous: {blob.digest} has two sizes")
    return list(found.values())
