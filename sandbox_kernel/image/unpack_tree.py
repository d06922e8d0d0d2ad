"""Make the files of a layer below one open folder, never following a link and never outside.

Every name is one part of a path, looked up in the descriptor of its folder. What the layer
removes is decided at the end, so the order of whiteouts and files in the tar does not matter.
"""

from __future__ import annotations

import errno
import os
import stat

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.unpack_attributes import Attributes
from sandbox_kernel.image.unpack_headers import Entry, TarReader
from sandbox_kernel.image.unpack_lowers import Lowers, copy_attributes, copy_up
from sandbox_kernel.image.unpack_rules import (
    Bounds,
    Unpacked,
    check_symlink,
    checked_path,
    refused,
    whiteout_of,
)
from sandbox_kernel.linux.tree_names import FOLDER_FLAGS, OPAQUE

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FOLDERS = 128
_PRIVATE_FOLDER = 0o700
_PRIVATE_FILE = 0o600
_DEFAULT_FOLDER = Entry(b"", b"5", b"")
_DEFAULT_FOLDER.mode = 0o755


class Tree:
    """The files of one layer, below the open folder `root_fd`."""

    def __init__(
        self,
        root_fd: int,
        attributes: Attributes,
        *,
        bounds: Bounds,
        lowers: Lowers,
        skip_devices: bool,
    ) -> None:
        self._attributes = attributes
        self._bounds = bounds
        self._lowers = lowers
        self._skip_devices = skip_devices
        self._fds: dict[bytes, int] = {b"": root_fd}
        # Attributes of folders come last: a mode may forbid to write, and writing sets the time.
        self._folders: dict[bytes, Entry | None] = {b"": _DEFAULT_FOLDER}
        self._hidden: dict[bytes, bytes] = {}
        self._opaque: dict[bytes, bytes] = {}
        self._entries = self._bytes = self._devices = 0
        self._needs_lowers = False

    def fill(self, reader: TarReader) -> Unpacked:
        """Make all that the tar holds; raises ImageError with the entry's name."""
        name = b"."
        try:
            for entry in reader:
                name = entry.name
                self._count(entry)
                self._add(entry, reader)
            name = b"."
            reader.drain()
            self._finish()
        except OSError as error:
            hint = _NO_ATTRIBUTES if error.errno == errno.EOPNOTSUPP else ""
            raise refused(name, f"{error.strerror}", hint=hint) from error
        finally:
            self._close_folders()
        return Unpacked(
            self._entries,
            self._bytes,
            needs_lowers=self._needs_lowers,
            opaque_root=b"" in self._opaque,
            dropped_xattrs=self._attributes.dropped,
            skipped_devices=self._devices,
        )

    def _count(self, entry: Entry) -> None:
        self._entries += 1
        self._bytes += entry.size
        if self._entries > self._bounds.entries:
            raise ImageError(f"the layer has more than {self._bounds.entries} entries")
        if self._bytes > self._bounds.total_bytes:
            raise ImageError(f"the files of the layer have over {self._bounds.total_bytes} bytes")

    def _add(self, entry: Entry, reader: TarReader) -> None:
        path = checked_path(entry.name, self._bounds)
        if b".wh." in path:
            meaning, about = whiteout_of(entry.name, path)
            if meaning != "plain":
                self._remove_of_lowers(meaning, about, entry)
                return
        if entry.xattrs:
            self._attributes.check(entry)
        kind = entry.kind
        if kind == b"5":
            self._add_folder(path, entry)
        elif not path:
            raise refused(entry.name, "only a folder can be the root")
        elif kind == b"0":
            self._add_file(path, entry, reader)
        elif kind == b"1":
            self._add_hard_link(path, entry)
        elif kind in {b"2", b"6"}:
            self._add_special(path, entry)
        elif self._skip_devices:
            self._devices += 1
        else:
            raise refused(
                entry.name, "it is a device node", hint="a container makes its own devices"
            )

    def _remove_of_lowers(self, meaning: str, about: bytes, entry: Entry) -> None:
        if meaning == "skip":
            return
        if entry.kind not in {b"0", b"1"}:  # aufs made whiteouts as hard links
            raise refused(entry.name, "it is a whiteout, but no file")
        (self._opaque if meaning == "opaque" else self._hidden)[about] = entry.name

    def _add_folder(self, path: bytes, entry: Entry) -> None:
        if path:
            folder, name = self._place(path, entry)
            try:
                os.mkdir(name, _PRIVATE_FOLDER, dir_fd=folder)
            except FileExistsError:
                if not stat.S_ISDIR(_kind(name, folder)):
                    os.unlink(name, dir_fd=folder)
                    os.mkdir(name, _PRIVATE_FOLDER, dir_fd=folder)
        self._folders[path] = entry

    def _add_file(self, path: bytes, entry: Entry, reader: TarReader) -> None:
        folder, name = self._place(path, entry)
        try:
            fd = os.open(name, _NEW_FILE, _PRIVATE_FILE, dir_fd=folder)
        except FileExistsError:
            self._remove(path, name, folder)
            fd = os.open(name, _NEW_FILE, _PRIVATE_FILE, dir_fd=folder)
        try:
            if entry.size:
                reader.copy_data(entry, fd)
            self._attributes.set_on(fd, entry)
        finally:
            os.close(fd)

    def _add_special(self, path: bytes, entry: Entry) -> None:
        folder, name = self._place(path, entry)
        if entry.kind == b"2":
            check_symlink(entry.name, path, entry.link, self._bounds)
        self._remove(path, name, folder)
        if entry.kind == b"2":
            os.symlink(entry.link, name, dir_fd=folder)
        else:
            os.mkfifo(name, _PRIVATE_FILE, dir_fd=folder)
        self._attributes.set_at(name, folder, entry)

    def _add_hard_link(self, path: bytes, entry: Entry) -> None:
        target = checked_path(entry.link, self._bounds, what="link target")
        if not target or (target + b"/").startswith(path + b"/"):
            raise refused(entry.name, "it is a hard link to the root, to itself or to below itself")
        self._trim()
        source = self._linked(target, entry)
        source_name = target.rpartition(b"/")[2]
        folder, name = self._place(path, entry, keep=True)
        self._remove(path, name, folder)
        os.link(source_name, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)

    def _linked(self, target: bytes, entry: Entry) -> int:
        """Give the folder that has what a hard link is to; from below it is copied up first."""
        parent, _, name = target.rpartition(b"/")
        kind = 0
        try:
            folder = self._folder(parent, entry, make=False)
            kind = _kind(name, folder)
        except FileNotFoundError:
            pass
        else:
            if stat.S_ISDIR(kind):
                raise refused(entry.name, f"it is a hard link to the folder {target!a}")
            return folder
        self._needs_lowers = True
        with self._lowers.find(target) as found:
            if found is None:
                raise refused(entry.name, "it is a hard link to a file that is not there")
            if not (stat.S_ISREG(found.info.st_mode) or stat.S_ISLNK(found.info.st_mode)):
                raise refused(entry.name, "it is a hard link to what is no file")
            folder = self._folder(parent, entry)
            copy_up(found, name, folder)
        return folder

    def _place(self, path: bytes, entry: Entry, *, keep: bool = False) -> tuple[int, bytes]:
        """Give the open folder for a path, made if need be, and the name in it."""
        if len(self._fds) > _OPEN_FOLDERS and not keep:
            self._close_folders()
        parent, _, name = path.rpartition(b"/")
        fd = self._fds.get(parent)
        return (self._folder(parent, entry) if fd is None else fd), name

    def _folder(self, path: bytes, entry: Entry, *, make: bool = True) -> int:
        """Open a folder of this layer, part by part; raises ImageError where it is none."""
        fd = self._fds.get(path)
        if fd is not None:
            return fd
        parent, _, name = path.rpartition(b"/")
        above = self._folder(parent, entry, make=make)
        try:
            fd = os.open(name, FOLDER_FLAGS, dir_fd=above)
        except FileNotFoundError:
            if not make:
                raise
            os.mkdir(name, _PRIVATE_FOLDER, dir_fd=above)
            self._folders[path] = None
            fd = os.open(name, FOLDER_FLAGS, dir_fd=above)
        except NotADirectoryError:
            # Also for a symbolic link, since both flags are given. It is never followed.
            raise refused(
                entry.name, f"{path!a}, which should hold it, is no folder in this layer"
            ) from None
        self._fds[path] = fd
        return fd

    def _remove(self, path: bytes, name: bytes, folder: int) -> None:
        """Make room for an entry whose name was there before: the last one counts."""
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            below = path + b"/"
            for known in [one for one in self._fds if one == path or one.startswith(below)]:
                os.close(self._fds.pop(known))
            _remove_folder(name, folder)
            self._folders.pop(path, None)

    def _finish(self) -> None:
        for path, said in self._hidden.items():
            self._hide(path, said)
        for path, said in self._opaque.items():
            os.setxattr(self._folder(path, Entry(said, b"0", b"")), OPAQUE, b"y")
            self._trim()
        # Those below before those above, whose modes may keep even their owner out.
        for path in sorted(self._folders, reverse=True):
            self._settle(path, self._folders[path])
            self._trim()

    def _hide(self, path: bytes, said: bytes) -> None:
        """Mark a name as removed, or if the layer has a folder of that name, make it opaque."""
        folder, name = self._place(path, Entry(said, b"0", b""))
        kind = _kind(name, folder, missing=0)
        if stat.S_ISDIR(kind):
            self._opaque[path] = said
        elif not kind:
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=folder)

    def _settle(self, path: bytes, entry: Entry | None) -> None:
        try:
            fd = self._folder(path, _DEFAULT_FOLDER, make=False)
        except (FileNotFoundError, ImageError):
            return  # it made room for a later entry
        if entry is not None:
            self._attributes.set_on(fd, entry)
            return
        self._needs_lowers = True
        with self._lowers.find(path) as found:
            if found is None or not stat.S_ISDIR(found.info.st_mode):
                self._attributes.set_on(fd, _DEFAULT_FOLDER)
                return
            lower = os.open(found.name, FOLDER_FLAGS, dir_fd=found.folder_fd)
            try:
                copy_attributes(lower, fd)
            finally:
                os.close(lower)

    def _trim(self) -> None:
        if len(self._fds) > _OPEN_FOLDERS:
            self._close_folders()

    def _close_folders(self) -> None:
        root = self._fds.pop(b"")
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {b"": root}


_NO_ATTRIBUTES = "keep the images on a file system that has user attributes, as ext4, XFS or btrfs"


def _kind(name: bytes, folder: int, *, missing: int | None = None) -> int:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        if missing is None:
            raise
        return missing


def _remove_folder(name: bytes, folder: int) -> None:
    """Remove a folder and all below it; its depth is bounded by that of paths."""
    fd = os.open(name, FOLDER_FLAGS, dir_fd=folder)
    try:
        for child in map(os.fsencode, os.listdir(fd)):
            try:
                os.unlink(child, dir_fd=fd)
            except IsADirectoryError:
                _remove_folder(child, fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=folder)
