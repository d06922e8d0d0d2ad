"""What a store holds, image by image, as `docker system df --verbose` counts it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sandbox_kernel.image.leases import leased
from sandbox_kernel.image.prune import Parts
from sandbox_kernel.image.reach import Item, Reach
from sandbox_kernel.image.store_locks import PRUNE
from sandbox_kernel.image.store_refs import name_of


@dataclass(frozen=True)
class ImageUsage:
    """What one image takes on disk: blobs and unpacked layers.

    `shared_bytes` are also another image's, `unique_bytes` are freed if the image goes.
    """

    digest: str
    names: tuple[str, ...]
    size_bytes: int
    shared_bytes: int
    unique_bytes: int
    in_use: bool


@dataclass(frozen=True)
class DiskUsage:
    """What a store takes on disk.

    `cache_bytes` is what only the build cache keeps, `mounts_bytes` what its mounts hold,
    `unused_bytes` what nothing leads to.
    """

    images: tuple[ImageUsage, ...]
    images_bytes: int
    cache_records: int
    cache_bytes: int
    cache_mounts: int
    mounts_bytes: int
    unused_bytes: int
    total_bytes: int


def disk_usage(parts: Parts) -> DiskUsage:
    """Count what is in a store; raises ImageError if its index cannot be read."""
    reach = Reach(parts.blobs)
    with parts.locks.held(PRUNE):
        in_use = leased(parts.leases)
    names: dict[str, list[str]] = {}
    for entry in parts.refs.entries():
        names.setdefault(entry.digest, []).extend(filter(None, [name_of(entry)]))
    sizes = _sizes(parts)
    owned = {digest: reach.of([digest]) & sizes.keys() for digest in names}
    owners = Counter(item for items in owned.values() for item in items)
    images = []
    for digest, items in owned.items():
        unique_bytes = sum(sizes[item] for item in items if owners[item] == 1)
        size_bytes = sum(sizes[item] for item in items)
        images.append(
            ImageUsage(
                digest=digest,
                names=tuple(names[digest]),
                size_bytes=size_bytes,
                shared_bytes=size_bytes - unique_bytes,
                unique_bytes=unique_bytes,
                in_use=digest in in_use,
            )
        )
    records = parts.records.all()
    cached = reach.of(digest for record in records for digest in record.digests) & sizes.keys()
    images_bytes = sum(sizes[item] for item in owners)
    cache_bytes = sum(sizes[item] for item in cached - owners.keys())
    held_bytes = sum(sizes.values())
    mounts = parts.mounts.all()
    mounts_bytes = sum(mount.size_bytes for mount in mounts)
    return DiskUsage(
        images=tuple(images),
        images_bytes=images_bytes,
        cache_records=len(records),
        cache_bytes=cache_bytes,
        cache_mounts=len(mounts),
        mounts_bytes=mounts_bytes,
        unused_bytes=held_bytes - images_bytes - cache_bytes,
        total_bytes=held_bytes + mounts_bytes,
    )


def _sizes(parts: Parts) -> dict[Item, int]:
    blobs = [Item(one) for one in parts.blobs.all()]
    layers = [Item(one, is_layer=True) for one in parts.layers.names()]
    return {item: parts.item_bytes(item) for item in (*blobs, *layers)}
