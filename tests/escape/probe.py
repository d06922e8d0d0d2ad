"""What a probe is: hostile code, the one answer that is due, and the twin that proves it bites."""

from __future__ import annotations

from dataclasses import dataclass

PRELUDE = '''
import ctypes, errno, os, resource, signal, socket, stat, struct, subprocess, sys
from sandbox_kernel.linux.syscalls import NUMBERS
NR = NUMBERS[os.uname().machine]
_libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    """Make a system call; say "ok" or the name of its errno."""
    full = [a if isinstance(a, bytes) or a is None else ctypes.c_ulong(a) for a in args]
    result = _libc.syscall(ctypes.c_long(NR.get(name, name)), *full)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else "ok"
def attempt(act, *args):
    """Call something of Python's; say "ok" or the name of its errno."""
    try:
        act(*args)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "ok"
def capset(effective, permitted):
    header = struct.pack("=Ii", 0x20080522, 0)
    low = struct.pack("=III", effective, permitted, 0)
    return call("capset", header, low + bytes(12))
KEPT = 1 << 21 | 1 << 18 | 1 << 7 | 1 << 6  # SYS_ADMIN, SYS_CHROOT, SETUID, SETGID
def arm():
    """Take what the interpreter has in its permitted set into effect, where nobody forbids it."""
    return capset(KEPT, KEPT)
def fresh(act):
    """Run something in a child; say what it said, or the signal that ended it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, str(act()).encode())
        finally:
            os._exit(0)
    os.close(write)
    said = b"".join(iter(lambda: os.read(read, 4096), b"")).decode()
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return signal.Signals(-code).name if code < 0 else said
def found(path):
    """Say whether a path is there."""
    return "there" if os.path.lexists(path) else "absent"
def opened(path, flags):
    return attempt(lambda: os.close(os.open(path, flags)))
'''


@dataclass(frozen=True)
class Probe:
    """One attack. A row of the table in docs/security.md."""

    number: int
    """Of the list of classes; 0 for what belongs to this kernel alone."""
    name: str
    refused: str
    """What the attack must get to see: an errno, a signal, "absent", an outcome."""
    guard: str = ""
    """What the twin runs without; "container" if it runs directly on the host, " + " between several."""
    open: str | tuple[str, ...] = ""
    """What the twin gets to see; any of several where it depends on the host."""
    code: str = ""
    """Statements of a cell that print it, below PRELUDE; empty for a test of its own."""
    needs_root: str = ""
    """Why only root has this twin, or nothing."""

    @property
    def id(self) -> str:
        """The number and the name, for selecting with -k."""
        return f"{self.number:02}-{self.name}"

    @property
    def guards(self) -> tuple[str, ...]:
        """What the twin runs without, one by one."""
        return tuple(self.guard.split(" + ")) if self.guard else ()

    @property
    def opens(self) -> tuple[str, ...]:
        """All that the twin may get to see."""
        return (self.open,) if isinstance(self.open, str) else self.open
