"""What is copied, as digests: equal for equal files, whenever and wherever they were made."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sandbox_kernel.build.select import Item, Source

FORMAT = b"copy 1"
"""Changed whenever what goes into the digest changes."""

_CHUNK_BYTES = 1 << 20

Ownership = Callable[[Item], tuple[int, int, int]]
"""Gives permissions, uid and gid that an item will have."""


@dataclass(frozen=True)
class Content:
    """One digest over all, and one for each path, to tell which of them has changed."""

    digest: str
    files: dict[str, str]


def content_of(
    sources: Iterable[Source], ownership: Ownership, *, unpacks: bool | None = False
) -> Content:
    """Hash all that these sources copy; raises BuildError.

    `unpacks` is what happens to archives, which are hashed as they are.

    In it are names, types, permissions, owners, sizes, link targets, file capabilities and
    content; no times, and not the name of a folder whose content is copied.
    """
    total = hashlib.sha256(_fields(FORMAT, repr(unpacks).encode()))
    files: dict[str, str] = {}
    for source in sources:
        name = b"" if source.is_folder else os.fsencode(source.name)
        total.update(_fields(b"folder" if source.is_folder else b"file", name))
        for item in source.items():
            one = _item_digest(source, item, ownership)
            total.update(_fields(os.fsencode(item.target), one))
            files[item.node.path or source.name] = one.hex()
    return Content(f"sha256:{total.hexdigest()}", files)


def _item_digest(source: Source, item: Item, ownership: Ownership) -> bytes:
    node = item.node
    mode, uid, gid = ownership(item)
    kind = stat.S_IFMT(node.mode)
    numbers = b"%o %o %d %d %d" % (kind, mode, uid, gid, node.size_bytes)
    digest = hashlib.sha256(_fields(numbers, os.fsencode(node.link)))
    if node.is_file:
        digest.update(_fields(source.tree.capability(node)))
        fd = source.tree.open(node)
        try:
            while chunk := os.read(fd, _CHUNK_BYTES):
                digest.update(chunk)
        finally:
            os.close(fd)
    return digest.digest()


def _fields(*fields: bytes) -> bytes:
    # With their lengths, so that no two lists of fields look the same.
    return b"".join(b"%d:" % len(one) + one for one in fields)
