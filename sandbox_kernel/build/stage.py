"""A stage as it is built: its config, its layers, and where in the cache it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_kernel.build.config import StageState
from sandbox_kernel.build.layer import Layer
from sandbox_kernel.build.run import BUILD_IDS
from sandbox_kernel.image.image_config import History
from sandbox_kernel.image.owned import with_owners
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.view import View, showing
from sandbox_kernel.linux.idmap import Wanted
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
            self._folders.append(self._ensure(layer, self._folders))
        return tuple(self._folders)

    def ensure(self, layer: Layer) -> None:
        """Unpack a layer that is to be put on top. Raises ImageError if it cannot be one."""
        self._ensure(layer, self.folders())

    def _ensure(self, layer: Layer, lowers: Sequence[Path]) -> Path:
        return self.store.ensure_layer(layer.blob, layer.diff_id, lowers=tuple(lowers))

    def view(self) -> View:
        """Give what its layers show together."""
        return View(self.folders())

    def mounted(self) -> Layers:
        """Give its layers as a container takes them, with the owners that it shall see."""
        shown = tuple(map(Path, showing(self.folders())))
        folders = with_owners(self.store, shown, Wanted(0, 0, BUILD_IDS))
        if not folders:
            return Layers("", ())
        above = folders[0].parent.parent
        return Layers(str(above), tuple(str(folder.relative_to(above)) for folder in folders))

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
