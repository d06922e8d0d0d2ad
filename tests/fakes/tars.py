"""Tar archives byte by byte, so that tests can write what no tool would; and pictures of trees."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from sandbox_kernel.linux.tree_names import MODE, OWNER, recorded_mode, recorded_owner

END = bytes(1024)


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def base256(value: int, width: int) -> bytes:
    data = bytearray(value.to_bytes(width, "big", signed=True))
    data[0] |= 0x80
    return bytes(data)


def header(
    name: bytes | str,
    kind: bytes = b"0",
    *,
    link: bytes | str = b"",
    mode: int = 0o644,
    uid: bytes | int = 0,
    gid: bytes | int = 0,
    size: bytes | int = 0,
    mtime: bytes | int = 1_000_000_000,
    magic: bytes = b"ustar\00000",
    prefix: bytes = b"",
    tail: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    def field(value: bytes | int, width: int) -> bytes:
        return octal(value, width) if isinstance(value, int) else value.ljust(width, b"\0")

    block = bytearray(512)
    block[0:100] = os.fsencode(name)[:100].ljust(100, b"\0")
    block[100:108] = octal(mode, 8)
    block[108:116] = field(uid, 8)
    block[116:124] = field(gid, 8)
    block[124:136] = field(size, 12)
    block[136:148] = field(mtime, 12)
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[157:257] = os.fsencode(link)[:100].ljust(100, b"\0")
    block[257:265] = magic.ljust(8, b"\0")
    block[345:500] = prefix.ljust(155, b"\0")
    if tail:
        block[345 : 345 + len(tail)] = tail
    block[148:156] = checksum if checksum is not None else b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def file(name: bytes | str, data: bytes = b"", **fields: object) -> bytes:
    return header(name, size=len(data), **fields) + padded(data)  # type: ignore[arg-type]


def folder(name: bytes | str, mode: int = 0o755, **fields: object) -> bytes:
    return header(name, b"5", mode=mode, **fields)  # type: ignore[arg-type]


def symlink(name: bytes | str, target: bytes | str) -> bytes:
    return header(name, b"2", link=target, mode=0o777)


def hard_link(name: bytes | str, target: bytes | str) -> bytes:
    return header(name, b"1", link=target)


def record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def raw_pax(data: bytes, kind: bytes = b"x") -> bytes:
    return header("pax", kind, size=len(data)) + padded(data)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    return raw_pax(b"".join(record(key, value) for key, value in records), kind)


def gnu_long(kind: bytes, name: bytes) -> bytes:
    return header("././@LongLink", kind, size=len(name) + 1) + padded(name + b"\0")


class Seen(NamedTuple):
    """What a test can see of one file, records of owner and mode taken at their word."""

    kind: int
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    content: bytes
    xattrs: tuple[tuple[str, bytes], ...]
    links: tuple[bytes, ...]
    """All names of the same file, if there are several."""


def picture(root: Path) -> dict[bytes, Seen]:
    """Look at all below a folder, and the folder itself, whose path is empty."""
    names: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    top = os.fsencode(root)
    paths = [b""]
    for at, folders, files in os.walk(top):
        paths += [os.path.relpath(os.path.join(at, name), top) for name in [*folders, *files]]
    for path in paths:
        info = os.lstat(os.path.join(top, path))
        if not stat.S_ISDIR(info.st_mode):
            names[info.st_dev, info.st_ino].append(path)
    return {path: _seen(os.path.join(top, path), names) for path in sorted(paths)}


def _seen(path: bytes, names: dict[tuple[int, int], list[bytes]]) -> Seen:
    info = os.lstat(path)
    kind, mode, owner = stat.S_IFMT(info.st_mode), stat.S_IMODE(info.st_mode), (0, 0)
    content = b""
    xattrs: dict[str, bytes] = {}
    if kind == stat.S_IFLNK:
        content, mode = os.readlink(path), 0o777
    elif kind in {stat.S_IFREG, stat.S_IFDIR}:
        xattrs = {key: os.getxattr(path, key) for key in os.listxattr(path)}
    if kind == stat.S_IFREG:
        content = Path(os.fsdecode(path)).read_bytes()
    recorded = xattrs.pop(os.fsdecode(OWNER), None)
    if recorded is not None:
        owner = recorded_owner(recorded)
    elif os.geteuid() == 0:
        owner = (info.st_uid, info.st_gid)
    if (recorded := xattrs.pop(os.fsdecode(MODE), None)) is not None:
        mode = recorded_mode(recorded, mode)
    links = names.get((info.st_dev, info.st_ino), [])
    return Seen(
        kind, mode, owner, info.st_mtime_ns, content,
        tuple(sorted(xattrs.items())), tuple(sorted(links)) if len(links) > 1 else (),
    )  # fmt: skip
