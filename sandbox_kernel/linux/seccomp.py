"""Which system calls a cell may make, and the classic-BPF program that says so to the kernel.

A policy is a value: rules over names of calls, of which the first that fits decides. A call that
no rule names is refused with EPERM; a number that the table does not know is answered ENOSYS,
as an older kernel would, so that programs fall back.

Arguments are compared in their low 32 bits only, since every argument that a rule looks at is a C
`int` or `unsigned int`, of which the kernel itself ignores the high half.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from functools import cache
from os import uname

from sandbox_kernel.errors import ConfigError, HostError
from sandbox_kernel.linux.syscalls import NUMBERS
from sandbox_kernel.model import CELL_UID, HEAD_UID

ALLOW = 0x7FFF0000
NOTIFY = 0x7FC00000
"""Ask whoever holds the listener; ENOSYS if there is none."""
KILL = 0x80000000
"""End the whole process by SIGSYS."""

MAX_INSTRUCTIONS = 4096

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# x32 calls pass as x86_64 with this bit in the number. Numbers from 2**31 on are no x32 calls:
# the kernel answers -1, which tracers use, with ENOSYS.
_X32_BIT = 0x40000000
_SIGN_BIT = 0x80000000
_LOW_32 = 0xFFFFFFFF
_MAX_OFFSET = 255  # of a conditional jump


def refuse(number: int) -> int:
    """Give the action that makes a call fail with the errno `number`."""
    return 0x00050000 | number


EPERM = refuse(errno.EPERM)
ENOSYS = refuse(errno.ENOSYS)


@dataclass(frozen=True)
class Condition:
    """True of a call if its argument (0 to 5), cut to 32 bits and masked, is one of `values`."""

    argument: int
    values: tuple[int, ...]
    mask: int = _LOW_32

    def __post_init__(self) -> None:
        """Refuse what no program can say: a jump reaches 255 instructions."""
        if not (0 <= self.argument <= 5 and 1 <= len(self.values) < _MAX_OFFSET):
            raise ConfigError(
                f"seccomp: argument {self.argument} with {len(self.values)} values",
                hint=f"arguments count from 0 to 5, values from 1 to {_MAX_OFFSET - 1}",
            )


@dataclass(frozen=True)
class Rule:
    """What happens to a call of one of these names, if all conditions hold."""

    calls: tuple[str, ...]
    action: int
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Policy:
    """Rules of which the first that fits decides; EPERM where none does.

    Raises ConfigError for a name that is no system call on any machine we know.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        """Refuse misspelt names: a rule that never fits would open or close the wrong call."""
        named = {call for rule in self.rules for call in rule.calls}
        if unknown := sorted(named.difference(*NUMBERS.values())):
            raise ConfigError(
                f"seccomp: no system call is named {', '.join(unknown)}",
                hint="correct the rule, or add the call to linux/syscalls.py",
            )


_FILES = """
    access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 epoll_create
    epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 faccessat
    faccessat2 fadvise64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchownat
    fcntl fdatasync fgetxattr file_getattr file_setattr flistxattr flock fremovexattr fsetxattr
    fstat fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr getxattrat
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents
    io_pgetevents io_setup io_submit lchown lgetxattr link linkat listxattr listxattrat llistxattr
    lremovexattr lseek lsetxattr lstat memfd_create mkdir mkdirat mknod mknodat name_to_handle_at
    newfstatat open openat openat2 pipe pipe2 poll ppoll pread64 preadv preadv2 pselect6 pwrite64
    pwritev pwritev2 read readahead readlink readlinkat readv removexattr removexattrat rename
    renameat renameat2 rmdir select sendfile setxattr setxattrat signalfd signalfd4 splice stat
    statfs statx symlink symlinkat sync sync_file_range syncfs tee truncate umask unlink unlinkat
    utime utimensat utimes vmsplice write writev
"""
_MEMORY = """
    brk cachestat madvise map_shadow_stack membarrier memfd_secret mincore mlock mlock2 mlockall
    mmap mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect
    process_madvise process_mrelease remap_file_pages
"""
_PROCESSES = """
    arch_prctl capget execve execveat exit exit_group fork get_robust_list get_thread_area getcpu
    getegid geteuid getgid getgroups getpgid getpgrp getpid getppid getpriority getresgid getresuid
    getrlimit getrusage getsid gettid getuid ioprio_get ioprio_set landlock_add_rule
    landlock_create_ruleset landlock_restrict_self lsm_get_self_attr lsm_list_modules modify_ldt
    pidfd_getfd pidfd_open pidfd_send_signal prctl prlimit64 process_vm_readv process_vm_writev
    ptrace rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
    sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr
    sched_setparam sched_setscheduler sched_yield seccomp set_robust_list set_thread_area
    set_tid_address setpgid setpriority setrlimit setsid sysinfo times uname uprobe uretprobe vfork
    wait4 waitid
"""
_SIGNALS_AND_TIME = """
    alarm clock_getres clock_gettime clock_nanosleep futex futex_requeue futex_wait futex_waitv
    futex_wake getitimer getrandom gettimeofday kill nanosleep pause restart_syscall rt_sigaction
    rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo setitimer sigaltstack tgkill time timer_create timer_delete timer_getoverrun
    timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime tkill
"""
_MESSAGES = """
    accept accept4 bind connect getpeername getsockname getsockopt listen mq_getsetattr mq_notify
    mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd recvfrom recvmmsg
    recvmsg semctl semget semop semtimedop sendmmsg sendmsg sendto setsockopt shmat shmctl shmdt
    shmget shutdown
"""
_ALLOWED = " ".join((_FILES, _MEMORY, _PROCESSES, _SIGNALS_AND_TIME, _MESSAGES))

# The rest of the tables is refused without a rule, whoever asks and whatever he holds: mounts,
# namespaces, chroot, bpf, perf, userfaultfd, io_uring (which runs calls past any filter), keys,
# handles, modules, kexec, swap, clocks, quotas, the log, ports, names of the host, setgroups.

# Introspection so new that programs ask whether it is there: refused as on an older kernel.
_ABSENT = ("clone3", "statmount", "listmount", "listns")

# Every bit but CLONE_NEWTIME, which clone(2) reads as part of the exit signal.
_CLONE_NAMESPACES = 0x7E020000
# AF_UNIX, AF_INET, AF_INET6, AF_NETLINK. The others are seldom-used kernel code, some (VSOCK,
# ALG) of which no namespace confines.
_SOCKET_FAMILIES = (1, 2, 10, 16)
_TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
# PER_LINUX, PER_LINUX32, both with UNAME26, and the question "which?". Not the flags that weaken
# address randomisation or make readable pages executable.
_PERSONALITIES = (0, 0x8, 0x20000, 0x20008, _LOW_32)
_UNCHANGED = _LOW_32

SIGNALLING = (
    "kill",
    "tkill",
    "tgkill",
    "rt_sigqueueinfo",
    "rt_tgsigqueueinfo",
    "pidfd_send_signal",
)
"""Calls that send a signal to whom they name."""
_TUNING = ("prlimit64", "sched_setaffinity", "sched_setattr", "sched_setparam")
STEERING = dict.fromkeys((*_TUNING, "sched_setscheduler"), 0) | dict.fromkeys(
    ("setpriority", "ioprio_set"), 1
)
"""Calls that change another process, and which of their arguments is its pid (0: the caller)."""
ONE_PROCESS = {"setpriority": 0, "ioprio_set": 1}
"""What the first argument is where those two mean one process, not a group or a user."""
_SET_OWNER = (8, 15)  # F_SETOWN, F_SETOWN_EX: who gets SIGIO
_SET_OWNER_IOCTLS = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP


def _signal_rules() -> tuple[Rule, ...]:
    """Give the rules for a session of which all processes have the same user.

    There a cell could signal the heads, and what Linux does not tell apart init does.
    """
    itself = (0,)
    others = tuple(
        Rule((name,), ALLOW, (Condition(1, itself), Condition(0, (ONE_PROCESS[name],))))
        if name in ONE_PROCESS
        else Rule((name,), ALLOW, (Condition(at, itself),))
        for name, at in STEERING.items()
    )
    return (
        Rule(SIGNALLING, NOTIFY),
        *others,
        Rule(tuple(STEERING), NOTIFY),
        Rule(("fcntl",), EPERM, (Condition(1, _SET_OWNER),)),
        Rule(("ioctl",), EPERM, (Condition(1, _SET_OWNER_IOCTLS),)),
    )


@cache
def cell_policy(
    ids: tuple[int, ...] = (CELL_UID, HEAD_UID), *, guards_signals: bool = False
) -> Policy:
    """Give the policy of every process in a cell, the interpreter's included.

    Changing capabilities or namespaces is asked of the listener's holder: an interpreter needs it
    to enter its next container. For the same reason it may switch between `ids`, the users of a
    session. clone3 is absent since a filter cannot read its flags in memory. With
    `guards_signals` signals are asked of the listener's holder, too: for a session with one user.
    """
    users = (_UNCHANGED, *ids)
    one, two, three = (tuple(Condition(at, users) for at in range(count)) for count in (1, 2, 3))
    return Policy(
        (
            *(_signal_rules() if guards_signals else ()),
            Rule(("capset", "setns"), NOTIFY),
            Rule(_ABSENT, ENOSYS),
            Rule(("clone",), ALLOW, (Condition(0, (0,), mask=_CLONE_NAMESPACES),)),
            Rule(("socket", "socketpair"), ALLOW, (Condition(0, _SOCKET_FAMILIES),)),
            Rule(("ioctl",), EPERM, (Condition(1, _TERMINAL_INJECTION),)),
            Rule(("ioctl",), ALLOW),
            Rule(("personality",), ALLOW, (Condition(0, _PERSONALITIES),)),
            Rule(("setuid", "setgid", "setfsuid", "setfsgid"), ALLOW, one),
            Rule(("setreuid", "setregid"), ALLOW, two),
            Rule(("setresuid", "setresgid"), ALLOW, three),
            Rule(tuple(_ALLOWED.split()), ALLOW),
        )
    )


@cache
def job_policy() -> Policy:
    """Give the policy of a step of a build: what a cell may, and what installing software needs.

    That is other users, groups, capabilities given up, and chroot. Mounts and namespaces are
    refused as to cells.
    """
    return Policy(
        (
            Rule(_ABSENT, ENOSYS),
            Rule(("clone",), ALLOW, (Condition(0, (0,), mask=_CLONE_NAMESPACES),)),
            Rule(("socket", "socketpair"), ALLOW, (Condition(0, _SOCKET_FAMILIES),)),
            Rule(("ioctl",), EPERM, (Condition(1, _TERMINAL_INJECTION),)),
            Rule(("ioctl", "capset", "chroot"), ALLOW),
            Rule(("personality",), ALLOW, (Condition(0, _PERSONALITIES),)),
            Rule(("setuid", "setgid", "setfsuid", "setfsgid", "setgroups"), ALLOW),
            Rule(("setreuid", "setregid", "setresuid", "setresgid"), ALLOW),
            Rule(tuple(_ALLOWED.split()), ALLOW),
        )
    )


@cache
def compile_policy(policy: Policy, arch: str = "") -> bytes:
    """Give the program (`struct sock_filter[]`) for a machine as uname(2) names it; ours if empty.

    Raises HostError for a machine whose calls we have no table of, or a program too long.
    """
    arch = arch or uname().machine
    if arch not in NUMBERS:
        raise HostError(
            f"seccomp: there is no table of system calls for the machine {arch!r}",
            hint=f"run on one of {', '.join(NUMBERS)}",
        )
    code = [
        _instruction(_LOAD, 4),
        _instruction(_IF_EQUAL, _AUDIT_ARCH[arch], (1, 0)),
        _instruction(_RETURN, KILL),
        _instruction(_LOAD, 0),
        *_search(_ranges(policy, arch)),
    ]
    if len(code) > MAX_INSTRUCTIONS:
        raise HostError(
            f"seccomp: {len(code)} instructions, the kernel takes {MAX_INSTRUCTIONS}",
            hint="shorten the policy",
        )
    return b"".join(code)


# Opcodes of linux/bpf_common.h: class | size or operation | mode or source. The kernel knows
# from these alone which calls are allowed always, and skips the program for them (Linux 5.11).
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP = 0x05  # BPF_JMP | BPF_JA
_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

_Code = list[bytes]
_Range = tuple[int, _Code]
"""The first number of a range, and the code for it, which ends in a return and can be moved."""


def _instruction(code: int, value: int, jumps: tuple[int, int] = (0, 0)) -> bytes:
    # struct sock_filter: how many instructions to skip if true and if false stand before the value.
    return struct.pack("=HBBI", code, *jumps, value)


def _ranges(policy: Policy, arch: str) -> list[_Range]:
    """Cut all 2**32 numbers into ranges of the same code, in order."""
    by_number = {number: _decide(policy, name) for name, number in NUMBERS[arch].items()}
    unknown = [_instruction(_RETURN, ENOSYS)]
    ranges: list[_Range] = []
    for number in range(max(by_number) + 2):
        code = by_number.get(number, unknown)
        if not ranges or ranges[-1][1] != code:
            ranges.append((number, code))
    if arch == "x86_64":
        ranges += [(_X32_BIT, [_instruction(_RETURN, KILL)]), (_SIGN_BIT, unknown)]
    return ranges


def _search(ranges: list[_Range]) -> _Code:
    """Find the range of the number in the accumulator by halves."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below, above = _search(ranges[:middle]), _search(ranges[middle:])
    pivot = ranges[middle][0]
    if len(below) <= _MAX_OFFSET:
        branch = [_instruction(_IF_AT_LEAST, pivot, (len(below), 0))]
    else:  # a conditional jump has 8 bits, an unconditional one 32
        branch = [_instruction(_IF_AT_LEAST, pivot, (0, 1)), _instruction(_JUMP, len(below))]
    return branch + below + above


def _decide(policy: Policy, call: str) -> _Code:
    """Give the code that tries the rules for one call, in order."""
    code = [_instruction(_RETURN, EPERM)]
    for rule in reversed(policy.rules):
        if call not in rule.calls:
            continue
        hit = [_instruction(_RETURN, rule.action)]
        if not rule.conditions:
            code = hit
            continue
        for condition in reversed(rule.conditions):
            hit = _guard(condition, hit)
        code = hit + code
    return code


def _guard(condition: Condition, body: _Code) -> _Code:
    """Put a condition before `body`, which is skipped if the condition fails."""
    # struct seccomp_data: the arguments, 64 bits each, from byte 16 on; little-endian.
    code = [_instruction(_LOAD, 16 + 8 * condition.argument)]
    if condition.mask != _LOW_32:
        code.append(_instruction(_AND, condition.mask))
    far = len(body) > _MAX_OFFSET
    last = len(condition.values) - 1
    for at, value in enumerate(condition.values):
        miss = 0 if at < last or far else len(body)
        code.append(_instruction(_IF_EQUAL, value, (last - at + far, miss)))
    if far:
        code.append(_instruction(_JUMP, len(body)))
    return code + body
