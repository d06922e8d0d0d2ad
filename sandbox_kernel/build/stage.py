"""A stage as it is built: its config, its layers, and where in the cache it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sandbox_kernel.build.config import StageState
from sandbox_kernel.build.layer import Layer
from sandbox_kernel.image.image_config import History
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.store_layers import TREE
from sandbox_kernel.image.view import View, showing
from sandbox_kernel.model import Layers


@dataclass
class StageBuild:
    """One stage after some of its instructions."""

    store: Store
    state: StageState
    key: str
    layers: list[Layer] = field(default_factory=list)
    history: list[History] = field(default_factory=list)
    on_host: bool = False
    _folders: list[Path] = field(default_factory=list)

    def folders(self) -> tuple[Path, ...]:
        """Give the folders of its layers, lowest first, unpacked now if they are not."""
        for layer in self.layers[len(self._folders) :]:
            tree = self.store.ensure_layer(layer.blob, layer.diff_id, lowers=tuple(self._folders))
            self._folders.append(tree)
        return tuple(self._folders)

    def view(self) -> View:
        """Give what its layers show together."""
        return View(self.folders())

    def mounted(self) -> Layers:
        """Give its layers as a container takes them."""
        folders = tuple(map(Path, showing(self.folders())))
        above = str(folders[0].parent.parent) if folders else ""
        return Layers(above, tuple(f"{folder.parent.name}/{TREE}" for folder in folders))

    def add(self, layer: Layer | None, created: str, created_by: str) -> None:
        """Put a layer on top, or note a step that changed no file."""
        if layer is not None:
            self.layers.append(layer)
        self.history.append(History(created, created_by, empty_layer=layer is None))

    def copy(self) -> StageBuild:
        """Give a stage that begins with this one."""
        return StageBuild(
            self.store,
            self.state,
            self.key,
            list(self.layers),
            list(self.history),
            self.on_host,
            list(self._folders),
        )
