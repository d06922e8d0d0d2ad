"""The image that a session runs in, by its name: this machine's, or one of the store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sandbox_kernel.build.agent_download import Progress
from sandbox_kernel.build.agent_image import Unpacked, image_interpreter
from sandbox_kernel.image import host
from sandbox_kernel.image.layer_reader import LayerProgress
from sandbox_kernel.image.layered import cell_account, layered_image, working_dir
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage
from sandbox_kernel.image.view import View
from sandbox_kernel.model import Image, Layers


def _unheard(_: str) -> None:
    """Hear nothing."""


def session_image(
    reference: str,
    tell: Progress = _unheard,
    progress: LayerProgress | None = None,
    waived: frozenset[str] = frozenset(),
) -> Image:
    """Give the plan of an image, unpacked and with its agent; raises ImageError.

    `tell` hears what an agent is made of, `progress` how far the layers are; `waived` are limits
    that this host need not enforce. What the plan names may be pruned until a session has leased
    it.
    """
    if reference == host.REFERENCE:
        return host.host_image()
    with Store.open() as store:
        stored = store.resolve(reference)
        layers = store.session_layers(stored, progress)
        leased = [stored.digest]
        if dict(stored.config.labels).get(host.LABEL) == "true":
            image = _on_host(reference, stored, layers)
        else:
            unpacked = Unpacked(reference, stored, layers)
            interpreter = image_interpreter(store, unpacked, tell, waived)
            if interpreter.agent:
                leased.append(f"sha256:{Path(interpreter.agent).parent.name}")
            image = layered_image(reference, stored.config, layers, interpreter)
        return replace(image, store=str(store.folder), leased=tuple(leased))


def _on_host(reference: str, stored: StoredImage, layers: Layers) -> Image:
    """Give this machine's image with the layers of a build FROM host beneath its folders."""
    machine = host.host_image()
    config = stored.config
    view = View([f"{layers.folder}/{name}" for name in layers.names])
    account = cell_account(view, config.user)
    return replace(
        machine,
        reference=reference,
        layers=layers if layers.names else None,
        env=tuple({**dict(machine.env), **dict(config.env)}.items()),
        working_dir=working_dir(config),
        uid=account.uid,
        gid=account.gid,
    )
