"""Write a folder as the tar of a layer, such that the same tree always gives the same bytes.

The folder is an upper of overlayfs or a plain tree, and may be hostile: links are never followed,
special files never opened, all is bounded. It must not change meanwhile. Runs in init too, so it
needs the standard library only. Sources: OCI image-spec layer.md, POSIX.1-2017 pax.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from typing import Protocol

from sandbox_kernel.errors import ImageError
from sandbox_kernel.linux.tree_names import (
    CAPABILITY,
    FOLDER_FLAGS,
    MODE,
    OURS,
    OWNER,
    is_opaque,
    is_whiteout,
    recorded_mode,
    recorded_owner,
)

_BLOCK_BYTES = 512
_CHUNK_BYTES = 1 << 20
_END = bytes(2 * _BLOCK_BYTES)
# name mode uid gid size mtime checksum type linkname magic owners devices prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64s16s155s12x")
_NO_CHECKSUM = b" " * 8
_NO_DEVICE = b"0000000\0" * 2
_WHITEOUT = b".wh."
_OPAQUE_ENTRY = b".wh..wh..opq"
_USER = b"user."
_OVERLAY = b"user.overlay."
_INCOMPLETE = {b"user.overlay.metacopy", b"user.overlay.redirect"}
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DEEPEST = 256
_PATH_BYTES = 4095


class Sink(Protocol):
    """What the tar is written to; `write` takes all of it."""

    def write(self, data: bytes, /) -> object:
        """Write these bytes."""
        ...


@dataclass(frozen=True)
class Packing:
    """What a tar is made by, beside the tree."""

    epoch_s: int
    """Files that are newer get this time, in seconds since 1970 (SOURCE_DATE_EPOCH)."""
    owner: tuple[int, int] | None = None
    """User and group of files that record none; None for those that the file system says.

    An ordinary user's file system can say of all that he made only that it is his: to him None
    means root.
    """
    total_bytes: int = 64 << 30
    """The most that all files together may have, holes counted."""
    entries: int = 1_000_000


@dataclass(frozen=True)
class Packed:
    """What went into a tar."""

    entries: int
    bytes: int
    """Sum of the sizes of the files."""
    skipped_sockets: int


class _Record:
    """What one header says."""

    __slots__ = ("gid", "kind", "link", "mode", "mtime_s", "size", "uid", "xattrs")

    def __init__(self, kind: bytes, mode: int = 0) -> None:
        self.kind = kind
        self.mode = mode
        self.uid = self.gid = self.size = self.mtime_s = 0
        self.link = b""
        self.xattrs: dict[bytes, bytes] = {}


def pack(folder: str | os.PathLike[str] | int, out: Sink, packing: Packing) -> Packed:
    """Write the tree below `folder`, a path or an open folder, as a tar.

    Raises ImageError with the path for what a layer cannot hold, OSError for what cannot be read.
    """
    # Opened anew, so that the caller's descriptor keeps its position in the list of names.
    path, dir_fd = (".", folder) if isinstance(folder, int) else (folder, None)
    fd = os.open(path, FOLDER_FLAGS, dir_fd=dir_fd)
    try:
        writer = _Writer(out, packing)
        writer.write_root(fd)
        out.write(_END)
    finally:
        os.close(fd)
    return Packed(writer.entries, writer.bytes, writer.skipped_sockets)


class _Writer:
    """Walks the tree in the order of names and writes an entry for each of them."""

    def __init__(self, out: Sink, packing: Packing) -> None:
        self._out = out
        self._packing = packing
        self._owner = packing.owner or ((0, 0) if os.geteuid() else None)
        self._linked: dict[tuple[int, int], tuple[bytes, _Record]] = {}
        self.entries = self.bytes = self.skipped_sockets = 0

    def write_root(self, fd: int) -> None:
        """Write the tree; the root itself only if there is something to say of it."""
        record = self._record(fd, b"5", os.fstat(fd), b"./")
        if (record.mode, record.uid, record.gid) != (0o755, 0, 0) or record.xattrs:
            self._put(b"./", record)
        self._write_children(fd, b"", 0)

    def _write_children(self, fd: int, prefix: bytes, depth: int) -> None:
        if depth >= _DEEPEST:
            raise _refused(prefix, f"it is more than {_DEEPEST} folders deep")
        names = sorted(map(os.fsencode, os.listdir(fd)))
        infos = {name: os.stat(name, dir_fd=fd, follow_symlinks=False) for name in names}
        # Whiteouts come before what is new, as the specification asks of those who write.
        if is_opaque(fd):
            self._put(prefix + _OPAQUE_ENTRY, self._whiteout())
        for name in names:
            if name.startswith(_WHITEOUT):
                raise _refused(prefix + name, "a layer cannot hold names that begin with .wh.")
            if is_whiteout(infos[name]):
                self._put(prefix + _WHITEOUT + name, self._whiteout())
        for name in names:
            if not is_whiteout(infos[name]):
                self._write(fd, name, infos.pop(name), prefix, depth)

    def _write(
        self, folder: int, name: bytes, info: os.stat_result, prefix: bytes, depth: int
    ) -> None:
        path = prefix + name
        if len(path) > _PATH_BYTES:
            raise _refused(path, f"its path is longer than {_PATH_BYTES} bytes")
        kind = stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFDIR:
            fd = os.open(name, FOLDER_FLAGS, dir_fd=folder)
            try:
                self._put(path + b"/", self._record(fd, b"5", info, path))
                self._write_children(fd, path + b"/", depth + 1)
            finally:
                os.close(fd)
        elif kind == stat.S_IFSOCK:
            self.skipped_sockets += 1  # as Docker does: nobody listens any more
        elif (first := self._linked.get((info.st_dev, info.st_ino))) is not None:
            self._put(path, _link_to(*first))
        elif kind == stat.S_IFREG:
            self._write_file(folder, name, info, path)
        elif kind == stat.S_IFLNK:
            record = self._record(None, b"2", info, path)
            record.link = os.readlink(name, dir_fd=folder)
            self._put(path, record)
        elif kind == stat.S_IFIFO:
            self._put(path, self._record(None, b"6", info, path))
        else:
            raise _refused(path, "it is a device node, and a container makes its own")

    def _write_file(self, folder: int, name: bytes, info: os.stat_result, path: bytes) -> None:
        fd = os.open(name, _FILE_FLAGS, dir_fd=folder)
        try:
            now = os.fstat(fd)
            if (now.st_dev, now.st_ino) != (info.st_dev, info.st_ino):
                raise _refused(path, "it changed while it was read")
            record = self._record(fd, b"0", info, path)
            record.size = info.st_size
            self.bytes += record.size
            if self.bytes > self._packing.total_bytes:
                raise _refused(
                    path, f"the files have more than {self._packing.total_bytes} bytes together"
                )
            header = self._header(path, record)
            self._copy(fd, record.size, path, header)
        finally:
            os.close(fd)

    def _copy(self, fd: int, size: int, path: bytes, header: bytes) -> None:
        """Write header, data and padding; a small file in one piece."""
        padding = bytes(-size % _BLOCK_BYTES)
        if size == 0:
            self._out.write(header)
            return
        while size:
            data = os.read(fd, min(size, _CHUNK_BYTES))
            if not data:
                raise _refused(path, "it became shorter while it was read")
            size -= len(data)
            self._out.write(header + data if size else header + data + padding)
            header = b""

    def _put(self, path: bytes, record: _Record) -> None:
        self._out.write(self._header(path, record))

    def _whiteout(self) -> _Record:
        record = _Record(b"0")
        record.mtime_s = self._packing.epoch_s
        return record

    def _record(self, fd: int | None, kind: bytes, info: os.stat_result, path: bytes) -> _Record:
        """Collect what is to be said of a file; `fd` is None where it cannot be opened."""
        # Linux has no permissions of symbolic links; Docker writes this too.
        record = _Record(kind, 0o777 if kind == b"2" else stat.S_IMODE(info.st_mode))
        record.uid, record.gid = self._owner or (info.st_uid, info.st_gid)
        record.mtime_s = max(0, min(int(info.st_mtime), self._packing.epoch_s))
        if info.st_nlink > 1 and kind != b"5":
            self._linked[info.st_dev, info.st_ino] = (path, record)
        if fd is not None:
            _take_attributes(fd, record, path)
            if self._owner is None:
                # Whoever recorded the owner left the file root's. Another one was given to it
                # since, in a container that was shown the file with its record.
                record.uid, record.gid = info.st_uid or record.uid, info.st_gid or record.gid
        return record

    def _header(self, path: bytes, record: _Record) -> bytes:
        self.entries += 1
        if self.entries > self._packing.entries:
            raise _refused(path, f"the layer has more than {self._packing.entries} entries")
        return _header_of(path, record)


def _take_attributes(fd: int, record: _Record, path: bytes) -> None:
    """Put the extended attributes of an open file into its record; raises ImageError."""
    for key in sorted(map(os.fsencode, _listxattr(fd))):
        if key == OWNER:
            try:
                record.uid, record.gid = recorded_owner(os.getxattr(fd, key))
            except ValueError as error:
                raise _refused(path, f"its recorded owner {error}") from None
        elif key == MODE:
            record.mode = recorded_mode(os.getxattr(fd, key), record.mode)
        elif key in _INCOMPLETE:
            raise _refused(path, f"its data is in another layer ({key.decode()})")
        elif key.startswith((_OVERLAY, OURS)):
            continue
        elif b"=" in key:
            raise _refused(path, f"the name of its attribute {key!a} has a = in it")
        elif key.startswith(_USER) or key == CAPABILITY:
            record.xattrs[key] = os.getxattr(fd, key)


def _link_to(path: bytes, first: _Record) -> _Record:
    """Give the record of one more name of a file that was written as `path`."""
    record = _Record(b"1", first.mode)
    record.uid, record.gid, record.mtime_s = first.uid, first.gid, first.mtime_s
    record.link = path
    return record


def _listxattr(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError:  # a file system without attributes
        return []


def _header_of(path: bytes, record: _Record) -> bytes:
    """Give the header of an entry, with a PAX header before it for what has no room in it."""
    extra = {b"SCHILY.xattr." + key: value for key, value in record.xattrs.items()}
    prefix, name = _split(path)
    if len(name) > 100:
        extra[b"path"] = path
        prefix, name = b"", name[:100]
    link = record.link
    if len(link) > 100:
        extra[b"linkpath"] = link
        link = link[:100]
    uid = _number(record.uid, 7, b"uid", extra)
    gid = _number(record.gid, 7, b"gid", extra)
    size = _number(record.size, 11, b"size", extra)
    mtime = _number(record.mtime_s, 11, b"mtime", extra)
    mode = b"%07o\0" % record.mode
    header = _block(name, mode, uid, gid, size, mtime, record.kind, link, prefix)
    return _pax_header(path, extra) + header if extra else header


def _split(path: bytes) -> tuple[bytes, bytes]:
    """Split a long path between prefix and name as ustar does, if it has a fitting slash."""
    if len(path) <= 100:
        return b"", path
    # The name must not be empty, so the slash at the end of a folder's does not count.
    slash = path.rfind(b"/", 0, min(156, len(path) - 1))
    if slash < 1 or len(path) - slash - 1 > 100:
        return b"", path
    return path[:slash], path[slash + 1 :]


def _number(value: int, digits: int, key: bytes, extra: dict[bytes, bytes]) -> bytes:
    """Give a number as octal digits; what has no room goes into a PAX record."""
    if value < 1 << (3 * digits):
        return b"%0*o\0" % (digits, value)
    extra[key] = b"%d" % value
    return b"0" * digits + b"\0"


def _block(  # noqa: PLR0913, PLR0917 - the fields of a header, in its order
    name: bytes, mode: bytes, uid: bytes, gid: bytes, size: bytes, mtime: bytes,
    kind: bytes, link: bytes, prefix: bytes,
) -> bytes:  # fmt: skip
    def packed(checksum: bytes) -> bytes:
        return _HEADER.pack(
            name, mode, uid, gid, size, mtime, checksum, kind, link, b"ustar\00000", b"",
            _NO_DEVICE, prefix,
        )  # fmt: skip

    return packed(b"%06o\0 " % sum(packed(_NO_CHECKSUM)))


def _pax_header(path: bytes, extra: dict[bytes, bytes]) -> bytes:
    try:
        for value in (path, extra.get(b"linkpath", b"")):
            value.decode()
    except UnicodeDecodeError:
        extra[b"hdrcharset"] = b"BINARY"
    # hdrcharset counts for the records behind it.
    keys = sorted(extra, key=lambda key: (key != b"hdrcharset", key))
    data = b"".join(_pax_record(key, extra[key]) for key in keys)
    size = b"%011o\0" % len(data)
    name = b"PaxHeaders.0/" + path.rstrip(b"/").rpartition(b"/")[2][:80]
    zero = b"0000000\0"
    header = _block(name, b"0000644\0", zero, zero, size, b"0" * 11 + b"\0", b"x", b"", b"")
    return header + data + bytes(-len(data) % _BLOCK_BYTES)


def _pax_record(key: bytes, value: bytes) -> bytes:
    """Give `LENGTH KEY=VALUE`; the length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _refused(path: bytes, reason: str) -> ImageError:
    shown = ascii(path.decode("utf-8", "backslashreplace"))
    shown = shown if len(shown) <= 200 else f"{shown[:100]}...{shown[-90:]}"
    return ImageError(f"{shown} cannot be in a layer: {reason}")
