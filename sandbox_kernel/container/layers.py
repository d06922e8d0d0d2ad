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

_WORK = ("work/incompat/volatile", "work/incompat", "work", "")
EMPTY_FOLDERS = ("u", "x", *(f"{top}/{name}" for top in "wy" for name in _WORK), "")
"""All that the layer of a cell consists of which wrote nothing, each after what is in it."""


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

    def forget(self, layer: int) -> None:
        """Take the newest layer away again, where it is this one: its cell is rolled back late."""
        self._root = self._root[1:] if self._root[:1] == (layer,) else self._root
        if self._workspace[:1] == (layer,):
            self._workspace = self._workspace[1:]

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
        if not (_ends_with(self._root, root) and _ends_with(self._workspace, workspace)):
            return [layer]  # one of them was forgotten meanwhile
        self._root = (*self._root[: len(self._root) - len(root)], layer)
        self._workspace = (*self._workspace[: len(self._workspace) - len(workspace)], layer)
        return sorted({*root, *workspace})

    def remove_empty(self, layer: int) -> bool:
        """Remove the folders of a cell that wrote no file; tell whether it was such a one."""
        try:
            for overlay in ("w", "y"):
                # What a volatile overlay leaves (Documentation/filesystems/overlayfs.rst).
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"/s/{layer}/{overlay}/work/incompat/volatile/dirty")
            for name in EMPTY_FOLDERS:
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


def _ends_with(chain: tuple[int, ...], end: tuple[int, ...]) -> bool:
    return len(end) <= len(chain) and chain[len(chain) - len(end) :] == end


def _has_entries(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(True for _ in entries)
