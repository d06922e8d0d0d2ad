"""ADD of a local archive: told by its content, and unpacked like a layer."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_kernel.build.select import Source
from sandbox_kernel.build.tree import LayerTree, Node, Tree
from sandbox_kernel.errors import BuildError, ImageError
from sandbox_kernel.image.compression import open_decompressed
from sandbox_kernel.image.unpack import unpack
from sandbox_kernel.image.view import View

_BLOCK_BYTES = 512
_CHECKSUM = slice(148, 156)


def is_archive(tree: Tree, node: Node) -> bool:
    """Tell whether a file is a tar, compressed or not; raises BuildError if it cannot be read."""
    if not node.is_file or node.size_bytes == 0:
        return False
    with os.fdopen(tree.open(node), "rb") as file:
        try:
            stream = open_decompressed(file)
            block = b""
            while len(block) < _BLOCK_BYTES and (data := stream.read(_BLOCK_BYTES)):
                block += data
        except ImageError:
            return False
    return _is_header(block[:_BLOCK_BYTES])


def _is_header(block: bytes) -> bool:
    """Tell whether this is the first block of a tar, by its checksum (pax(1))."""
    if len(block) < _BLOCK_BYTES or not block.strip(b"\0"):
        return False
    field = block[_CHECKSUM].strip(b" \0")
    if not field or field.strip(b"01234567"):
        return False
    # The checksum counts its own field as blanks.
    return int(field, 8) == sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")


def unpacked(source: Source, folder: Path) -> Source:
    """Unpack an archive into an empty folder, and give its content as source; raises BuildError."""
    try:
        with os.fdopen(source.tree.open(source.node), "rb") as file:
            unpack(open_decompressed(file), folder)
        tree = LayerTree(View([folder]), f"the archive {source.name}")
        root = tree.find("/")
    except ImageError as error:
        raise BuildError(
            f"{source.node.path}: {error.message}",
            hint=error.hint or "use COPY, or ADD --unpack=false, to copy it as it is",
        ) from error
    if root is None:
        raise BuildError(f"{source.node.path} holds nothing", hint="use COPY to copy it as it is")
    return Source(tree, source.name, root, source.excludes)
