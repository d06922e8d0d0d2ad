"""The layers of a session: which cells' files are under the next cell, newest first.

Cell N writes into its own upper folder, `/s/N`. Committed, that becomes a lower layer of every
later cell; rolled back, it is removed and nothing else changes. A committed cell that wrote no
file adds no layer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any

from sandbox_kernel.container import build, plan, squash

Chains = tuple[tuple[int, ...], tuple[int, ...]]
"""Layers of the root and of /workspace, newest first."""


class Layers:
    """The chain of committed layers, and the spec of the root that comes next."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._targets = tuple(path for path, _ in body["targets"] if path in set(body["bound"]))
        self._image_layers = len(body["layers"])
        self._cell = (body["cell_uid"], body["cell_gid"])
        self._tmpfs = tuple((path, size_bytes) for path, size_bytes in body["tmpfs"])
        self._mode = body["workspace_mode"] if body["workspace"] else "none"
        self._root: tuple[int, ...] = ()
        self._workspace: tuple[int, ...] = ()
        masked = [name for name in plan.MASKED if os.path.lexists(f"/p/{name}")]
        self._masked_folders = tuple(n for n in masked if os.path.isdir(f"/p/{n}"))
        self._masked_files = tuple(n for n in masked if n not in self._masked_folders)
        self._read_only = tuple(n for n in plan.READ_ONLY if os.path.lexists(f"/p/{n}"))

    def next_root(self, layer: int) -> plan.RootSpec:
        """Give what the root of cell `layer` is made of, as of now."""
        return plan.RootSpec(
            layer=layer,
            root_layers=self._root,
            workspace_layers=self._workspace,
            image_layers=self._image_layers,
            cell=self._cell,
            binds=self._targets,
            workspace_mode=self._mode,
            masked_files=self._masked_files,
            masked_folders=self._masked_folders,
            read_only=self._read_only,
            tmpfs=self._tmpfs,
        )

    def commit(self, layer: int) -> bool:
        """Put a cell's files on top; return whether it changed any."""
        root, workspace = _has_entries(f"/s/{layer}/u"), _has_entries(f"/s/{layer}/x")
        if root:
            self._root = (layer, *self._root)
        if workspace:
            self._workspace = (layer, *self._workspace)
        return root or workspace

    @property
    def depth(self) -> int:
        """How many layers the root or /workspace has, whichever has more."""
        return max(len(self._root), len(self._workspace))

    def chains(self) -> Chains:
        """Give the layers of the root and of /workspace as of now, newest first."""
        return self._root, self._workspace

    def merge(self, layer: int, chains: Chains) -> None:
        """Write into the folders of `layer` what these chains show."""
        build.make_layer(layer, self._cell)
        squash.squash([f"/s/{n}/u" for n in chains[0]], f"/s/{layer}/u")
        squash.squash([f"/s/{n}/x" for n in chains[1]], f"/s/{layer}/x")

    def replace(self, layer: int, chains: Chains) -> list[int]:
        """Put a merged layer in the place of the chains it was made of; give what is obsolete."""
        root, workspace = chains
        self._root = (*self._root[: len(self._root) - len(root)], layer)
        self._workspace = (*self._workspace[: len(self._workspace) - len(workspace)], layer)
        return sorted({*root, *workspace})

    def remove_empty(self, layer: int) -> bool:
        """Remove the folders of a cell that wrote no file; tell whether it was such a one."""
        try:
            for name in (
                "u",
                "x",
                "w/work/incompat/volatile",
                "w/work/incompat",
                "w/work",
                "w",
                "y/work/incompat/volatile",
                "y/work/incompat",
                "y/work",
                "y",
                "",
            ):
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(f"/s/{layer}/{name}")
        except OSError:  # ENOTEMPTY
            return False
        return True

    def remove(self, layer: int) -> None:
        """Remove a cell's files for good; what cannot be removed goes with the session."""
        shutil.rmtree(f"/s/{layer}", ignore_errors=True)

    def used_bytes(self) -> int:
        """Give how much of the scratch file system is in use."""
        info = os.statvfs("/s")
        return (info.f_blocks - info.f_bfree) * info.f_frsize


def _has_entries(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(True for _ in entries)
