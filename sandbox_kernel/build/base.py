"""What a stage begins with: nothing, this machine, an image of the store or of a registry."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from sandbox_kernel.build.layer import Layer
from sandbox_kernel.build.stages import Kind, Origin
from sandbox_kernel.errors import BuildError, ImageError
from sandbox_kernel.image import host
from sandbox_kernel.image.documents import ImageConfig, Platform
from sandbox_kernel.image.image_config import History
from sandbox_kernel.image.media import digest_of
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage

Pull = Callable[[str, Platform], StoredImage]
"""Fetches an image from its registry; raises ImageError."""

PACKAGES = "/usr/local/lib/sandbox-kernel/packages"
"""Where pip puts packages in a build FROM host, whose own folders are read-only."""


@dataclass(frozen=True)
class Base:
    """A stage before its first instruction."""

    key: str
    config: ImageConfig
    layers: tuple[Layer, ...] = ()
    history: tuple[History, ...] = ()
    on_host: bool = False
    """Whether the folders of this machine are shown over the layers."""


def find_base(origin: Origin, store: Store, platform: Platform, pull: Pull | None) -> Base:
    """Give what a stage begins with, from the registry only if it is not in the store.

    Raises ImageError, BuildError for an image of another platform.
    """
    if origin.kind is Kind.SCRATCH:
        return Base("scratch", ImageConfig(platform))
    if origin.kind is Kind.HOST:
        return _host(platform)
    return _of_image(_stored(origin.image, store, platform, pull), platform)


def _stored(name: str, store: Store, platform: Platform, pull: Pull | None) -> StoredImage:
    try:
        return store.resolve(name)
    except ImageError as error:
        if pull is None:
            raise
        try:
            return pull(name, platform)
        except ImageError as failed:
            raise ImageError(
                f"{error.message}, and it cannot be pulled: {failed.message}",
                hint=failed.hint or error.hint,
            ) from failed


def _of_image(image: StoredImage, platform: Platform) -> Base:
    config = image.config
    if not platform.takes(config.platform):
        raise BuildError(
            f"the base image is for {config.platform}, not for {platform}",
            hint="name another tag, or build with --platform",
        )
    blobs = image.manifest.layers
    layers = tuple(Layer(blob, diff) for blob, diff in zip(blobs, config.diff_ids, strict=True))
    on_host = dict(config.labels).get(host.LABEL) == "true"
    return Base(image.image_id, config, layers, config.history, on_host)


def _host(platform: Platform) -> Base:
    image = host.host_image()
    env = {**dict(image.env), "PIP_TARGET": PACKAGES, "PYTHONPATH": PACKAGES}
    del env["HOME"], env["USER"], env["LOGNAME"]
    config = ImageConfig(platform, env=tuple(env.items()), labels=((host.LABEL, "true"),))
    # What it is made of has no digest: the interpreter and the distribution stand for it.
    about = [
        sys.version,
        sys.executable,
        os.uname().machine,
        *(bind.target for bind in image.binds),
    ]
    return Base(digest_of("\0".join(about).encode()), config, on_host=True)
