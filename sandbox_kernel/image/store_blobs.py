"""Blobs of the store: files named by the digest of what is in them, verified when written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.fields import MAX_DOCUMENT_BYTES
from sandbox_kernel.image.media import check_digest, digest_of, hex_of
from sandbox_kernel.image.store_files import FILE_MODE, Staging, sync_folder


class BlobWriter:
    """A blob that is being written; it is in the store after `commit` and not before."""

    def __init__(self, file: BinaryIO, digest: str | None, size_bytes: int | None) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._digest = digest
        self._limit_bytes = size_bytes
        self.size_bytes = 0
        self.committed = ""

    def write(self, data: bytes) -> None:
        """Append bytes; raises ImageError as soon as they are more than were told."""
        self.size_bytes += len(data)
        if self._limit_bytes is not None and self.size_bytes > self._limit_bytes:
            raise ImageError(
                f"{self._digest or 'the blob'} is longer than the {self._limit_bytes} bytes it "
                "should have"
            )
        self._hash.update(data)
        self._file.write(data)

    def commit(self) -> str:
        """Verify size and digest and make the bytes durable; give the digest.

        Raises ImageError for a mismatch.
        """
        found = "sha256:" + self._hash.hexdigest()
        if self._limit_bytes is not None and self.size_bytes != self._limit_bytes:
            raise ImageError(
                f"{self._digest or 'the blob'} has {self.size_bytes} bytes and should have "
                f"{self._limit_bytes}",
                hint="it was cut off",
            )
        if self._digest is not None and found != self._digest:
            raise ImageError(
                f"the digest does not match: the bytes have {found}, asked for was {self._digest}"
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        self.committed = found
        return found


class Blobs:
    """The blobs below one folder; `claim` protects digests from a prune, see `leases`."""

    def __init__(self, folder: Path, staging: Staging, claim: Callable[..., None]) -> None:
        self._folder = folder
        self._staging = staging
        self.claim = claim

    def path(self, digest: str) -> Path:
        """Give where a blob lies, whether it is there or not."""
        return self._folder / hex_of(digest)

    def size(self, digest: str) -> int | None:
        """Give the size of a blob in bytes, None if it is missing."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    @contextmanager
    def write(self, digest: str | None, size_bytes: int | None) -> Iterator[BlobWriter]:
        """Write a blob; without `commit` nothing is kept. Raises ImageError."""
        if digest is not None:
            check_digest(digest)
        draft = self._staging.path()
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        try:
            with open(fd, "wb") as file:
                writer = BlobWriter(file, digest, size_bytes)
                yield writer
            if writer.committed:
                self.claim(writer.committed)
                os.replace(draft, self.path(writer.committed))
                sync_folder(self._folder)
        finally:
            draft.unlink(missing_ok=True)

    def open(self, digest: str) -> BinaryIO:
        """Open a blob for reading; raises ImageError if it is missing."""
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise ImageError(
                f"the blob {digest} is not in the store", hint="pull or import the image again"
            ) from None

    def read(self, digest: str, limit_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
        """Give the bytes of a small blob, verified; raises ImageError."""
        with self.open(digest) as file:
            data = file.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise ImageError(f"the blob {digest} has more than {limit_bytes} bytes")
        if digest_of(data) != digest:
            raise ImageError(
                f"the blob {digest} of the store is damaged", hint="pull or import the image again"
            )
        return data

    def all(self) -> tuple[str, ...]:
        """Give the digests of all blobs."""
        return tuple(f"sha256:{name}" for name in sorted(os.listdir(self._folder)))
