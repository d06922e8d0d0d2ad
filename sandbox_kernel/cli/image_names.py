"""`image tag` and `image remove`: the names of images."""

from __future__ import annotations

from collections.abc import Sequence

import click

from sandbox_kernel.cli.image_store import json_option, opened_store, read_reference
from sandbox_kernel.cli.image_text import document, image_json, name_of, put, short
from sandbox_kernel.errors import ConfigError
from sandbox_kernel.image.prune import GARBAGE
from sandbox_kernel.units import format_size


@click.command()
@click.argument("image")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@json_option
def tag(*, image: str, names: Sequence[str], as_json: bool) -> None:
    """Give IMAGE one more name, or several; another image that had it loses it."""
    wanted = [read_reference(name) for name in names]
    for one in wanted:
        if one.digest:
            raise ConfigError(f"{str(one)!r} has a digest", hint="give a name and a tag only")
    with opened_store() as store:
        tagged = [store.tag(image, one) for one in wanted]
    if as_json:
        click.echo(document({"images": [image_json(found) for found in tagged]}))
        return
    for found in tagged:
        put(f"Tagged {short(found.image_id)} as {name_of(found)}")


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-f", "--force", is_flag=True, help="Remove an ID with all its names.")
@json_option
def remove(*, images: Sequence[str], force: bool, as_json: bool) -> None:
    """Take names away; an image without names goes, with all that nothing else needs.

    What a running kernel uses stays until it has ended and `image prune` is run; what the build
    cache needs stays until `image prune --build-cache`.
    """
    removed: list[str] = []
    gone: list[str] = []
    with opened_store() as store:
        for text in images:
            found = store.resolve(text)
            names = store.untag(text, force=force)
            removed += names
            if all(one.digest != found.digest for one in store.images()):
                gone.append(found.digest)
        pruned = store.prune(GARBAGE)
    if as_json:
        content = {"names": removed, "images": gone, "freed_bytes": pruned.size_bytes}
        click.echo(document(content))
        return
    for name in removed:
        put(f"Untagged {read_reference(name)}")
    for digest in gone:
        put(f"Removed {short(digest)}")
    put(f"Freed {format_size(pruned.size_bytes)}")
