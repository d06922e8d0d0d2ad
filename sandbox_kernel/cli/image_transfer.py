"""`image pull` and `image push`: images from a registry and to one."""

from __future__ import annotations

import click

from sandbox_kernel.cli.image_screen import Screen, shown
from sandbox_kernel.cli.image_store import (
    insecure_option,
    json_option,
    opened_store,
    platform_option,
    quiet_option,
    read_platform,
    read_reference,
)
from sandbox_kernel.cli.image_text import document, image_json, name_of, put
from sandbox_kernel.errors import ConfigError, ImageError
from sandbox_kernel.image.platform import Platform
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage
from sandbox_kernel.units import format_size


@click.command()
@click.argument("reference", metavar="REF")
@platform_option
@insecure_option
@quiet_option
@json_option
def pull(
    *, reference: str, platform: str | None, insecure: bool, quiet: bool, as_json: bool
) -> None:
    """Fetch the image REF from its registry, and unpack it.

    Credentials are those of `docker login` or `podman login`. What is there already is not
    fetched; a REF with a digest that is there needs no network.
    """
    wanted, chosen = read_reference(reference), read_platform(platform)
    with opened_store(unpacks=True) as store, shown(f"Pulling {wanted}", quiet=quiet) as screen:
        image = fetch(store, wanted, screen, platform=chosen, insecure=insecure)
    if as_json:
        click.echo(document(image_json(image)))
    elif quiet:
        click.echo(image.image_id)
    else:
        count, size = len(image.manifest.layers), format_size(image.size_bytes)
        put(f"Pulled {name_of(image)}: {image.digest}, layers: {count}, {size}")


def fetch(
    store: Store,
    reference: Reference,
    screen: Screen,
    *,
    platform: Platform | None = None,
    insecure: bool = False,
) -> StoredImage:
    """Pull an image and unpack its layers; raises ImageError."""
    from sandbox_kernel.image import transfer  # noqa: PLC0415 - a client for HTTP, slow to import
    from sandbox_kernel.image.registry import RegistryOptions  # noqa: PLC0415 - as above

    options = RegistryOptions(insecure=insecure, platform=platform)
    image = transfer.pull(reference, store, screen, options)
    store.ensure_layers(image, screen)
    return image


@click.command()
@click.argument("image")
@click.argument("destination", required=False)
@platform_option
@insecure_option
@quiet_option
@json_option
def push(  # noqa: PLR0913 - one for each option
    *,
    image: str,
    destination: str | None,
    platform: str | None,
    insecure: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Send IMAGE to its registry, or to DESTINATION as another reference.

    With --platform it is refused unless it was made for that one.
    """
    from sandbox_kernel.image import transfer  # noqa: PLC0415 - a client for HTTP, slow to import
    from sandbox_kernel.image.registry import RegistryOptions  # noqa: PLC0415 - as above

    wanted = read_platform(platform)
    named = read_reference(destination) if destination is not None else None
    with opened_store() as store:
        found = store.resolve(image)
        target = named or found.reference
        if target is None:
            raise ConfigError(f"the image {image} has no name", hint="name a DESTINATION too")
        if wanted is not None and not wanted.takes(found.config.platform):
            raise ImageError(
                f"{image} was made for {found.config.platform}, not for {wanted}",
                hint=f"pull or build it with --platform {wanted}",
            )
        with shown(f"Pushing {target}", quiet=quiet) as screen:
            options = RegistryOptions(insecure=insecure)
            digest = transfer.push(target, found, store, screen, options)
    if as_json:
        click.echo(document({"reference": target.full, "digest": digest}))
    elif quiet:
        click.echo(digest)
    else:
        put(f"Pushed {target}: {digest}")
