"""`image list`, `image inspect` and `image history`: what is in the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from sandbox_kernel.cli.image_store import (
    json_option,
    opened_store,
    quiet_option,
    read_reference,
)
from sandbox_kernel.cli.image_text import (
    document,
    harmless,
    image_json,
    one_line,
    put,
    short,
    table,
)
from sandbox_kernel.image.stored_image import HistoryRow, StoredImage
from sandbox_kernel.units import format_size

NONE = "<none>"
"""Docker's word for a name that is missing."""
_WORDS = 60
"""Characters of a step that `history` shows."""

_no_trunc = click.option("--no-trunc", is_flag=True, help="Show IDs and steps in full.")


@click.command("list")
@click.argument("name", required=False)
@quiet_option
@_no_trunc
@json_option
def list_(*, name: str | None, quiet: bool, no_trunc: bool, as_json: bool) -> None:
    """List the images of the store, or those called NAME, with any tag unless NAME has one."""
    with opened_store() as store:
        images = [image for image in store.images() if name is None or _is_called(image, name)]
    if as_json:
        click.echo(document({"images": [image_json(image) for image in images]}))
    elif quiet:
        for image_id in dict.fromkeys(image.image_id for image in images):
            click.echo(image_id if no_trunc else short(image_id))
    else:
        rows = [("REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE")]
        put(table([*rows, *(_row(image, no_trunc=no_trunc) for image in images)]))


def _is_called(image: StoredImage, name: str) -> bool:
    wanted, found = read_reference(name), image.reference
    if found is None or found.name != wanted.name:
        return False
    # Without a tag all of them are meant, as for `docker images`.
    has_tag = name.rpartition("/")[2].partition("@")[0].partition(":")[1]
    return not has_tag or found.tag == wanted.tag


def _row(image: StoredImage, *, no_trunc: bool) -> tuple[str, str, str, str, str]:
    name, tag = NONE, NONE
    if image.reference is not None:
        tag = image.reference.tag or NONE
        name = str(image.reference).partition("@")[0].removesuffix(f":{tag}")
    image_id = image.image_id if no_trunc else short(image.image_id)
    return name, tag, image_id, _day(image.created), format_size(image.size_bytes)


def _day(created: str) -> str:
    """Give the day of a date in RFC 3339; one that an image made up is shown as it is."""
    return one_line(created)[:10] or NONE


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@json_option
def inspect(*, images: Sequence[str], as_json: bool) -> None:
    """Show what an image is: its name, ID or digest, and what its processes start with."""
    with opened_store() as store:
        found = [store.resolve(text) for text in images]
    if as_json:
        click.echo(document({"images": [_details(image) for image in found]}))
        return
    for number, image in enumerate(found):
        if number:
            click.echo()
        put("\n".join(f"{name:<13}{value}" for name, value in _facts(image)))


def _details(image: StoredImage) -> dict[str, Any]:
    """Give the JSON of `inspect`."""
    config = image.config
    return {
        **image_json(image),
        "media_type": image.manifest.media_type,
        "author": config.author,
        "env": dict(config.env),
        "working_dir": config.working_dir,
        "user": config.user,
        "entrypoint": list(config.entrypoint),
        "cmd": list(config.cmd),
        "labels": dict(config.labels),
        "exposed_ports": list(config.exposed_ports),
        "volumes": list(config.volumes),
        "stop_signal": config.stop_signal,
        "shell": list(config.shell),
        "healthcheck": config.healthcheck,
        "on_build": list(config.on_build),
        "layers": [
            {
                "digest": layer.digest,
                "diff_id": diff_id,
                "media_type": layer.media_type,
                "size_bytes": layer.size_bytes,
            }
            for layer, diff_id in zip(image.manifest.layers, config.diff_ids, strict=True)
        ],
    }


def _facts(image: StoredImage) -> list[tuple[str, str]]:
    """Give the lines of `inspect`; what an image does not say is left out."""
    config = image.config
    facts = [
        ("Name", [str(image.reference) if image.reference else NONE]),
        ("ID", [image.image_id]),
        ("Digest", [image.digest]),
        ("Platform", [str(config.platform)]),
        ("Created", [image.created]),
        ("Size", [format_size(image.size_bytes)]),
        ("User", [config.user]),
        ("Working dir", [config.working_dir]),
        ("Entrypoint", [" ".join(map(repr, config.entrypoint))]),
        ("Cmd", [" ".join(map(repr, config.cmd))]),
        ("Env", [f"{name}={value}" for name, value in config.env]),
        ("Labels", [f"{name}={value}" for name, value in config.labels]),
        ("Ports", list(config.exposed_ports)),
        ("Volumes", list(config.volumes)),
        ("Layers", [f"{layer.digest} {layer.size_bytes}" for layer in image.manifest.layers]),
    ]
    lines = []
    for name, values in facts:
        said = [harmless(value) for value in values if value]
        lines += [(f"{name}:" if not number else "", value) for number, value in enumerate(said)]
    return lines


@click.command()
@click.argument("image")
@_no_trunc
@json_option
def history(*, image: str, no_trunc: bool, as_json: bool) -> None:
    """Show the chain of an image, the last step first.

    LAYER is the digest of the files that a step changed, without compression: two images share
    a layer on disk if it has the same one.
    """
    with opened_store() as store:
        found = store.resolve(image)
        rows = store.history(found)
    if as_json:
        steps = [_step(row) for row in rows]
        click.echo(document({**image_json(found), "history": steps}))
        return
    shown = [(_day(row.created), *_words(row, no_trunc=no_trunc)) for row in rows]
    put(table([("CREATED", "LAYER", "SIZE", "CREATED BY"), *shown]))


def _step(row: HistoryRow) -> dict[str, Any]:
    return {
        "created": row.created,
        "created_by": row.created_by,
        "comment": row.comment,
        "size_bytes": row.size_bytes,
        "layer": row.layer or None,
        "diff_id": row.diff_id or None,
        "chain_id": row.chain_id or None,
    }


def _words(row: HistoryRow, *, no_trunc: bool) -> tuple[str, str, str]:
    words = one_line(row.created_by) or one_line(row.comment) or NONE
    if no_trunc:
        return row.diff_id or "-", format_size(row.size_bytes), words
    words = words if len(words) <= _WORDS else words[: _WORDS - 3] + "..."
    return short(row.diff_id) or "-", format_size(row.size_bytes), words
