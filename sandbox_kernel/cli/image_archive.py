"""`image import` and `image export`: images as files and folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from sandbox_kernel.cli.image_screen import shown
from sandbox_kernel.cli.image_store import (
    json_option,
    opened_store,
    platform_option,
    quiet_option,
    read_platform,
    read_reference,
)
from sandbox_kernel.cli.image_text import document, harmless, image_json, name_of, put, short
from sandbox_kernel.errors import ConfigError

STREAM = "-"
_FORMATS = {
    "oci": "oci-archive",
    "oci-archive": "oci-archive",
    "oci-dir": "oci",
    "docker": "docker-archive",
    "docker-archive": "docker-archive",
}


@click.command("import")
@click.argument("source", metavar="FILE|FOLDER|-", required=False)
@click.option("-i", "--input", "input_file", metavar="FILE", hidden=True)
@click.option("--name", metavar="REF", help="Its name, in place of the one in the archive.")
@platform_option
@quiet_option
@json_option
def import_(  # noqa: PLR0913 - one for each option
    *,
    source: str | None,
    input_file: str | None,
    name: str | None,
    platform: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Take images in from a file, a folder or, as `-`, standard input.

    What it is is found out: an archive of `docker save`, an OCI layout as folder or tar, or the
    tar of a root file system, which needs --name. Compressed ones are taken as they are.
    """
    from sandbox_kernel.image.archive import (  # noqa: PLC0415 - not for --help
        ImportOptions,
        import_archive,
    )

    if (source is None) == (input_file is None):
        raise ConfigError("name one FILE or FOLDER", hint="write - for standard input")
    text = source or input_file or STREAM
    if text == STREAM and sys.stdin.isatty():
        raise ConfigError("standard input is a terminal", hint="pipe an archive in, or name a FILE")
    reference, wanted = read_reference(name) if name else None, read_platform(platform)
    title = f"Importing {harmless(text)}"
    with opened_store(unpacks=True) as store, shown(title, quiet=quiet) as screen:
        options = ImportOptions(reference, wanted, screen)
        stream = sys.stdin.buffer if text == STREAM else Path(text)
        images = import_archive(store, stream, options)
    if as_json:
        click.echo(document({"images": [image_json(image) for image in images]}))
        return
    for image in images:
        if quiet:
            click.echo(image.image_id)
        else:
            put(f"Imported {name_of(image)} ({short(image.image_id)})")


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "-o", "--output", required=True, metavar="FILE|FOLDER|-", help="Where to; - is stdout."
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(list(_FORMATS)),
    help="oci: an OCI layout as tar; oci-dir: as folder; docker: what `docker load` takes. "
    "Default: oci, or oci-dir where FOLDER is one or ends in /.",
)
@json_option
def export(*, images: Sequence[str], output: str, kind: str | None, as_json: bool) -> None:
    """Write images to a file or folder that skopeo, podman and docker take.

    A file is replaced; a folder must be new or empty.
    """
    from sandbox_kernel.image.export import export_images  # noqa: PLC0415 - not for --help

    kind = kind or ("oci-dir" if output.endswith("/") or Path(output).is_dir() else "oci")
    if output == STREAM and (sys.stdout.isatty() or as_json):
        what = "is a terminal" if sys.stdout.isatty() else "is for --json"
        raise ConfigError(f"stdout {what}", hint="name a FILE with -o")
    with opened_store() as store:
        found = [store.resolve(text) for text in images]
        target = sys.stdout.buffer if output == STREAM else Path(output)
        with shown(f"Exporting {', '.join(map(name_of, found))}"):
            export_images(store, found, _FORMATS[kind], target)
    if as_json:
        content = {"file": output, "format": _FORMATS[kind]}
        click.echo(document({**content, "images": [image_json(one) for one in found]}))
    elif output != STREAM:
        put(f"Exported {', '.join(map(name_of, found))} to {harmless(output)}")
