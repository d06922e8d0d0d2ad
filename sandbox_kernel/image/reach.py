"""What an image, a lease or a cache record keeps alive: everything that its digests lead to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import (
    MAX_DOCUMENT_BYTES,
    ImageConfig,
    Index,
    Manifest,
    chain_id,
    parse_document,
)
from sandbox_kernel.image.store_blobs import Blobs


@dataclass(frozen=True)
class Item:
    """Something on disk: a blob, or the folder of an unpacked layer."""

    digest: str
    is_layer: bool = False


class Reach:
    """Follows digests to the blobs and layers that they lead to; remembers what it has read."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._known: dict[str, frozenset[Item]] = {}

    def of(self, digests: Iterable[str]) -> frozenset[Item]:
        """Give all that these lead to, whether it is there or not.

        Any digest may be the name of a blob or of a layer, so it counts as both.
        """
        found: set[Item] = set()
        waiting = set(digests)
        seen: set[str] = set()
        while waiting:
            digest = waiting.pop()
            seen.add(digest)
            found |= {Item(digest), Item(digest, is_layer=True)}
            found |= self._document(digest)
            waiting |= {item.digest for item in found if not item.is_layer} - seen
        return frozenset(found)

    def _document(self, digest: str) -> frozenset[Item]:
        if digest not in self._known:
            self._known[digest] = self._read(digest)
        return self._known[digest]

    def _read(self, digest: str) -> frozenset[Item]:
        """Give what a blob names, which is nothing unless it is a manifest or an index."""
        size_bytes = self._blobs.size(digest)
        if size_bytes is None or size_bytes > MAX_DOCUMENT_BYTES:
            return frozenset()
        try:
            with self._blobs.open(digest) as file:
                if file.read(1) != b"{":
                    return frozenset()
            document = parse_document(self._blobs.read(digest))
        except ImageError:
            return frozenset()
        if isinstance(document, Index):
            return frozenset(Item(one.digest) for one in document.manifests)
        return self._of_manifest(document)

    def _of_manifest(self, manifest: Manifest) -> frozenset[Item]:
        found = {Item(one.digest) for one in (manifest.config, *manifest.layers)}
        try:
            config = ImageConfig.parse(self._blobs.read(manifest.config.digest))
        except ImageError:
            return frozenset(found)
        chain = ""
        for diff_id in config.diff_ids:
            # The ChainID of two is made of the ChainID below and the DiffID on top.
            chain = chain_id([chain, diff_id] if chain else [diff_id])
            found |= {Item(diff_id, is_layer=True), Item(chain, is_layer=True)}
        return frozenset(found)
