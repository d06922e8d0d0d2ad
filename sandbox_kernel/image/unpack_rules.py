"""What a layer may hold: bounds, names and types, and the refusals that name entry and reason.

Entries are spoken of by their names in the tar, as bytes, since these need not be UTF-8.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sandbox_kernel.errors import ImageError

WHITEOUT = b".wh."
"""Prefix of an entry that removes a name of the layers below (OCI image-spec, layer.md)."""
OPAQUE = b".wh..wh..opq"
"""Entry that removes all that the layers below have in its folder."""
_AUFS = b".wh..wh."
_NAME_BYTES = 255  # NAME_MAX


class Owners(str, Enum):
    """How the owner of an entry is kept on disk."""

    REAL = "real"
    """Files belong to whom the tar says, and have their setuid bits: for root."""
    RECORDED = "recorded"
    """Files belong to who unpacks, and an attribute says what the tar says: for all others."""


@dataclass(frozen=True)
class Bounds:
    """How much one layer may be; what goes beyond is refused."""

    entries: int = 1_000_000
    total_bytes: int = 64 << 30
    """Of the tar, and of the files it makes, the holes of sparse files counted."""
    depth: int = 256
    path_bytes: int = 4095
    header_bytes: int = 1 << 20
    """Of one PAX header, long name or map of a sparse file."""
    memory_bytes: int = 2 << 30
    """Address space of the process that unpacks."""


@dataclass(frozen=True)
class Unpacked:
    """What came out of a layer, and what was left out of it."""

    entries: int
    bytes: int
    """Sum of the sizes of its files."""
    needs_lowers: bool = False
    """Whether it leans on the layers below: a folder without an entry, a link to their files.

    What is unpacked then depends on these layers, not on this one alone.
    """
    opaque_root: bool = False
    """Whether it hides all of the layers below; overlayfs does not look for that on a root."""
    dropped_xattrs: int = 0
    skipped_devices: int = 0


def refused(name: bytes, reason: str, *, hint: str = "") -> ImageError:
    """Give the error for an entry."""
    return ImageError(f"layer entry {shown(name)} is refused: {reason}", hint=hint)


def shown(name: bytes) -> str:
    """Give a name as printable text of bounded length, whatever is in it."""
    text = ascii(name.decode("utf-8", "backslashreplace"))
    return text if len(text) <= 200 else f"{text[:100]}...{text[-90:]}"


def checked_path(name: bytes, bounds: Bounds, *, what: str = "name") -> bytes:
    """Give the path without `.` and doubled slashes, empty for the root itself.

    Raises ImageError for a path that is absolute, climbs, or is too long or too deep.
    """
    if b"//" not in name and b"." not in name and name and name[0] != 47:
        path = name.rstrip(b"/")
        parts = path.split(b"/")
    else:
        if name.startswith(b"/"):
            raise refused(name, f"its {what} is absolute")
        if not name:
            raise refused(name, f"its {what} is empty")
        parts = [part for part in name.split(b"/") if part not in {b"", b"."}]
        if b".." in parts:
            raise refused(name, f"its {what} climbs by '..'")
        path = b"/".join(parts)
    if b"\0" in path:
        raise refused(name, f"its {what} has a NUL byte in it")
    if len(path) > bounds.path_bytes or len(parts) > bounds.depth:
        raise refused(
            name, f"its {what} is longer than {bounds.path_bytes} bytes or {bounds.depth} folders"
        )
    if len(path) > _NAME_BYTES and max(map(len, parts)) > _NAME_BYTES:
        raise refused(name, f"its {what} has a part of more than {_NAME_BYTES} bytes")
    return path


def check_symlink(name: bytes, path: bytes, target: bytes, bounds: Bounds) -> None:
    """Refuse a symbolic link that is empty, too long, or climbs above the root.

    An absolute target is fine: it counts from the root of the container.
    """
    if not target or b"\0" in target or len(target) > bounds.path_bytes:
        raise refused(name, "its link target is empty or too long or has a NUL byte in it")
    if b".." not in target or target.startswith(b"/"):
        return
    depth = path.count(b"/")
    for part in target.split(b"/"):
        if part == b"..":
            depth -= 1
        elif part not in {b"", b"."}:
            depth += 1
        if depth < 0:
            raise refused(name, f"its link target {shown(target)} leads out of the image")


def whiteout_of(name: bytes, path: bytes) -> tuple[str, bytes]:
    """Tell what an entry with `.wh.` in its path means: a word and the path it is about.

    `opaque` and `hidden` are about a path, `skip` is what aufs left behind, `plain` is no whiteout.
    Raises ImageError for whiteouts that name nothing.
    """
    folder, slash, last = path.rpartition(b"/")
    if path.startswith(_AUFS) and path != OPAQUE:
        return "skip", b""
    if any(part.startswith(WHITEOUT) for part in folder.split(b"/")):
        raise refused(name, "it lies below a whiteout")
    if not last.startswith(WHITEOUT):
        return "plain", path
    if last == OPAQUE:
        return "opaque", folder
    hidden = last[len(WHITEOUT) :]
    if hidden in {b"", b".", b".."} or hidden.startswith(WHITEOUT):
        raise refused(name, "it is a whiteout that names no file")
    return "hidden", folder + slash + hidden
