"""An image of the store as value, and the chain of its layers."""

from __future__ import annotations

from dataclasses import dataclass

from sandbox_kernel.image.documents import ImageConfig, Manifest, chain_id
from sandbox_kernel.image.reference import Reference


@dataclass(frozen=True)
class StoredImage:
    """One image; `digest` is that of its manifest, `reference` None if it has no name.

    `size_bytes` is that of its blobs.
    """

    reference: Reference | None
    digest: str
    manifest: Manifest
    config: ImageConfig
    size_bytes: int
    created: str

    @property
    def image_id(self) -> str:
        """The digest of the config, which Docker shows as the ID."""
        return self.manifest.config.digest


@dataclass(frozen=True)
class HistoryRow:
    """One step of an image; the last four are empty for a step that made no layer."""

    created: str
    created_by: str
    comment: str
    size_bytes: int = 0
    layer: str = ""
    diff_id: str = ""
    chain_id: str = ""


def history(image: StoredImage) -> tuple[HistoryRow, ...]:
    """Give the chain of an image, the last step first.

    Layers that its history does not tell of come without words.
    """
    layers = []
    chain = ""
    for layer, diff_id in zip(image.manifest.layers, image.config.diff_ids, strict=True):
        chain = chain_id([chain, diff_id] if chain else [diff_id])
        layers.append((layer.size_bytes, layer.digest, diff_id, chain))
    left = iter(layers)
    rows = []
    for line in image.config.history:
        found = None if line.empty_layer else next(left, None)
        rows.append(HistoryRow(line.created, line.created_by, line.comment, *(found or ())))
    rows += [HistoryRow("", "", "", *found) for found in left]
    return tuple(reversed(rows))
