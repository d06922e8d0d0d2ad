"""Unpacked layers of the store: each once, by DiffID, shared read-only by all who use it.

A layer that holds a hard link to a file of a layer below depends on what is below; it lies under
its ChainID instead.

An unpacked tree has many files, and to flush each takes longer than to unpack it. So a layer is
kept as `unsettled`, with the boot in which it was made, until `settle` has flushed them all: if
the machine lost power before, the layer is unpacked again.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import Descriptor, chain_id, render_json
from sandbox_kernel.image.fields import Fields, parse_object
from sandbox_kernel.image.layer_reader import Counted, LayerProgress, unpack_blob
from sandbox_kernel.image.media import check_digest, hex_of
from sandbox_kernel.image.owned_record import FOLDER as OWNED
from sandbox_kernel.image.owned_record import RECORD as OWNED_RECORD
from sandbox_kernel.image.owned_record import OwnedRecord, read_record
from sandbox_kernel.image.store_blobs import Blobs
from sandbox_kernel.image.store_files import (
    FOLDER_MODE,
    Staging,
    discard,
    remove,
    take_away,
    write_whole,
)
from sandbox_kernel.image.store_locks import Locks

TREE = "fs"
RECORD = "layer.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class UnpackedLayer:
    """What is known of a layer folder; `size_bytes` is what its files hold."""

    layer_id: str
    diff_id: str
    blob: str
    size_bytes: int
    boot: str
    settled: bool


class LayerFolders:
    """The unpacked layers below one folder."""

    def __init__(self, folder: Path, blobs: Blobs, locks: Locks, staging: Staging) -> None:
        self.folder = folder
        self._blobs = blobs
        self._locks = locks
        self._staging = staging

    def tree(self, layer_id: str) -> Path:
        """Give the folder with the files of a layer, whether it is there or not."""
        return self.folder / hex_of(layer_id) / TREE

    def get(self, layer_id: str) -> UnpackedLayer | None:
        """Give what is known of a layer, None if it is not there or not to be trusted."""
        path = self.folder / hex_of(layer_id) / RECORD
        try:
            fields = Fields(parse_object(path.read_bytes(), str(path)), str(path))
            found = UnpackedLayer(
                layer_id=layer_id,
                diff_id=check_digest(fields.text("diff_id")),
                blob=check_digest(fields.text("blob")),
                size_bytes=fields.size("size"),
                boot=fields.text("boot"),
                settled=fields.flag("settled"),
            )
        except (FileNotFoundError, ImageError):
            return None
        return found if found.settled or found.boot == boot_id() else None

    def ensure(
        self,
        blob: Descriptor,
        diff_id: str,
        lowers: Sequence[UnpackedLayer] = (),
        progress: LayerProgress | None = None,
    ) -> UnpackedLayer:
        """Give a layer, and unpack it if it is not there.

        `lowers` are the layers below, the lowest first. If another process is at the same layer,
        its result is waited for and taken. Raises ImageError.
        """
        names = names_of(diff_id, lowers)
        self._blobs.claim(*names)
        found = self._first(names)
        if found is not None:
            return found
        with self._locks.held(f"layer-{hex_of(diff_id)}"):
            found = self._first(names)
            if found is None:
                return self._unpack(blob, names, lowers, progress)
        if progress is not None:
            progress.finished(blob.digest, "shared")
        return found

    def _first(self, names: Sequence[str]) -> UnpackedLayer | None:
        return next((found for name in names if (found := self.get(name)) is not None), None)

    def _unpack(
        self,
        blob: Descriptor,
        names: tuple[str, str],
        lowers: Sequence[UnpackedLayer],
        progress: LayerProgress | None,
    ) -> UnpackedLayer:
        draft = self._staging.path()
        tree = draft / TREE
        draft.mkdir(FOLDER_MODE)
        try:
            tree.mkdir()
            tree.chmod(0o755)  # whatever the umask
            with self._blobs.open(blob.digest) as file:
                below = [self.tree(lower.layer_id) for lower in lowers]
                counted = Counted(file, blob, progress)
                read = unpack_blob(counted, blob, names[0], tree, below)
            name = names[1] if read.needs_lowers else names[0]
            layer = UnpackedLayer(name, names[0], blob.digest, read.bytes, boot_id(), False)
            self._write_record(draft, layer, durable=False)
            # What lies there cannot be trusted, see `get`.
            discard(self.folder / hex_of(name), self._staging)
            os.rename(draft, self.folder / hex_of(name))
        except BaseException:  # also an interrupt: the draft goes
            if draft.exists():
                remove(draft)
            raise
        counted.finished("unpacked")
        return layer

    def settle(self) -> None:
        """Flush all layers of this boot to the disk, so that they outlast a loss of power."""
        found = [layer for layer in self.all() if not layer.settled]
        owned = {name: one for name in self.names() if (one := self.owned(name)) is not None}
        owned = {name: one for name, one in owned.items() if not one.settled}
        if not found and not owned:
            return
        # syncfs(2) by coreutils; os.sync waits for the disks of everybody else too.
        subprocess.run(["sync", "--file-system", str(self.folder)], check=True)
        for layer in found:
            self._blobs.claim(layer.layer_id)
            if self.get(layer.layer_id) is None:
                continue
            folder = self.folder / hex_of(layer.layer_id)
            self._write_record(folder, replace(layer, settled=True), durable=True)
        for name, record in owned.items():
            self._settle_owned(name, record)

    def _settle_owned(self, layer_id: str, flushed: OwnedRecord) -> None:
        self._blobs.claim(layer_id)
        folder = self.folder / hex_of(layer_id)
        with self._locks.held(f"owned-{folder.name}"):
            if read_record(folder, boot_id()) == flushed:
                data = replace(flushed, settled=True).render()
                write_whole(folder / OWNED / OWNED_RECORD, data, self._staging)

    def owned(self, layer_id: str) -> OwnedRecord | None:
        """Give what is known of a layer's owned folder, None if it has none; see `owned`."""
        return read_record(self.folder / hex_of(layer_id), boot_id())

    def take_away(self, layer_id: str) -> Path | None:
        """Move a layer that nobody uses to staging, for removal; None if it is missing."""
        return take_away(self.folder / hex_of(layer_id), self._staging)

    def names(self) -> tuple[str, ...]:
        """Give the IDs of all layer folders, also of those that are not to be trusted."""
        return tuple(f"sha256:{name}" for name in sorted(os.listdir(self.folder)))

    def all(self) -> tuple[UnpackedLayer, ...]:
        """Give all layers that can be used."""
        return tuple(found for name in self.names() if (found := self.get(name)) is not None)

    def _write_record(self, folder: Path, layer: UnpackedLayer, *, durable: bool) -> None:
        record = render_json(
            {
                "diff_id": layer.diff_id,
                "blob": layer.blob,
                "size": layer.size_bytes,
                "boot": layer.boot,
                "settled": layer.settled,
            }
        )
        write_whole(folder / RECORD, record, self._staging, durable=durable)


def names_of(diff_id: str, lowers: Sequence[UnpackedLayer]) -> tuple[str, str]:
    """Give the two IDs that a layer may have: its DiffID, and its ChainID."""
    return diff_id, chain_id([*(lower.diff_id for lower in lowers), diff_id])


def boot_id() -> str:
    """Give what names this run of the machine, with which goes what is not on the disk yet."""
    return _BOOT.read_text("ascii").strip()
