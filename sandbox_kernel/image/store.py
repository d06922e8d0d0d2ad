"""The store of images: an OCI layout on disk, with its layers unpacked once for all sessions.

    oci-layout, index.json     names of images            store_refs
    blobs/sha256/              as they were transferred   store_blobs
    layers/sha256/             unpacked, by DiffID        store_layers
    diff-ids/                  the DiffID of a blob
    cache/                     of builds                  cache_records
    leases/, locks/, staging/  of living processes        leases, store_locks, store_files

All is written to staging, flushed and renamed, the name of an image last: a crash at any moment
leaves a whole store, and the next who opens it sweeps what was not finished.

What a Store object has written or looked at is leased until it is closed, so that no prune of
another process takes it in between. Blobs are verified when they are written.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import platformdirs

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import disk_usage, prune, resolve, stored_image
from sandbox_kernel.image.cache_mounts import CacheMounts
from sandbox_kernel.image.cache_records import CacheRecords
from sandbox_kernel.image.documents import Descriptor, ImageConfig, Manifest
from sandbox_kernel.image.layer_reader import LayerProgress
from sandbox_kernel.image.leases import Lease
from sandbox_kernel.image.media import check_digest, hex_of
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store_blobs import Blobs, BlobWriter
from sandbox_kernel.image.store_files import FOLDER_MODE, Staging, remove, sweep, write_whole
from sandbox_kernel.image.store_layers import TREE, LayerFolders, UnpackedLayer
from sandbox_kernel.image.store_locks import Locks
from sandbox_kernel.image.store_refs import Refs
from sandbox_kernel.image.stored_image import HistoryRow, StoredImage
from sandbox_kernel.image.view import showing
from sandbox_kernel.model import Layers

VARIABLE = "SANDBOX_KERNEL_STORE"
SYSTEM_FOLDER = Path("/var/lib/sandbox-kernel/images")
_FOLDERS = ("blobs/sha256", "layers/sha256", "diff-ids", "cache", "leases", "locks", "staging")


def default_folder() -> Path:
    """Give the folder of this user's store; the environment may name another."""
    named = os.environ.get(VARIABLE, "")
    if named:
        return Path(named).absolute()
    if os.geteuid() == 0:
        return SYSTEM_FOLDER
    return platformdirs.user_data_path("sandbox-kernel") / "images"


class Store:
    """One store; open it by `Store.open`. May be used by several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lease: Lease | None = None
        self._mutex = threading.Lock()
        staging = Staging(folder / "staging")
        locks = Locks(folder / "locks")
        blobs = Blobs(folder / "blobs/sha256", staging, self._claim)
        self.cache_mounts = CacheMounts(folder / "cache-mounts", staging)
        self._parts = prune.Parts(
            locks=locks,
            staging=staging,
            blobs=blobs,
            layers=LayerFolders(folder / "layers/sha256", blobs, locks, staging),
            refs=Refs(folder, locks, staging),
            records=CacheRecords(folder / "cache", staging),
            mounts=self.cache_mounts,
            leases=folder / "leases",
            diff_ids=folder / "diff-ids",
        )

    @classmethod
    def open(cls, path: Path | str | None = None) -> Store:
        """Open a store, make it where there is none, and sweep what dead processes left.

        Raises ImageError if the folder is another user's, or others may enter it.
        """
        folder = Path(path).absolute() if path is not None else default_folder()
        try:
            for name in ("", *_FOLDERS):
                _make_folder(folder / name, FOLDER_MODE)
        except OSError as error:
            raise ImageError(
                f"the store {folder} cannot be made: {error.strerror}",
                hint=f"let {VARIABLE} name a folder of yours",
            ) from error
        _check_private(folder)
        sweep(folder / "staging")
        store = cls(folder)
        store._parts.refs.create()
        return store

    def close(self) -> None:
        """Give back what this object has leased and staged."""
        with self._mutex:
            lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()
        self._parts.staging.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Blobs

    def write_blob(
        self, digest: str | None = None, size_bytes: int | None = None
    ) -> AbstractContextManager[BlobWriter]:
        """Write a blob: `write` bytes, then `commit`; without that nothing is kept.

        `commit` gives the digest. Raises ImageError if the bytes are not those that were named.
        """
        return self._parts.blobs.write(digest, size_bytes)

    def put_blob(self, data: bytes) -> str:
        """Keep a small blob; give its digest."""
        with self.write_blob(None, len(data)) as writer:
            writer.write(data)
            return writer.commit()

    def has_blob(self, digest: str) -> bool:
        """Tell whether a blob is there; it stays while this object is open."""
        self._claim(digest)
        return self._parts.blobs.size(digest) is not None

    def open_blob(self, digest: str) -> BinaryIO:
        """Open a blob for reading; raises ImageError if it is missing."""
        self._claim(digest)
        return self._parts.blobs.open(digest)

    def read_blob(self, digest: str, limit_bytes: int = 4 << 20) -> bytes:
        """Give a small blob, verified; raises ImageError if it is missing, larger or damaged."""
        self._claim(digest)
        return self._parts.blobs.read(digest, limit_bytes)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give a path on the store's file system; what is there in the end is removed."""
        path = self._parts.staging.path()
        try:
            yield path
        finally:
            remove(path)

    # Locks and leases

    def locked(
        self, name: str, on_wait: Callable[[], None] | None = None
    ) -> AbstractContextManager[None]:
        """Hold the lock of a blob, by digest, or of something else; waits for it.

        Look again for what you are about to make: who held it before may have made it.
        """
        return self._parts.locks.held(name, on_wait=on_wait)

    def lease(self, digests: Iterable[str]) -> Lease:
        """Claim these, and all that they lead to, until the lease is closed.

        Name the manifest of an image to keep its layers.
        """
        lease = Lease(self._parts.leases, self._parts.locks)
        lease.add(*digests)
        return lease

    def _claim(self, *digests: str) -> None:
        with self._mutex:
            if self._lease is None:
                self._lease = Lease(self._parts.leases, self._parts.locks)
            lease = self._lease
        lease.add(*digests)

    # Images

    def put_image(
        self, reference: Reference | str | None, manifest: bytes, media_type: str = ""
    ) -> StoredImage:
        """Keep an image whose config and layers are in the store already, and name it.

        Raises ImageError if a blob is missing, or the documents do not fit each other.
        """
        image = self.check_image(reference, manifest, media_type)
        self.put_blob(manifest)
        kind = image.manifest.media_type
        entry = Descriptor(kind, image.digest, len(manifest), image.config.platform)
        self._parts.refs.put(image.reference.full if image.reference else "", entry)
        return image

    def check_image(
        self, reference: Reference | str | None, manifest: bytes, media_type: str = ""
    ) -> StoredImage:
        """Give the image that `put_image` would keep, after the same checks."""
        if isinstance(reference, str):
            reference = Reference.parse(reference)
        found = Manifest.parse(manifest, media_type)
        for one in (found.config, *found.layers):
            self._check_there(one)
        config = ImageConfig.parse(self.read_blob(found.config.digest))
        if len(config.diff_ids) != len(found.layers):
            raise ImageError(
                f"the manifest has {len(found.layers)} layers, "
                f"the image's config {len(config.diff_ids)} DiffIDs"
            )
        return StoredImage(reference, found.digest, found, config, found.size_bytes, config.created)

    def _check_there(self, one: Descriptor) -> None:
        self._claim(one.digest)
        size_bytes = self._parts.blobs.size(one.digest)
        if size_bytes is None:
            raise ImageError(f"the image is not whole: the blob {one.digest} is missing")
        if size_bytes != one.size_bytes:
            raise ImageError(
                f"the blob {one.digest} has {size_bytes} bytes, the manifest says {one.size_bytes}"
            )

    def images(self) -> tuple[StoredImage, ...]:
        """Give all images, once for each name; those whose documents are lost are left out."""
        return resolve.all_images(self._parts)

    def resolve(self, text: str) -> StoredImage:
        """Find an image by name, digest, or the beginning of a digest or an image ID.

        It stays while this object is open. Raises ImageError.
        """
        found = resolve.find(self._parts, text)
        # Leased first and looked up again, or a prune may take it in between.
        self._claim(found.digest)
        return resolve.find(self._parts, text)

    def tag(self, text: str, reference: Reference | str) -> StoredImage:
        """Give an image one more name; who had that name loses it. Raises ImageError."""
        if isinstance(reference, str):
            reference = Reference.parse(reference)
        if reference.digest:
            raise ImageError(f"{str(reference)!r} has a digest", hint="name a tag only")
        image = self.resolve(text)
        return self.put_image(reference, image.manifest.raw, image.manifest.media_type)

    def untag(self, text: str, *, force: bool = False) -> tuple[str, ...]:
        """Take a name away, or all names of the image of which a digest is given.

        Gives the names. An image without names is gone; its blobs go with the next prune.
        Raises ImageError if a digest has several names, unless `force`.
        """
        return resolve.untag(self._parts, text, force=force)

    def history(self, image: StoredImage) -> tuple[HistoryRow, ...]:
        """Give the chain of an image, the last step first."""
        return stored_image.history(image)

    # Layers

    def ensure_layer(
        self,
        blob: Descriptor,
        diff_id: str,
        progress: LayerProgress | None = None,
        lowers: Sequence[Path] = (),
    ) -> Path:
        """Give the folder with the files of a layer, and unpack it if it is not there.

        `lowers` are the folders of the layers below, the lowest first. Raises ImageError.
        """
        return self._tree(
            self._ensure(blob, diff_id, [self._layer(one) for one in lowers], progress)
        )

    def ensure_layers(
        self, image: StoredImage, progress: LayerProgress | None = None
    ) -> tuple[Path, ...]:
        """Give the folders of all layers of an image, the lowest first. Raises ImageError."""
        self._claim(image.digest)
        found: list[UnpackedLayer] = []
        for blob, diff_id in zip(image.manifest.layers, image.config.diff_ids, strict=True):
            found.append(self._ensure(blob, diff_id, found, progress))
        return tuple(self._tree(layer) for layer in found)

    def session_layers(self, image: StoredImage, progress: LayerProgress | None = None) -> Layers:
        """Give the layers of an image as a session takes them. Raises ImageError."""
        trees = map(Path, showing(self.ensure_layers(image, progress)))
        names = tuple(f"{tree.parent.name}/{TREE}" for tree in trees)
        return Layers(str(self._parts.layers.folder), names)

    def diff_id(self, blob_digest: str) -> str | None:
        """Give the DiffID of a layer's blob, if one was ever verified."""
        self._claim(blob_digest)
        try:
            return check_digest((self._parts.diff_ids / hex_of(blob_digest)).read_text("ascii"))
        except (FileNotFoundError, ImageError):
            return None

    def note_diff_id(self, blob_digest: str, diff_id: str) -> None:
        """Note the DiffID of a blob that was hashed both ways while it was written."""
        path = self._parts.diff_ids / hex_of(blob_digest)
        # Not durable: an empty one counts as missing.
        data = check_digest(diff_id).encode()
        write_whole(path, data, self._parts.staging, durable=False)

    def settle(self) -> None:
        """Flush unpacked layers to the disk; without it they last until the machine goes down."""
        self._parts.layers.settle()

    def _ensure(
        self,
        blob: Descriptor,
        diff_id: str,
        lowers: Sequence[UnpackedLayer],
        progress: LayerProgress | None,
    ) -> UnpackedLayer:
        self._claim(blob.digest)
        layer = self._parts.layers.ensure(blob, check_digest(diff_id), lowers, progress)
        if self.diff_id(blob.digest) is None and layer.blob == blob.digest:
            self.note_diff_id(blob.digest, diff_id)
        return layer

    def _tree(self, layer: UnpackedLayer) -> Path:
        return self._parts.layers.tree(layer.layer_id)

    def _layer(self, tree: Path) -> UnpackedLayer:
        layer = self._parts.layers.get(f"sha256:{tree.parent.name}")
        if layer is None:
            raise ImageError(f"{tree} is not a layer of the store {self.folder}")
        return layer

    # The build cache, prune, disk usage

    @property
    def records(self) -> CacheRecords:
        """The records of the build cache."""
        return self._parts.records

    def prune(self, options: prune.PruneOptions | None = None) -> prune.Pruned:
        """Remove what nobody uses; what this object has looked at counts as unused.

        Waits for nobody: what others pull, build or run is leased.
        """
        with self._mutex:
            lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()
        return prune.prune(self._parts, options or prune.PruneOptions())

    def disk_usage(self) -> disk_usage.DiskUsage:
        """Count what the store holds."""
        return disk_usage.disk_usage(self._parts)


def _make_folder(path: Path, mode: int) -> None:
    # Folders above the store are made as the user's umask wants them.
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode)
    except FileExistsError:
        if not path.is_dir():
            raise


def _check_private(folder: Path) -> None:
    info = folder.stat()
    if info.st_uid != os.geteuid():
        raise ImageError(
            f"the store {folder} belongs to user {info.st_uid}",
            hint=f"let {VARIABLE} name a folder of yours",
        )
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise ImageError(
            f"others may enter the store {folder}, and run setuid programs of images",
            hint=f"chmod 700 {folder}",
        )
