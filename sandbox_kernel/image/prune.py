"""Prune: take away what no name, no living process and no cache record leads to.

Mark and sweep. Both happen while PRUNE is held alone, so nobody begins to use what is being
removed; what is in use already is leased.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.cache_mounts import CacheMounts
from sandbox_kernel.image.cache_records import CacheRecords
from sandbox_kernel.image.leases import leased
from sandbox_kernel.image.media import hex_of
from sandbox_kernel.image.reach import Item, Reach
from sandbox_kernel.image.store_blobs import Blobs
from sandbox_kernel.image.store_files import Staging, remove, take_away
from sandbox_kernel.image.store_layers import LayerFolders
from sandbox_kernel.image.store_locks import PRUNE, Locks
from sandbox_kernel.image.store_refs import Refs, name_of


@dataclass(frozen=True)
class PruneOptions:
    """What a prune may take beside of what nothing leads to.

    Images without a name are always taken; `all_images` takes the others too. `build_cache`
    takes cache records and then the mounts of caches: all of them, or, with `keep_bytes`, those
    used longest ago until the rest of the cache holds at most that. With `older_than_s` all that
    came or was used later is kept.
    """

    all_images: bool = False
    build_cache: bool = False
    older_than_s: float = 0.0
    keep_bytes: int | None = None
    dangling: bool = True


GARBAGE = PruneOptions(dangling=False)
"""Take only what nothing leads to: no image, no cache record."""


@dataclass(frozen=True)
class Pruned:
    """What a prune took; images by manifest digest."""

    images: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    cache_mounts: int = 0
    size_bytes: int = 0


@dataclass(frozen=True)
class Parts:
    """The parts of a store that prune and disk usage look at."""

    locks: Locks
    staging: Staging
    blobs: Blobs
    layers: LayerFolders
    refs: Refs
    records: CacheRecords
    mounts: CacheMounts
    leases: Path
    diff_ids: Path

    def item_bytes(self, item: Item) -> int:
        """Give what a blob or layer takes on disk; 0 if it is missing."""
        if item.is_layer:
            found = (self.layers.get(item.digest), self.layers.owned(item.digest))
            return sum(one.size_bytes for one in found if one is not None)
        return self.blobs.size(item.digest) or 0

    def total_bytes(self, items: Iterable[Item]) -> int:
        """Give what these take on disk together."""
        return sum(self.item_bytes(item) for item in set(items))


def prune(parts: Parts, options: PruneOptions) -> Pruned:
    """Remove what the options name and nobody uses; tell what it was.

    Raises ImageError if a layer could not be removed as a whole, when all else is done.
    """
    with parts.locks.held(PRUNE):
        in_use = leased(parts.leases)
        reach = Reach(parts.blobs)
        before_s = time.time() - options.older_than_s
        images = _prune_images(parts, options, in_use, before_s)
        records: tuple[str, ...] = ()
        kept_bytes = 0
        if options.build_cache:
            records, kept_bytes = _prune_records(parts, options, reach, before_s)
        roots = {entry.digest for entry in parts.refs.entries()} | in_use
        for record in parts.records.all():
            roots.update(record.digests)
        unused = _unused(parts, reach.of(roots))
        size_bytes = parts.total_bytes(unused)
        gone = [_take(parts, item) for item in unused]
    mounts: list[Path] = []
    if options.build_cache:
        mounts, freed_bytes = _prune_mounts(parts, options, kept_bytes, before_s)
        size_bytes += freed_bytes
    # Without the lock: it takes long, and who wants to start something need not wait for it.
    _remove_all([*(path for path in gone if path is not None), *mounts])
    blobs = tuple(item.digest for item in unused if not item.is_layer)
    layers = tuple(item.digest for item in unused if item.is_layer)
    return Pruned(images, records, blobs, layers, len(mounts), size_bytes)


def _remove_all(paths: Iterable[Path]) -> None:
    left: list[ImageError] = []
    for path in paths:
        try:
            remove(path)
        except ImageError as error:
            left.append(error)
    if left:
        raise ImageError(
            f"all is pruned but for parts of {len(left)} layers: {left[0].message}",
            hint=f"{left[0].hint}; the next who opens the store removes what is left then",
        )


def _unused(parts: Parts, marked: frozenset[Item]) -> list[Item]:
    layers = [Item(one, is_layer=True) for one in parts.layers.names()]
    blobs = [Item(one) for one in parts.blobs.all()]
    return [item for item in (*layers, *blobs) if item not in marked]


def _take(parts: Parts, item: Item) -> Path | None:
    if item.is_layer:
        return parts.layers.take_away(item.digest)
    (parts.diff_ids / hex_of(item.digest)).unlink(missing_ok=True)
    return take_away(parts.blobs.path(item.digest), parts.staging)


def _prune_images(
    parts: Parts, options: PruneOptions, in_use: set[str], before_s: float
) -> tuple[str, ...]:
    gone = []
    for entry in parts.refs.entries():
        wanted = options.all_images or (options.dangling and not name_of(entry))
        if wanted and entry.digest not in in_use and _came_s(parts, entry.digest) <= before_s:
            gone.append(entry.digest)
    if gone:
        parts.refs.drop(gone)
    return tuple(dict.fromkeys(gone))


def _came_s(parts: Parts, digest: str) -> float:
    """Give when an image came into this store; its own date may be from any year."""
    try:
        return parts.blobs.path(digest).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _prune_records(
    parts: Parts, options: PruneOptions, reach: Reach, before_s: float
) -> tuple[tuple[str, ...], int]:
    """Remove records; tell which, and how much the others keep alive."""
    items = set(reach.of(entry.digest for entry in parts.refs.entries()))
    size_bytes = kept_bytes = 0
    gone = []
    # From the one used last: what an image keeps costs nothing, and nothing is counted twice.
    for record in reversed(parts.records.all()):
        new = reach.of(record.digests) - items
        items |= new
        size_bytes += parts.total_bytes(new)
        fits = options.keep_bytes is not None and size_bytes <= options.keep_bytes
        if not fits and record.used_s <= before_s:
            gone.append(record.key)
        else:
            kept_bytes = size_bytes
    for key in gone:
        parts.records.remove(key)
    return tuple(gone), kept_bytes


def _prune_mounts(
    parts: Parts, options: PruneOptions, kept_bytes: int, before_s: float
) -> tuple[list[Path], int]:
    """Take mounts of caches away that no step has; give where they wait, and what they took."""
    gone, size_bytes = [], 0
    for mount in parts.mounts.all():
        fits = options.keep_bytes is not None and (
            kept_bytes + mount.size_bytes <= options.keep_bytes
        )
        taken = None
        if not fits and mount.used_s <= before_s:
            taken = parts.mounts.take_away(mount)
        if taken is None:
            kept_bytes += mount.size_bytes
        else:
            gone.append(taken)
            size_bytes += mount.size_bytes
    return gone, size_bytes
