"""A layer's blob, read once: decompressed, verified against its DiffID, and unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.compression import Hashed, open_decompressed
from sandbox_kernel.image.documents import Descriptor
from sandbox_kernel.image.unpack import Unpacked, unpack

CHUNK_BYTES = 1 << 20


class LayerProgress(Protocol):
    """Who is told how far a layer is; may be called from any thread."""

    def started(self, digest: str, total_bytes: int) -> None:
        """Take note of a blob that is worked on now."""

    def advanced(self, digest: str, count_bytes: int) -> None:
        """Take note of so many bytes more."""

    def finished(self, digest: str, note: str) -> None:
        """Take note of the end of a blob: `unpacked`, `imported`, `exists` or `shared`."""


class Counted:
    """A stream that tells how much is read through it."""

    def __init__(self, stream: BinaryIO, blob: Descriptor, progress: LayerProgress | None) -> None:
        self._stream = stream
        self._digest = blob.digest
        self._progress = progress
        if progress is not None:
            progress.started(blob.digest, blob.size_bytes)

    def read(self, size: int, /) -> bytes:
        """Give up to `size` bytes."""
        data = self._stream.read(size)
        if self._progress is not None and data:
            self._progress.advanced(self._digest, len(data))
        return data

    def finished(self, note: str) -> None:
        """Tell that it is done."""
        if self._progress is not None:
            self._progress.finished(self._digest, note)


def unpack_blob(
    stream: Counted, blob: Descriptor, diff_id: str, target: Path, lowers: Sequence[Path]
) -> Unpacked:
    """Unpack a layer's blob into an empty folder; raises ImageError if it is not what it says.

    The folder may hold anything after an error.
    """
    hashed = Hashed(open_decompressed(stream))
    unpacked = unpack(hashed, target, lowers=lowers)
    if hashed.digest != diff_id:
        raise ImageError(
            f"the layer {blob.digest} is not the one that the image's config names: its "
            f"DiffID is {hashed.digest}, not {diff_id}",
            hint="the image is damaged, or somebody changed it",
        )
    return unpacked
