"""What `image build` does: put the options together, build, and tell what came of it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import click

from sandbox_kernel.build.base import Pull
from sandbox_kernel.build.builder import build
from sandbox_kernel.build.dockerfile import parse
from sandbox_kernel.build.options import BuildOptions
from sandbox_kernel.build.stages import Kind, plan
from sandbox_kernel.cli import image_build_input as given
from sandbox_kernel.cli.image_build_steps import Steps
from sandbox_kernel.cli.image_limits import LIMITS, limits_of
from sandbox_kernel.cli.image_screen import Screen, shown
from sandbox_kernel.cli.image_store import opened_store, read_platform, read_reference
from sandbox_kernel.cli.image_text import document, image_json, put, short
from sandbox_kernel.cli.image_transfer import fetch
from sandbox_kernel.errors import ImageError, SandboxError
from sandbox_kernel.image.platform import Platform
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage
from sandbox_kernel.units import format_size


@dataclass(frozen=True)
class Asked:
    """The options of `image build`, as they were written."""

    context: str
    file: str | None
    tags: tuple[str, ...]
    build_args: tuple[str, ...]
    labels: tuple[str, ...]
    secrets: tuple[str, ...]
    target: str
    platform: str | None
    no_cache: bool
    refresh: bool
    network: str
    memory: str | None
    cpus: str | None
    processes: str | None
    wall_time: str | None
    disk: str | None
    waive: tuple[str, ...]
    explain: bool
    progress: str
    quiet: bool
    iidfile: Path | None
    as_json: bool

    def options(self, stack: ExitStack) -> BuildOptions:
        """Read them; what is made for the build goes with the stack. Raises ConfigError."""
        arguments = given.arguments(self.build_args)
        limits = {limit.name: getattr(self, limit.name) for limit in LIMITS}
        sources = stack.enter_context(given.sources(self.context, self.file))
        return BuildOptions(
            sources.context,
            sources.dockerfile,
            tags=tuple(map(read_reference, self.tags)),
            arguments=arguments,
            labels=given.pairs(self.labels, "--label"),
            target=self.target,
            platform=read_platform(self.platform),
            use_cache=not self.no_cache,
            explain=self.explain,
            network=self.network,
            secrets=given.secrets(self.secrets, stack),
            limits=limits_of(limits, self.waive),
            epoch_s=given.epoch_s(arguments.get(given.EPOCH)),
        )


def perform(asked: Asked) -> None:
    """Build, and print what came of it. Raises SandboxError."""
    with ExitStack() as stack:
        options = asked.options(stack)
        store = stack.enter_context(opened_store(unpacks=True))
        screen = stack.enter_context(shown(mode=asked.progress, quiet=asked.quiet))
        steps = Steps(screen)
        options = replace(options, pull=_puller(store, screen))
        if asked.refresh:
            _refresh(store, screen, options)
        try:
            image = build(store, options, steps.take)
        except SandboxError:
            tail = steps.failed()
            if asked.quiet:
                put("\n".join(tail), err=True)
            raise
    if asked.iidfile is not None:
        _write(asked.iidfile, image.image_id)
    _tell(asked, image, steps)


def _tell(asked: Asked, image: StoredImage, steps: Steps) -> None:
    names = [str(read_reference(tag)) for tag in asked.tags]
    if asked.as_json:
        tags = [read_reference(tag).full for tag in asked.tags]
        click.echo(document({**image_json(image), "tags": tags, "steps": steps.told}))
    elif asked.quiet:
        click.echo(image.image_id)
    else:
        called = f" as {', '.join(names)}" if names else ""
        put(f"Built {short(image.image_id)}{called}, {format_size(image.size_bytes)}")


def _puller(store: Store, screen: Screen) -> Pull:
    """Give what fetches a base image, and shows it."""

    def pull(name: str, platform: Platform) -> StoredImage:
        reference = Reference.parse(name)
        screen.line(f"    pulling {reference}", "dim")
        return fetch(store, reference, screen, platform=platform)

    return pull


def _refresh(store: Store, screen: Screen, options: BuildOptions) -> None:
    """Fetch the images that the stages begin with, as far as they have changed."""
    try:
        text = options.dockerfile.read_bytes()
    except OSError:  # the build says so
        return
    dockerfile = parse(text, options.dockerfile.name)
    found = plan(
        dockerfile,
        target=options.target,
        arguments=options.arguments,
        platform=options.platform,
    )
    for stage in found.order():
        if stage.origin.kind is Kind.IMAGE:
            pull = _puller(store, screen)
            try:
                pull(stage.origin.image, stage.platform or found.platform)
            except ImageError as error:
                raise stage.begin.place.error(error.message, hint=error.hint) from error


def _write(path: Path, image_id: str) -> None:
    try:
        path.write_text(image_id, "ascii")
    except OSError as error:
        raise ImageError(
            f"{path} cannot be written: {error.strerror}",
            hint=f"the image is built: {short(image_id)}",
        ) from error
