"""The acts that a session is made of, each alone and small: what `probe` tries.

An act runs in a process of its own (`probe_child`), does the thing as the engine does it and looks
whether it took effect. It raises OSError, or HostError where a call worked but did nothing.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import stat
from typing import NoReturn

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux import libc, probe_child
from sandbox_kernel.linux.mountinfo import parse_mounts
from sandbox_kernel.linux.notify import notify_receive, notify_respond
from sandbox_kernel.linux.probe_remedy import NO_RIGHTS, SHOW_PROC
from sandbox_kernel.linux.seccomp import cell_policy, compile_policy
from sandbox_kernel.linux.shift import show_through
from sandbox_kernel.linux.syscalls import NUMBERS
from sandbox_kernel.model import CELL_UID

STAGE = "/tmp"  # noqa: S108 - only a mount point that every host has; the tmpfs on it is private
STAGE_BYTES = 1 << 20
LOWERS = 100
"""Layers of one overlay: a session squashes its chain well before the kernel's 500."""
OPEN_FILES = 1024
"""The default of the limit `open_files`."""

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
EMPTY_FOLDERS = ("/proc/sys/fs/binfmt_misc", "/proc/fs/nfsd")
"""What Linux keeps empty for a mount, so that a mount there hides nothing."""

_CLONE = libc.OPEN_TREE_CLONE | libc.OPEN_TREE_CLOEXEC


def in_new_namespace(flag: int) -> probe_child.Act:
    """Give the act of entering one new namespace."""

    def act() -> str:
        libc.unshare(flag)
        return ""

    return act


def own_namespace() -> str:
    """Use a right that the root of a user namespace has in it, and nobody else."""
    # Ubuntu's AppArmor lets the namespace be made, and then takes every right inside away.
    try:
        os.chroot("/")
    except PermissionError as error:
        raise HostError(
            "a user namespace can be made, but its root has no rights inside of it", hint=NO_RIGHTS
        ) from error
    return ""


def fresh_proc() -> str:
    """Mount a proc of this PID namespace that hides the processes of others."""
    covered = _covered()
    stage()
    # On a folder beside the host's: the kernel wants one fully visible proc in sight.
    os.mkdir("p")
    flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
    try:
        libc.mount("proc", "p", fstype="proc", flags=flags, data="hidepid=2")
    except PermissionError as error:
        if not covered:
            raise
        raise HostError(
            f"a new /proc is refused while parts of this one are covered: {', '.join(covered)}",
            hint=SHOW_PROC,
        ) from error
    if not os.path.exists("p/1/status"):
        raise HostError("a fresh /proc does not show this PID namespace")
    return ""


def _covered() -> list[str]:
    """Name what is mounted below /proc, but for folders that are there to be covered."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = {mount.mount_point for mount in parse_mounts(file.read())}
    return sorted(
        point for point in points if point.startswith("/proc/") and point not in EMPTY_FOLDERS
    )


def terminals() -> str:
    """Mount a devpts of the cell's own."""
    stage()
    os.mkdir("pts")
    options = "newinstance,ptmxmode=0666,mode=0620"
    libc.mount("devpts", "pts", fstype="devpts", flags=libc.MS_NOSUID, data=options)
    return ""


def stage() -> None:
    """Make a mount namespace with a small tmpfs at STAGE, and go there.

    From here on nothing may be imported: this Python may be installed below STAGE.
    """
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("none", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    flags = libc.MS_NOSUID | libc.MS_NODEV
    libc.mount("tmpfs", STAGE, fstype="tmpfs", flags=flags, data=f"mode=0755,size={STAGE_BYTES}")
    os.chdir(STAGE)


def sized_tmpfs() -> str:
    """Write more into a tmpfs than its size: that must fail."""
    stage()
    try:
        with open("full", "wb", buffering=0) as file:
            file.writelines(bytes(65536) for _ in range(2 * STAGE_BYTES // 65536))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return ""
        raise
    raise HostError("a tmpfs takes more than its size")


def host_binds() -> str:
    """Show a read-only clone of a folder of the host."""
    tree = libc.open_tree("/usr", flags=_CLONE | libc.AT_RECURSIVE)
    flags = libc.AT_EMPTY_PATH | libc.AT_RECURSIVE
    libc.mount_setattr("", dir_fd=tree, flags=flags, attr_set=libc.MOUNT_ATTR_RDONLY)
    libc.mount("tmpfs", STAGE, fstype="tmpfs", data="size=64k")
    libc.move_mount(tree, STAGE)
    if not os.statvfs(STAGE).f_flag & os.ST_RDONLY:
        raise HostError("a clone of a folder does not become read-only")
    return ""


def collect_devices() -> str:
    """Show clones of the host's devices in the folder of `stage`."""
    trees = {name: libc.open_tree(f"/dev/{name}", flags=_CLONE) for name in DEVICES}
    stage()
    for name, tree in trees.items():
        _touch(name)
        libc.move_mount(tree, name)
    return ""


def use_devices() -> str:
    """Write and read such a clone: it must be the device, in a namespace where none can be made."""
    with open("null", "wb", buffering=0) as null, open("zero", "rb", buffering=0) as zero:
        null.write(b"x")
        if zero.read(1) != b"\0":
            raise HostError("a clone of /dev/zero gives something else")
    return ""


def collect_folder(folder: str) -> str:
    """Show a clone of a folder in the folder of `stage`, as a notebook's is."""
    try:
        tree = libc.open_tree(folder, flags=_CLONE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # In a user namespace a clone may not show what a mount below covers (open_tree(2)).
        raise HostError(
            f"another file system is mounted inside of {folder}",
            hint="start Jupyter in a folder that holds no mounts, or use --workspace none",
        ) from error
    stage()
    for name in ("shown", "scratch"):
        os.mkdir(name)
    libc.move_mount(tree, "shown")
    return ""


def use_folder() -> str:
    """Put an empty layer over that clone, and look into it as a cell does."""
    libc.mount("tmpfs", "scratch", fstype="tmpfs", data=f"mode=0755,size={STAGE_BYTES}")
    for name in ("u", "w", "m"):
        os.mkdir(f"scratch/{name}")
    data = "lowerdir=shown,upperdir=scratch/u,workdir=scratch/w,userxattr,volatile"
    libc.mount("overlay", "scratch/m", fstype="overlay", data=data)
    os.setresgid(CELL_UID, CELL_UID, CELL_UID)
    os.setresuid(CELL_UID, CELL_UID, CELL_UID)
    os.listdir("scratch/m")
    return ""


def idmapped(folder: str, userns_fd: int, *, below: bool = False) -> str:
    """Show `folder`, or also what is mounted below, through the map of a user namespace."""
    tree = libc.open_tree(folder, flags=_CLONE | (libc.AT_RECURSIVE if below else 0))
    try:
        show_through(tree, userns_fd, below=below)
    except OSError as error:
        raise OSError(error.errno, error.strerror, folder) from error
    finally:
        os.close(tree)
    return ""


def overlay() -> str:
    """Mount an overlay on a tmpfs and write through it."""
    _overlay("userxattr")
    _touch("m/new")
    if not os.path.exists("u/new"):
        raise HostError("what is written through an overlay does not arrive in its upper")
    return ""


def overlay_volatile() -> str:
    """Mount an overlay that is never synced."""
    _overlay("userxattr,volatile")
    return ""


def overlay_whiteout() -> str:
    """Delete a file of a lower layer."""
    _overlay("userxattr,volatile")
    os.unlink("m/file")
    status = os.lstat("u/file")
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != 0:
        raise HostError("a deleted file leaves no whiteout in the upper")
    return ""


def overlay_opaque() -> str:
    """Delete a folder of a lower layer and make it anew: it must be empty."""
    _overlay("userxattr,volatile")
    os.unlink("m/folder/old")
    os.rmdir("m/folder")
    os.mkdir("m/folder")
    if os.listdir("m/folder"):
        raise HostError("a folder that was made anew shows the files of the old one")
    return ""


def overlay_layers() -> str:
    """Mount an overlay of LOWERS lower layers, the oldest of which shows."""
    stage()
    names = [f"{number}" for number in range(LOWERS)]
    for name in (*names, "u", "w", "m"):
        os.mkdir(name)
    os.mkdir(f"{names[-1]}/oldest")
    _mount_overlay(":".join(names), "userxattr,volatile")
    if not os.path.isdir("m/oldest"):
        raise HostError(f"the lowest of {LOWERS} layers does not show")
    return ""


def _overlay(options: str) -> None:
    stage()
    for name in ("l", "l/folder", "u", "w", "m"):
        os.mkdir(name)
    for name in ("l/file", "l/folder/old"):
        _touch(name)
    _mount_overlay("l", options)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o644))


def _mount_overlay(lowers: str, options: str) -> None:
    data = f"lowerdir={lowers},upperdir=u,workdir=w,{options}"
    flags = libc.MS_NOSUID | libc.MS_NODEV
    libc.mount("overlay", "m", fstype="overlay", flags=flags, data=data)


def no_new_privileges() -> str:
    """Forbid this process to gain privileges by exec."""
    libc.set_no_new_privs()
    return ""


def asking_filter() -> str:
    """Load the filter of cells, and answer a call that it holds: once no, once yes."""
    program = compile_policy(cell_policy())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def filtered() -> str:
        libc.set_no_new_privs()
        listener = libc.seccomp_load(program, listener=True)
        if listener is None:
            raise HostError("a filter gives no listener")
        socket.send_fds(theirs, [b"l"], [listener])
        os.close(listener)
        try:
            libc.capset(0, 0, 0)
        except PermissionError:
            libc.capset(0, 0, 0)
            return ""
        raise HostError("a held system call was not refused")

    # This process waits for the filtered one, so the answers come from one more.
    pid = libc.fork()
    if pid == 0:
        _answer_twice(ours)
    try:
        return probe_child.call(filtered)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _answer_twice(sock: socket.socket) -> NoReturn:
    try:
        libc.set_parent_death_signal(signal.SIGKILL)
        _, fds, _, _ = socket.recv_fds(sock, 1, 1)
        for proceed in (False, True):
            notification = notify_receive(fds[0])
            if notification is None or notification.number != NUMBERS[os.uname().machine]["capset"]:
                break
            error = 0 if proceed else errno.EPERM
            notify_respond(fds[0], notification.id, error=error, proceed=proceed)
    finally:  # whatever was raised: this process must not go on as its parent
        os._exit(0)


def pidfd() -> str:
    """Signal a process by a descriptor instead of a number that may be used again."""
    if not hasattr(os, "pidfd_open") or not hasattr(signal, "pidfd_send_signal"):
        raise HostError("this Python was built without pidfds")
    fd = os.pidfd_open(os.getpid())
    signal.pidfd_send_signal(fd, 0)
    return ""


def open_files(count: int = OPEN_FILES) -> str:
    """Set the limit of open files as a cell gets it."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    return ""
