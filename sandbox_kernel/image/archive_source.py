"""Where an archive's parts lie: in a folder, or in a tar that is read in place.

Nothing is extracted: a part is looked up by its name and read as a stream. Names that lead out,
links that lead out, and names that stand there twice are refused.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.fields import MAX_DOCUMENT_BYTES

MAX_MEMBERS = 100_000
"""No archive of images has as many; a root file system that has more is known to be one."""
MAX_HEADER_BYTES = 1 << 20
MAX_LINKS = 8


class Source(Protocol):
    """The parts of an archive by name; a missing one raises ImageError, but for `has`."""

    def has(self, name: str) -> bool:
        """Tell whether there is such a part."""

    def size_bytes(self, name: str) -> int:
        """Give how long a part is."""

    def open(self, name: str) -> BinaryIO:
        """Open a part for reading."""


def read_document(source: Source, name: str) -> bytes:
    """Give a small part; raises ImageError if it is missing or too large."""
    with source.open(name) as file:
        raw = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise ImageError(f"{name} in the archive has more than {MAX_DOCUMENT_BYTES} bytes")
    return raw


def clean_name(name: str) -> str:
    """Give the name of a part without `./`; raises ImageError for one that leads out."""
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise ImageError(f"the archive has the name {name[:200]!r}, which leads out of it")
    return "/".join(parts)


class FolderSource:
    """A folder; links in it are not followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str) -> bool:
        """Tell whether there is such a part."""
        return (self._folder / clean_name(name)).exists()

    def size_bytes(self, name: str) -> int:
        """Give how long a part is."""
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def open(self, name: str) -> BinaryIO:
        """Open a part for reading."""
        with ExitStack() as stack:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, folder)
            *parents, last = clean_name(name).split("/")
            try:
                for parent in parents:
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                    folder = os.open(parent, flags, dir_fd=folder)
                    stack.callback(os.close, folder)
                # Not blocking, since to open a FIFO would wait for its writer.
                fd = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            except OSError as error:
                why = "it is missing" if isinstance(error, FileNotFoundError) else error.strerror
                raise ImageError(f"{name} in {self._folder} cannot be read: {why}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ImageError(f"{name} in {self._folder} is not a file")
        return open(fd, "rb")


@dataclass(frozen=True)
class _Member:
    """One entry of a tar: where its bytes lie, or the name that it links to."""

    offset: int
    size_bytes: int
    link: str = ""
    is_file: bool = True


class TarSource:
    """A tar without compression in a file."""

    def __init__(self, path: Path, members: dict[str, _Member]) -> None:
        self._path = path
        self._members = members

    @classmethod
    def read(cls, path: Path) -> TarSource | None:
        """Read the names of a tar; None if there are too many for an archive of images.

        Raises ImageError if it is no tar, or its names are hostile.
        """
        with path.open("rb") as raw:
            file = _Guarded(raw)
            members: dict[str, _Member] = {}
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    while (info := file.next_of(tar)) is not None:
                        if len(members) >= MAX_MEMBERS:
                            return None
                        _add(members, info)
            except (tarfile.TarError, ValueError, EOFError, OSError) as error:
                raise ImageError(f"this is not a tar archive that can be read: {error}") from None
        return cls(path, members)

    def has(self, name: str) -> bool:
        """Tell whether there is such a part."""
        return clean_name(name) in self._members

    def size_bytes(self, name: str) -> int:
        """Give how long a part is."""
        return self._find(name).size_bytes

    def open(self, name: str) -> BinaryIO:
        """Open a part for reading."""
        member = self._find(name)
        return io.BufferedReader(_Part(self._path, member.offset, member.size_bytes))

    def _find(self, name: str) -> _Member:
        name = clean_name(name)
        for _ in range(MAX_LINKS):
            member = self._members.get(name)
            if member is None:
                raise ImageError(f"{name} is missing in the archive")
            if not member.is_file:
                raise ImageError(f"{name} in the archive is neither a file nor a link")
            if not member.link:
                return member
            # docker-archives of old link a layer that stands there twice.
            name = _target(name, member.link)
        raise ImageError(f"{name} in the archive leads through too many links")


def _target(name: str, link: str) -> str:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    if link.startswith("/") or target.startswith("../") or target == "..":
        raise ImageError(f"{name} in the archive links to {link[:200]!r}, which leads out of it")
    return clean_name(target)


def _add(members: dict[str, _Member], info: tarfile.TarInfo) -> None:
    name = clean_name(info.name)
    if info.isdir():
        return
    if name in members:
        raise ImageError(f"the archive is ambiguous: {name[:200]} stands there twice")
    if info.issym():
        members[name] = _Member(0, 0, info.linkname)
    elif info.islnk():
        # The target of a hard link counts from the top of the archive.
        up = "../" * name.count("/")
        members[name] = _Member(0, 0, up + info.linkname.lstrip("/"))
    elif info.isreg() and not info.issparse():
        members[name] = _Member(info.offset_data, info.size)
    else:
        members[name] = _Member(0, 0, is_file=False)


class _Guarded(io.RawIOBase):
    """What tarfile reads from: forwards only, and not much for one header.

    tarfile of itself reads a header of any size into memory, and follows a negative size back
    (CVE-2025-8194).
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._reached = 0
        self._left_bytes = MAX_HEADER_BYTES

    def next_of(self, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        """Give the next entry."""
        self._left_bytes = MAX_HEADER_BYTES
        info = tar.next()
        if info is not None and info.size < 0:
            raise ImageError(f"{info.name[:200]!r} in the archive has a negative size")
        # It keeps all that it has given.
        tar.members = []  # type: ignore[attr-defined]
        return info

    def read(self, size: int = -1) -> bytes:
        self._left_bytes -= size
        if size < 0 or self._left_bytes < 0:
            raise ImageError(f"the archive has a header of more than {MAX_HEADER_BYTES} bytes")
        data = self._file.read(size)
        self._reached = max(self._reached, self._file.tell())
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # One byte back: so tarfile looks whether the last block is whole.
        if whence != os.SEEK_SET or offset < self._reached - 1:
            raise ImageError("an entry of the archive leads back to one before it")
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, path: Path, offset: int, size_bytes: int) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._file.seek(offset)
        self._left_bytes = size_bytes

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._file.read(min(len(view), self._left_bytes))
        if self._left_bytes and view and not data:
            raise ImageError("the archive ends before its last part does")
        view[: len(data)] = data
        self._left_bytes -= len(data)
        return len(data)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
