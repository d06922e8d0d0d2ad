"""Owners of a layer as an ordinary user's build containers shall see them.

His layers are all his own, and record the owners that he could not set. In a container with his
subordinate ids they all look like root's. So each layer gets a second folder, made once, with what
belongs to others than root, owned by these ids for real; it is stacked right above the layer.
Cells of a session do not see it: there the image looks like the cell's own.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sandbox_kernel.errors import HostError, ImageError
from sandbox_kernel.image.owned_record import FOLDER, RECORD, OwnedRecord, read_record, words_of
from sandbox_kernel.image.owned_space import perform
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.store_files import FOLDER_MODE
from sandbox_kernel.image.store_layers import TREE, boot_id
from sandbox_kernel.linux import idmap
from sandbox_kernel.linux.cgroup import CgroupTree, session_name
from sandbox_kernel.linux.idmap import IdMap, Wanted
from sandbox_kernel.linux.tree_names import FOLDER_FLAGS, OWNER

_ROOT = b"0:0"


def with_owners(store: Store, trees: Sequence[Path], wanted: Wanted) -> tuple[Path, ...]:
    """Give the folders to stack for layers of the store, lowest first.

    `wanted` are the ids of the containers that will see them. Raises ImageError, and HostError
    where there can be no container at all.
    """
    ids = usable_ids(wanted)
    if ids is None:
        return tuple(trees)
    found: list[Path] = []
    for tree in trees:
        owned = owned_tree(store, tree, ids)
        found += [tree] if owned is None else [tree, owned]
    return tuple(found)


@functools.cache
def usable_ids(wanted: Wanted) -> IdMap | None:
    """Give the ids that this user's containers have beside his own; None where they have none.

    Found out by trying, as a container does it, once for the process. Root needs none: his layers
    have real owners. Raises HostError where there can be no container at all.
    """
    if os.geteuid() == 0:
        return None
    try:
        ids = idmap.find_subordinate(os.geteuid(), os.getegid(), wanted)
    except HostError:
        return None
    # On cgroup v1 a container of an ordinary user has one id, whatever ranges he has.
    with CgroupTree.acquire().session(session_name(f"ids-{secrets.token_hex(6)}")) as cgroup:
        if not cgroup.takes_other_users:
            return None
    try:
        perform({"do": "nothing"}, ids)
    except ImageError:
        return None
    return ids


def owned_tree(store: Store, tree: Path, ids: IdMap) -> Path | None:
    """Give the folder with what of a layer is not root's, made if it is not there.

    None if all of the layer is root's. The caller's store object has the layer leased. Raises
    ImageError.
    """
    layer = tree.parent
    found = read_record(layer, boot_id())
    if found is None or not found.fits(ids):
        with store.locked(f"owned-{layer.name}"):
            found = read_record(layer, boot_id())
            if found is None or not found.fits(ids):
                found = _make(store, layer, ids)
    return layer / FOLDER / TREE if found.entries else None


def _make(store: Store, layer: Path, ids: IdMap) -> OwnedRecord:
    made = OwnedRecord("", 0, 0, boot_id(), settled=False)
    with store.scratch() as draft:
        draft.mkdir(FOLDER_MODE)
        if _has_owners(layer / TREE):
            entries, size_bytes = _copy(layer / TREE, draft / TREE, ids)
            made = replace(made, ids=words_of(ids), entries=entries, size_bytes=size_bytes)
        (draft / RECORD).write_bytes(made.render())
        _take_old_away(store, layer)
        os.rename(draft, layer / FOLDER)
    return made


def _copy(tree: Path, target: Path, ids: IdMap) -> tuple[int, int]:
    target.mkdir(0o755)
    with contextlib.ExitStack() as stack:
        fds = []
        for folder in (tree, target):
            fds.append(os.open(folder, FOLDER_FLAGS))
            stack.callback(os.close, fds[-1])
        order = {"do": "copy", "source_fd": fds[0], "target_fd": fds[1]}
        try:
            counted = perform(order, ids, *fds)
        except ImageError as error:
            raise ImageError(
                f"the owners in the layer {tree.parent.name[:12]} cannot be set: {error.message}",
                hint=error.hint,
            ) from error
    return counted["entries"], counted["size_bytes"]


def _take_old_away(store: Store, layer: Path) -> None:
    """Remove a folder that was made for other ids, or in part lost with the machine's power."""
    # If it belongs to ids that are the user's no more, what is left of it waits in staging.
    with contextlib.suppress(FileNotFoundError, ImageError), store.scratch() as gone:
        os.rename(layer / FOLDER, gone)


def _has_owners(tree: Path) -> bool:
    """Tell whether a layer records an owner other than root, or may: what cannot be read counts."""
    try:
        return any(_owner(path) not in (b"", _ROOT) for path in _files_and_folders(str(tree)))
    except OSError:
        return True


def _owner(path: str) -> bytes:
    try:
        return os.getxattr(path, OWNER, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return b""


def _files_and_folders(tree: str) -> Iterator[str]:
    waiting = [tree]
    while waiting:
        folder = waiting.pop()
        yield folder
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry.path
