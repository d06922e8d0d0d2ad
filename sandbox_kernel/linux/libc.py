"""The C library and the system calls it does not wrap: the only module that uses ctypes.

Every function raises OSError (errno, text that begins with the call's name, path if there is one),
so that no caller tests a return value. Runs on Python 3.9 or newer with the standard library
only, since the guest imports it too. Facts are from the man pages and the kernel's uapi headers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import signal
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from sandbox_kernel.linux import constants

# Star imports, so that callers have one module to name and this one stays readable.
from sandbox_kernel.linux.constants import *  # noqa: F403
from sandbox_kernel.linux.notify import *  # noqa: F403
from sandbox_kernel.linux.notify import notify_synchronously

if TYPE_CHECKING:
    from typing import TypeAlias

_MACHINE = os.uname().machine
# Only what this module calls by number. -1 is no system call anywhere, so that an unknown
# machine gets ENOSYS from the kernel instead of some other call.
_NUMBERS = {
    "x86_64": {"clone": 56, "pivot_root": 155, "seccomp": 317},
    "aarch64": {"clone": 220, "pivot_root": 41, "seccomp": 277},
}.get(_MACHINE, {})
if _NUMBERS:  # Since Linux 5.1 a new call has the same number on every machine.
    _NUMBERS.update(open_tree=428, move_mount=429, fsopen=430, fsconfig=431, fsmount=432)
    _NUMBERS.update(mount_setattr=442)

AnyPath: TypeAlias = "str | bytes | os.PathLike[str]"
_Call = Callable[..., int]

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC_WITH_GIL = ctypes.PyDLL(None, use_errno=True)
_INT = ctypes.c_int
_UINT = ctypes.c_uint
_ULONG = ctypes.c_ulong
_TEXT = ctypes.c_char_p
_POINTER = ctypes.c_void_p


def _checker(name: str, path_at: int | None) -> Callable[[int, Any, tuple[Any, ...]], int]:
    def check(result: int, _function: object, arguments: tuple[Any, ...]) -> int:
        if result != -1:
            return result
        number = ctypes.get_errno()
        text = f"{name}: {os.strerror(number)}"
        if path_at is None or not arguments[path_at]:
            raise OSError(number, text)
        raise OSError(number, text, os.fsdecode(arguments[path_at]))

    return check


def _bind(name: str, *types: Any, path_at: int | None = None, library: Any = _LIBC) -> _Call:
    function = library[name]  # a new object each time; an attribute would be a shared one
    function.restype = _INT
    function.argtypes = types
    function.errcheck = _checker(name, path_at)
    bound: _Call = function
    return bound


def _bind_number(name: str, *types: Any, path_at: int | None = None, library: Any = _LIBC) -> _Call:
    function = library["syscall"]
    function.restype = ctypes.c_long
    function.argtypes = (ctypes.c_long, *types)
    function.errcheck = _checker(name, None if path_at is None else path_at + 1)
    bound: _Call = functools.partial(function, _NUMBERS.get(name, -1))
    return bound


_mount = _bind("mount", _TEXT, _TEXT, _TEXT, _ULONG, _TEXT, path_at=1)
_umount2 = _bind("umount2", _TEXT, _INT, path_at=0)
_unshare = _bind("unshare", _INT)
_setns = _bind("setns", _INT, _INT)
_prctl = _bind("prctl", _INT, _ULONG, _ULONG, _ULONG, _ULONG)
_capget = _bind("capget", _POINTER, _POINTER)
_capset = _bind("capset", _POINTER, _POINTER)
_fork = _bind("fork", library=_LIBC_WITH_GIL)
raw_fork, after_fork_child = (_LIBC_WITH_GIL[name] for name in ("fork", "PyOS_AfterFork_Child"))
after_fork_child.restype = None
_clone = _bind_number("clone", _ULONG, *[_POINTER] * 4, library=_LIBC_WITH_GIL)
_pivot_root = _bind_number("pivot_root", _TEXT, _TEXT, path_at=0)
_open_tree = _bind_number("open_tree", _INT, _TEXT, _UINT, path_at=1)
_move_mount = _bind_number("move_mount", _INT, _TEXT, _INT, _TEXT, _UINT, path_at=3)
_mount_setattr = _bind_number("mount_setattr", _INT, _TEXT, _UINT, _POINTER, _ULONG, path_at=1)
_fsopen = _bind_number("fsopen", _TEXT, _UINT)
_fsconfig = _bind_number("fsconfig", _INT, _UINT, _TEXT, _POINTER, _INT)
_fsmount = _bind_number("fsmount", _INT, _UINT, _UINT)
_seccomp = _bind_number("seccomp", _UINT, _UINT, _POINTER)


def mount(
    source: AnyPath, target: AnyPath, *, fstype: str = "", flags: int = 0, data: str = ""
) -> None:
    """Attach a file system; an empty text is passed as NULL.

    The kernel reads at most one page of `data`: use fsopen for long lists of options.
    """
    texts = map(os.fsencode, (source, target, fstype, data))
    source_, target_, fstype_, data_ = (text or None for text in texts)
    _mount(source_, target_, fstype_, flags, data_)


def umount2(target: AnyPath, flags: int = 0) -> None:
    """Detach a mount; MNT_DETACH takes the tree away now and frees it later."""
    _umount2(os.fsencode(target), flags)


def pivot_root(new: AnyPath, old: AnyPath) -> None:
    """Make `new` the root of the mount namespace and put the former one at `old`.

    `old` may be `.` as `new` is: the former root then lies on top and is unmounted as `.`.
    """
    _pivot_root(os.fsencode(new), os.fsencode(old))


def unshare(flags: int) -> None:
    """Leave the shared namespaces that `flags` (CLONE_NEW*) names, for new ones."""
    _unshare(flags)


def setns(fd: int, nstype: int = 0) -> None:
    """Enter the namespace behind `fd`; EINVAL if it is not of type `nstype` (0: any)."""
    _setns(fd, nstype)


def open_tree(path: AnyPath, *, flags: int, dir_fd: int = constants.AT_FDCWD) -> int:
    """Open a mount, or with OPEN_TREE_CLONE a detached copy of it; return the fd."""
    return _open_tree(dir_fd, os.fsencode(path), flags)


def move_mount(
    from_fd: int,
    to_path: AnyPath,
    *,
    flags: int = constants.MOVE_MOUNT_F_EMPTY_PATH,
    to_dir_fd: int = constants.AT_FDCWD,
) -> None:
    """Attach the detached mount behind `from_fd` at `to_path`.

    With MOVE_MOUNT_T_EMPTY_PATH too and an empty path, it goes on `to_dir_fd` itself.
    """
    _move_mount(from_fd, b"", to_dir_fd, os.fsencode(to_path), flags)


def mount_setattr(  # noqa: PLR0913 - the fields of struct mount_attr
    path: AnyPath,
    *,
    dir_fd: int = constants.AT_FDCWD,
    flags: int = 0,
    attr_set: int = 0,
    attr_clear: int = 0,
    propagation: int = 0,
    userns_fd: int = -1,
) -> None:
    """Change the attributes of a mount (AT_RECURSIVE: of the tree), all or none.

    `propagation` is one of MS_PRIVATE, MS_SLAVE, MS_SHARED; `userns_fd` goes with
    MOUNT_ATTR_IDMAP. Linux 5.12.
    """
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd, 64 bits each.
    fields = struct.pack("=QQQQ", attr_set, attr_clear, propagation, max(userns_fd, 0))
    _mount_setattr(dir_fd, os.fsencode(path), flags, fields, len(fields))


def fsopen(fstype: str) -> int:
    """Open a context to configure a new file system; return its fd (close-on-exec)."""
    return _fsopen(os.fsencode(fstype), 1)


def fsconfig_string(fd: int, key: str, value: AnyPath) -> None:
    """Set one `key=value` option of a file system context, of up to 256 bytes each."""
    _configure(fd, 1, key, value=os.fsencode(value))


def fsconfig_flag(fd: int, key: str) -> None:
    """Set an option without a value."""
    _configure(fd, 0, key)


def fsconfig_fd(fd: int, key: str, aux_fd: int) -> None:
    """Set an option to an open file; overlay's layers take one since Linux 6.13."""
    _configure(fd, 5, key, aux=aux_fd)


def fsconfig_create(fd: int) -> None:
    """Make the file system that the context describes."""
    _configure(fd, 6)


def fsmount(fd: int, *, attrs: int = 0) -> int:
    """Make a detached mount (MOUNT_ATTR_*) of a created context; return its fd."""
    try:
        return _fsmount(fd, 1, attrs)
    except OSError as error:
        raise _explained(error, fd) from None


def _configure(
    fd: int, command: int, key: str | None = None, *, value: bytes | None = None, aux: int = 0
) -> None:
    try:
        _fsconfig(fd, command, None if key is None else os.fsencode(key), value, aux)
    except OSError as error:
        raise _explained(error, fd, key) from None


def _explained(error: OSError, fd: int, key: str | None = None) -> OSError:
    """Add what the file system said: each read(2) of a context gives one line of its log."""
    lines = [f"{error.strerror} ({key})" if key else str(error.strerror)]
    with contextlib.suppress(OSError):  # ENODATA ends the log
        while line := os.read(fd, 8192):
            lines.append(line.decode("utf-8", "replace").strip())
    return OSError(error.errno, "; ".join(lines))


class Capabilities(NamedTuple):
    """The capability sets of a thread as bit masks."""

    effective: int
    permitted: int
    inheritable: int


def cap_mask(capabilities: Iterable[int]) -> int:
    """Give the bit mask of CAP_* numbers."""
    mask = 0
    for number in capabilities:
        mask |= 1 << number
    return mask


# struct __user_cap_header_struct: version 3 (64 bits in two halves), the calling thread.
_CAP_HEADER = struct.pack("=Ii", 0x20080522, 0)


def capget() -> Capabilities:
    """Give the calling thread's capability sets."""
    header = ctypes.create_string_buffer(_CAP_HEADER, len(_CAP_HEADER))
    sets = ctypes.create_string_buffer(24)
    _capget(header, sets)
    low_e, low_p, low_i, high_e, high_p, high_i = struct.unpack("=6I", sets.raw)
    return Capabilities(low_e | high_e << 32, low_p | high_p << 32, low_i | high_i << 32)


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the calling thread's capability sets, each a bit mask."""
    header = ctypes.create_string_buffer(_CAP_HEADER, len(_CAP_HEADER))
    masks = (effective, permitted, inheritable)
    halves = [mask & 0xFFFFFFFF for mask in masks] + [mask >> 32 for mask in masks]
    _capset(header, struct.pack("=6I", *halves))


def drop_bounding(keep: Iterable[int] = ()) -> None:
    """Drop every capability but `keep` from the bounding set, for ever; needs CAP_SETPCAP."""
    kept = frozenset(keep)
    for number in range(64):
        try:
            present = _prctl(constants.PR_CAPBSET_READ, number, 0, 0, 0)
        except OSError as error:
            if error.errno == errno.EINVAL:  # past the last one this kernel knows
                return
            raise
        if present and number not in kept:
            _prctl(constants.PR_CAPBSET_DROP, number, 0, 0, 0)


def raise_ambient(capability: int) -> None:
    """Let a capability that is permitted and inheritable survive an exec (capabilities(7))."""
    _prctl(constants.PR_CAP_AMBIENT, constants.PR_CAP_AMBIENT_RAISE, capability, 0, 0)


def clear_ambient() -> None:
    """Empty the ambient set: nothing then survives an exec of an ordinary user."""
    _prctl(constants.PR_CAP_AMBIENT, constants.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


def set_no_new_privs() -> None:
    """Forbid this thread and its descendants, for ever, to gain privileges by exec."""
    _prctl(constants.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def set_dumpable(dumpable: bool) -> None:  # noqa: FBT001
    """Choose whether others of this uid may trace this process and read its /proc files."""
    _prctl(constants.PR_SET_DUMPABLE, int(dumpable), 0, 0, 0)


def get_dumpable() -> bool:
    """Tell whether others of this uid may trace this process."""
    return _prctl(constants.PR_GET_DUMPABLE, 0, 0, 0, 0) == 1


def set_parent_death_signal(number: int) -> None:
    """Ask for a signal when the parent *thread* ends; a change of uid and a fork clear it."""
    _prctl(constants.PR_SET_PDEATHSIG, number, 0, 0, 0)


def set_keep_capabilities(keep: bool) -> None:  # noqa: FBT001
    """Keep the permitted set over a change from uid 0 to others; exec clears the flag."""
    _prctl(constants.PR_SET_KEEPCAPS, int(keep), 0, 0, 0)


def set_name(name: str) -> None:
    """Set the thread's name as `ps` shows it; the kernel cuts it to 15 bytes."""
    buffer = ctypes.create_string_buffer(os.fsencode(name))
    _prctl(constants.PR_SET_NAME, ctypes.addressof(buffer), 0, 0, 0)


def set_child_subreaper(reaper: bool) -> None:  # noqa: FBT001
    """Become, or stop to be, the parent of orphaned descendants."""
    _prctl(constants.PR_SET_CHILD_SUBREAPER, int(reaper), 0, 0, 0)


def fork() -> int:
    """Fork by the C library with the GIL held and without CPython's at-fork hooks.

    Only for a process with one thread: see `forks`. Handlers of pthread_atfork do run.
    """
    return _fork()


def clone(flags: int) -> int:
    """Fork by the raw system call with CLONE_* flags, on the same stack, with the GIL held.

    No pthread_atfork handler runs, so call it in single-threaded processes only.
    """
    tid = ctypes.c_void_p()
    with contextlib.suppress(OSError):  # EINVAL without CONFIG_CHECKPOINT_RESTORE
        _prctl(constants.PR_GET_TID_ADDRESS, ctypes.addressof(tid), 0, 0, 0)
    if tid.value:  # where the C library caches the thread's id: keep it true in the child
        flags |= constants.CLONE_CHILD_SETTID | constants.CLONE_CHILD_CLEARTID
    # The last two arguments are child_tid and tls in an order that depends on the machine.
    tail = (None, tid) if _MACHINE == "aarch64" else (tid, None)
    return _clone(flags | signal.SIGCHLD, None, None, *tail)


def flush_c_streams(*, by_line: bool = False) -> None:
    """Write what C code holds in its buffers; `by_line`: have stdout do so itself from now on."""
    if by_line:
        _LIBC.setvbuf(_POINTER.in_dll(_LIBC, "stdout"), None, _INT(1), _ULONG(0))  # _IOLBF
    _LIBC.fflush(None)


def fionread(fd: int) -> int:
    """Give the number of bytes that can be read from a pipe or socket now."""
    pending: int = struct.unpack("i", fcntl.ioctl(fd, 0x541B, bytes(4)))[0]
    return pending


def loaded_function(path: str, name: str) -> Callable[..., int] | None:
    """Look up `name` in a shared library that this process has loaded already.

    None if it is not loaded or has no such symbol. The callable takes and returns C ints.
    """
    try:
        library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        function: Callable[..., int] = library[name]
    except (OSError, AttributeError):
        return None
    return function


_SECCOMP_FLAG_NEW_LISTENER = 1 << 3
_SECCOMP_FLAG_WAIT_KILLABLE_RECV = 1 << 5


def seccomp_load(program: bytes, *, listener: bool = False) -> int | None:
    """Put a filter (`struct sock_filter[]`) on this thread for ever; return the listener's fd.

    Needs no_new_privs or CAP_SYS_ADMIN. A second listener on one thread is EBUSY.
    """
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: unsigned short, padding, pointer, in native alignment.
    description = struct.pack("HP", len(program) // 8, ctypes.addressof(instructions))
    if not listener:
        _seccomp(1, 0, description)
        return None
    flags = _SECCOMP_FLAG_NEW_LISTENER
    try:  # Linux 5.19: a handled call is not restarted by a signal that is not fatal.
        fd = _seccomp(1, flags | _SECCOMP_FLAG_WAIT_KILLABLE_RECV, description)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = _seccomp(1, flags, description)
    notify_synchronously(fd)
    return fd
