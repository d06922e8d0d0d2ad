"""`image prune` and `image disk-usage`: what the store takes on disk, and how to get it back."""

from __future__ import annotations

import click

from sandbox_kernel.cli.image_store import json_option, opened_store, read_reference
from sandbox_kernel.cli.image_text import document, harmless, put, short, table
from sandbox_kernel.errors import ConfigError, ImageError
from sandbox_kernel.image.disk_usage import DiskUsage, ImageUsage
from sandbox_kernel.image.prune import Pruned, PruneOptions
from sandbox_kernel.units import format_size, parse_duration, parse_size


@click.command()
@click.option("-a", "--all", "all_images", is_flag=True, help="Images that have a name, too.")
@click.option("--build-cache", is_flag=True, help="What builds keep to be fast again, too.")
@click.option("--older-than", metavar="DURATION", help="Only what came, or was used, before: 7d.")
@click.option("--keep", metavar="SIZE", help="Leave so much of the build cache, used last: 5G.")
@json_option
def prune(
    *, all_images: bool, build_cache: bool, older_than: str | None, keep: str | None, as_json: bool
) -> None:
    """Remove images without a name, and all that nothing needs.

    What a running kernel, build or transfer uses is never taken.
    """
    if keep is not None and not build_cache:
        raise ConfigError(
            f"--keep {keep} is for the build cache, which is not pruned", hint="add --build-cache"
        )
    options = PruneOptions(
        all_images=all_images,
        build_cache=build_cache,
        older_than_s=parse_duration(older_than) if older_than is not None else 0.0,
        keep_bytes=parse_size(keep) if keep is not None else None,
    )
    with opened_store() as store:
        pruned = store.prune(options)
    if as_json:
        click.echo(document(_pruned(pruned)))
        return
    for digest in pruned.images:
        put(f"Removed {short(digest)}")
    records = f", build cache records: {len(pruned.records)}" if build_cache else ""
    mounts = f", cache mounts: {pruned.cache_mounts}" if build_cache else ""
    put(
        f"Images: {len(pruned.images)}{records}, blobs: {len(pruned.blobs)}, "
        f"unpacked layers: {len(pruned.layers)}{mounts}"
    )
    put(f"Freed {format_size(pruned.size_bytes)}")


def _pruned(pruned: Pruned) -> dict[str, object]:
    return {
        "images": list(pruned.images),
        "build_cache_records": len(pruned.records),
        "blobs": list(pruned.blobs),
        "layers": list(pruned.layers),
        "cache_mounts": pruned.cache_mounts,
        "freed_bytes": pruned.size_bytes,
    }


@click.command("disk-usage")
@click.option("-v", "--verbose", is_flag=True, help="Show each image.")
@json_option
def disk_usage(*, verbose: bool, as_json: bool) -> None:
    """Show what images, the build cache and leftovers take on disk, blobs and unpacked layers.

    RECLAIMABLE is what `image prune` can free: `--all` for images that no kernel uses,
    `--build-cache` for the cache.
    """
    with opened_store() as store:
        usage = store.disk_usage()
    if as_json:
        click.echo(document(_usage(usage)))
        return
    if verbose:
        rows = [("IMAGE", "NAMES", "SIZE", "SHARED", "UNIQUE", "IN USE")]
        put(table([*rows, *map(_row, usage.images)]) + "\n")
    free = sum(image.unique_bytes for image in usage.images if not image.in_use)
    rows_of_kinds = [
        ("TYPE", "COUNT", "SIZE", "RECLAIMABLE"),
        ("Images", str(len(usage.images)), format_size(usage.images_bytes), format_size(free)),
        ("Build cache", str(usage.cache_records), *[format_size(usage.cache_bytes)] * 2),
        ("Cache mounts", str(usage.cache_mounts), *[format_size(usage.mounts_bytes)] * 2),
        ("Unused", "-", *[format_size(usage.unused_bytes)] * 2),
        ("Total", "-", format_size(usage.total_bytes), "-"),
    ]
    put(table(rows_of_kinds))


def _row(image: ImageUsage) -> tuple[str, ...]:
    names = ", ".join(map(_familiar, image.names)) or "<none>"
    sizes = map(format_size, (image.size_bytes, image.shared_bytes, image.unique_bytes))
    return short(image.digest), names, *sizes, "yes" if image.in_use else "no"


def _familiar(name: str) -> str:
    """Give the short form of a name in the index, which another program may have written."""
    try:
        return str(read_reference(name))
    except (ConfigError, ImageError):
        return harmless(name)


def _usage(usage: DiskUsage) -> dict[str, object]:
    return {
        "images": [
            {
                "digest": image.digest,
                "names": list(image.names),
                "size_bytes": image.size_bytes,
                "shared_bytes": image.shared_bytes,
                "unique_bytes": image.unique_bytes,
                "in_use": image.in_use,
            }
            for image in usage.images
        ],
        "images_bytes": usage.images_bytes,
        "build_cache_records": usage.cache_records,
        "build_cache_bytes": usage.cache_bytes,
        "cache_mounts": usage.cache_mounts,
        "cache_mounts_bytes": usage.mounts_bytes,
        "unused_bytes": usage.unused_bytes,
        "total_bytes": usage.total_bytes,
    }
