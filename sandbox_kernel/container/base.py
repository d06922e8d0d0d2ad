"""What init's small root is made of: the host's side of it, and the session's side.

The host's side needs rights on the host and is put together before the session's user
namespace exists: folders of the image and of the notebook, and device nodes, as bind mounts in
a tmpfs. Inherited into the user namespace these mounts are locked: nobody in there can take
them off or make them writable. The session's side (skeleton, scratch) is made by init, and its
files belong to the session's ids.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from typing import Any

from sandbox_kernel.container.failure import SHOW_PROC
from sandbox_kernel.container.plan import DEVICES
from sandbox_kernel.errors import LaunchError
from sandbox_kernel.linux import libc
from sandbox_kernel.linux.idmap import IdMap
from sandbox_kernel.linux.shift import show_through

BASE = "/tmp"  # noqa: S108 - only a mount point that every host has; the tmpfs on it is private
FILE_BYTES = 16 << 20
SPARE_INODES = 256
_CLONE = libc.OPEN_TREE_CLONE | libc.OPEN_TREE_CLOEXEC


@dataclass
class Shifts:
    """User namespaces through which folders are shown, as descriptors; -1 for none."""

    host: int = -1
    """For folders of this machine: root's look like root's, others' like nobody's."""
    layers: int = -1
    """For layers of an image: every id is the one of that number inside."""
    workspace: int = -1


@dataclass(frozen=True)
class Shown:
    """What of the host is shown."""

    binds: list[tuple[str, str, bool]]
    """(source, target, read-only) each."""
    layers_folder: str
    """The folder of unpacked layers; empty where there are none."""
    workspace: tuple[str, bool] | None
    """The notebook's folder, and whether it is read-only."""


@dataclass
class HostSide:
    """Clones of mounts and contents of files, taken with the rights of who may see them."""

    trees: dict[int, int]
    """Number of the bind -> descriptor of a detached clone."""
    files: dict[int, tuple[bytes, int]]
    """Number of the bind -> content and mode."""
    devices: dict[str, int]
    layers: int | None
    workspace: int | None


def collect(shown: Shown, shifts: Shifts) -> HostSide:
    """Clone the image's folders, the notebook's folder and devices; read the image's files.

    The caller sits in a mount namespace of its own, and attaches. Raises OSError with the path at
    fault, LaunchError for the notebook's folder and for the image's layers.
    """
    libc.mount("none", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    trees = {
        n: _clone(source, read_only=read_only, shift_fd=shifts.host)
        for n, (source, _, read_only) in enumerate(shown.binds)
        if os.path.isdir(source)
    }
    # A file is copied: one like /etc/ld.so.cache is replaced by the next installation on the
    # host, and what is unlinked cannot be bound any more (mount(2), ENOENT).
    files = {n: _read(source) for n, (source, _, _) in enumerate(shown.binds) if n not in trees}
    devices = {name: libc.open_tree(f"/dev/{name}", flags=_CLONE) for name in DEVICES}
    layers = _clone_layers(shown.layers_folder, shifts.layers) if shown.layers_folder else None
    workspace = _clone_workspace(*shown.workspace, shifts.workspace) if shown.workspace else None
    return HostSide(trees, files, devices, layers, workspace)


def attach(side: HostSide, layers: list[str], *, owner: int) -> None:
    """Show the image's folders and files at BASE/b/N, the notebook's at BASE/w, devices at BASE/d.

    The folder of layers goes to BASE/l, with links BASE/i/N to `layers` in it: what mount(2) is
    told of an overlay is one page, and must hold the names of all of them. `owner` is the id of
    init, as this process names it. Closes the descriptors.
    """
    _tmpfs(BASE, "mode=0755,size=1m")
    for folder in ("b", "d", "i", "w", "s", "k", "r", "e", "p"):
        os.mkdir(f"{BASE}/{folder}")
    _tmpfs(f"{BASE}/b", "mode=0755,size=64m")
    for n, tree in side.trees.items():
        _attach(tree, f"{BASE}/b/{n}", folder=True)
    for n, (content, mode) in side.files.items():
        _write(f"{BASE}/b/{n}", content, mode, owner)
    # Binds of the copies keep the flag: where all have one id, a cell owns them.
    libc.mount_setattr(f"{BASE}/b", attr_set=libc.MOUNT_ATTR_RDONLY)
    for name, tree in side.devices.items():
        _attach(tree, f"{BASE}/d/{name}", folder=False)
    if side.layers is not None:
        _attach(side.layers, f"{BASE}/l", folder=True)
    for n, name in enumerate(layers):
        os.symlink(f"/l/{name}", f"{BASE}/i/{n}")
    if side.workspace is not None:
        _attach(side.workspace, f"{BASE}/w", folder=True)


def _read(path: str) -> tuple[bytes, int]:
    with open(path, "rb") as file:
        return file.read(FILE_BYTES), os.fstat(file.fileno()).st_mode & 0o555


def _write(path: str, content: bytes, mode: int, owner: int) -> None:
    with open(path, "xb") as file:
        file.write(content)
    os.chown(path, owner, owner)
    os.chmod(path, mode)


def _clone(source: str, *, read_only: bool, shift_fd: int) -> int:
    tree = libc.open_tree(source, flags=_CLONE | libc.AT_RECURSIVE)
    flags = libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV
    _set(tree, flags | (libc.MOUNT_ATTR_RDONLY if read_only else 0), recursive=True)
    if shift_fd >= 0:
        # What is root's on the host is root's inside then. It looks like nobody's where a file
        # system cannot do it (mount_setattr(2), EINVAL); who may read it is the same.
        with contextlib.suppress(OSError):
            show_through(tree, shift_fd, below=True)
    return tree


def _set(tree: int, attributes: int, *, recursive: bool) -> None:
    flags = libc.AT_EMPTY_PATH | (libc.AT_RECURSIVE if recursive else 0)
    libc.mount_setattr("", dir_fd=tree, flags=flags, attr_set=attributes)


def _clone_layers(source: str, shift_fd: int) -> int:
    try:
        tree = libc.open_tree(source, flags=_CLONE)
        attributes = libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV | libc.MOUNT_ATTR_RDONLY
        _set(tree, attributes, recursive=False)
        if shift_fd >= 0:
            show_through(tree, shift_fd, below=False)
    except OSError as error:
        raise LaunchError(
            f"show the image's layers in {source}",
            error.strerror or "",
            hint="keep images on ext4, xfs, btrfs or tmpfs: set SANDBOX_KERNEL_STORE to a folder",
        ) from error
    return tree


def _clone_workspace(source: str, read_only: bool, shift_fd: int) -> int:  # noqa: FBT001
    # Not recursive: an overlay refuses a lower folder with locked mounts below it.
    try:
        tree = libc.open_tree(source, flags=_CLONE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # An ordinary user's clone may not show what a mount below covers (open_tree(2)).
        raise LaunchError(
            f"show the notebook's folder {source}",
            "another file system is mounted inside of it",
            hint="start from a folder that holds no mounts, or use workspace=none",
        ) from error
    flags = libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV
    _set(tree, flags | (libc.MOUNT_ATTR_RDONLY if read_only else 0), recursive=False)
    if shift_fd < 0:
        return tree
    try:
        show_through(tree, shift_fd, below=False)
    except OSError as error:
        raise LaunchError(
            f"show the notebook's folder {source}",
            f"its file system cannot be shown under other ids ({error.strerror})",
            hint="start from a folder on ext4, xfs, btrfs or tmpfs, or use workspace=none",
        ) from error
    return tree


def _attach(tree: int, target: str, *, folder: bool) -> None:
    if folder:
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_CLOEXEC, 0o644))
    libc.move_mount(tree, target)
    os.close(tree)


def settle(body: dict[str, Any]) -> None:
    """Make BASE init's root and mount the session's side on it.

    `body` is the start message; called as root of the user namespace, as PID 1.
    """
    libc.mount("none", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    # A fresh proc can be mounted only while the host's, fully visible, is still in sight.
    try:
        libc.mount("proc", f"{BASE}/p", fstype="proc", flags=libc.MS_NOSUID | libc.MS_NODEV)
    except OSError as error:
        raise LaunchError("mount a new proc", error.strerror or "", hint=SHOW_PROC) from error
    # pivot_root refuses a locked mount; the top of a bind is not locked, what is below stays so.
    libc.mount(BASE, BASE, flags=libc.MS_BIND | libc.MS_REC)
    os.chdir(BASE)
    libc.pivot_root(".", ".")
    libc.umount2(".", libc.MNT_DETACH)
    os.chdir("/")
    _tmpfs("/s", f"mode=0700,size={body['disk_bytes']}")
    _tmpfs("/k", "mode=0755,size=4m")
    _tmpfs("/e", "mode=0755,size=64k")
    os.mkdir("/e/folder", 0o555)
    os.close(os.open("/e/file", os.O_CREAT | os.O_CLOEXEC, 0o444))
    libc.mount_setattr("/e", attr_set=libc.MOUNT_ATTR_RDONLY)
    build_skeleton("/k", body)


def keeps_attributes() -> bool:
    """Tell whether the scratch file system has user attributes, as tmpfs does since Linux 6.6.

    An overlay needs one to delete a folder of a lower layer (overlayfs.rst, opaque directories).
    """
    try:
        os.setxattr("/s", "user.sandbox-kernel", b"")
    except OSError:
        return False
    return True


def _tmpfs(target: str, options: str) -> None:
    libc.mount("tmpfs", target, fstype="tmpfs", flags=libc.MS_NOSUID | libc.MS_NODEV, data=options)


def resize_scratch(disk_bytes: int) -> None:
    """Set the size of the scratch file system; raises OSError (EINVAL) below what is in use."""
    _remount_scratch(f"size={disk_bytes}")


def _remount_scratch(options: str) -> None:
    flags = libc.MS_REMOUNT | libc.MS_NOSUID | libc.MS_NODEV
    libc.mount("tmpfs", "/s", fstype="tmpfs", flags=flags, data=options)


def keep_inodes() -> None:
    """Raise the number of files of the scratch file system where hardly any is left.

    A container takes some by itself, and deleting a file of an earlier cell takes one: without,
    a cell that used them up and was committed would be the last.
    """
    info = os.statvfs("/s")
    if info.f_files > 0 and info.f_ffree < SPARE_INODES:
        # Where Linux has no memory for that, the next container says what it lacks.
        with contextlib.suppress(OSError):
            _remount_scratch(f"nr_inodes={info.f_files - info.f_ffree + SPARE_INODES}")


def build_skeleton(root: str, body: dict[str, Any]) -> None:
    """Make the folders, files, links and mount points of the image below `root`."""
    is_alone = IdMap.from_json(body["ids"]).is_alone  # there is nobody else who could own a folder
    for path, mode, uid, gid in body["folders"]:
        _folder(root, path)
        if not is_alone:
            os.chown(root + path, uid, gid)
        os.chmod(root + path, mode)
    for path, is_folder in body["targets"]:
        if is_folder:
            _folder(root, path)
        else:
            _file(root, path, "")
    for path, content in body["files"]:
        _file(root, path, content)
    for path, target in body["links"]:
        _folder(root, os.path.dirname(path))
        os.symlink(target, root + path)
    for name in DEVICES:
        _file(root, f"/dev/{name}", "")
    links = {"fd": "/proc/self/fd", "ptmx": "pts/ptmx", "core": "/proc/kcore"}
    links |= {"stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
    for name, target in links.items():
        os.symlink(target, f"{root}/dev/{name}")


def _folder(root: str, path: str) -> None:
    os.makedirs(root + path, mode=0o755, exist_ok=True)


def _file(root: str, path: str, content: str) -> None:
    _folder(root, os.path.dirname(path))
    with open(root + path, "x", encoding="utf-8") as file:
        file.write(content)
    os.chmod(root + path, 0o644)
