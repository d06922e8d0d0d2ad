"""The filter, run in an interpreter of classic BPF: every number, both machines, any arguments."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.errors import ConfigError, HostError
from sandbox_kernel.linux import seccomp
from sandbox_kernel.linux.seccomp import (
    ALLOW,
    ENOSYS,
    EPERM,
    KILL,
    NOTIFY,
    Condition,
    Policy,
    Rule,
    cell_policy,
    compile_policy,
)
from sandbox_kernel.linux.syscalls import NUMBERS

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MACHINES = tuple(AUDIT_ARCH)

REFUSED_EVERYWHERE = """
    acct add_key adjtimex bpf chroot clock_adjtime clock_settime delete_module fanotify_init
    finit_module fsconfig fsmount fsopen fspick get_mempolicy init_module io_uring_enter
    io_uring_register io_uring_setup kcmp kexec_file_load kexec_load keyctl lookup_dcookie
    lsm_set_self_attr mbind migrate_pages mount mount_setattr move_mount move_pages nfsservctl
    open_by_handle_at open_tree open_tree_attr perf_event_open pivot_root quotactl quotactl_fd
    reboot request_key set_mempolicy set_mempolicy_home_node setdomainname setgroups sethostname
    settimeofday swapoff swapon syslog umount2 unshare userfaultfd vhangup
"""
REFUSED_ON_X86 = """
    _sysctl afs_syscall create_module epoll_ctl_old epoll_wait_old get_kernel_syms getpmsg ioperm
    iopl putpmsg query_module security sysfs tuxcall uselib ustat vserver
"""
REFUSED = {
    "x86_64": {*REFUSED_EVERYWHERE.split(), *REFUSED_ON_X86.split()},
    "aarch64": set(REFUSED_EVERYWHERE.split()),
}
ABSENT = {"clone3", "statmount", "listmount", "listns"}
ASKED = {"capset", "setns"}
BY_ARGUMENT = {
    "clone", "ioctl", "personality", "socket", "socketpair", "setuid", "setgid", "setfsuid",
    "setfsgid", "setreuid", "setregid", "setresuid", "setresgid",
}  # fmt: skip

WORD = st.integers(0, 2**64 - 1)
HIGH = st.integers(0, 2**32 - 1)
ARGS = st.tuples(*[WORD] * 6)


def evaluate(program: bytes, *, arch: int, nr: int, args: tuple[int, ...] = ()) -> int:
    """Run a seccomp program as the kernel would; only the opcodes that it may use exist."""
    args = (*args, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", nr & 0xFFFFFFFF, arch, 0x7F0000000000, *args)
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator, at = 0, 0
    while True:
        opcode, if_true, if_false, value = code[at]
        at += 1
        if opcode == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif opcode == 0x54:
            accumulator &= value
        elif opcode == 0x05:
            at += value
        elif opcode == 0x15:
            at += if_true if accumulator == value else if_false
        elif opcode == 0x35:
            at += if_true if accumulator >= value else if_false
        elif opcode == 0x06:
            return int(value)
        else:
            raise AssertionError(f"opcode {opcode:#x}")


def verdict(call: str, *args: int, machine: str = "x86_64") -> int:
    program = compile_policy(cell_policy(), machine)
    number = NUMBERS[machine][call]
    return evaluate(program, arch=AUDIT_ARCH[machine], nr=number, args=args)


def expected(call: str, machine: str) -> int:
    if call in ASKED:
        return NOTIFY
    if call in ABSENT:
        return ENOSYS
    if call in REFUSED[machine]:
        return EPERM
    return ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_has_the_expected_answer(machine: str) -> None:
    program = compile_policy(cell_policy(), machine)
    names = {number: name for name, number in NUMBERS[machine].items()}
    wrong = []
    for number in range(1200):
        call = names.get(number)
        if call in BY_ARGUMENT:
            continue
        wanted = expected(call, machine) if call else ENOSYS
        got = evaluate(program, arch=AUDIT_ARCH[machine], nr=number)
        if got != wanted:
            wrong.append((number, call, hex(got), hex(wanted)))
    assert wrong == []


@pytest.mark.parametrize("machine", MACHINES)
@given(args=ARGS, data=st.data())
def test_arguments_never_change_the_answer_of_other_calls(
    machine: str, args: tuple[int, ...], data: st.DataObject
) -> None:
    call = data.draw(st.sampled_from(sorted(set(NUMBERS[machine]) - BY_ARGUMENT)))
    assert verdict(call, *args, machine=machine) == expected(call, machine)


@given(arch=HIGH.filter(lambda arch: arch != AUDIT_ARCH["x86_64"]), nr=HIGH, args=ARGS)
def test_another_architecture_is_killed(arch: int, nr: int, args: tuple[int, ...]) -> None:
    assert evaluate(compile_policy(cell_policy(), "x86_64"), arch=arch, nr=nr, args=args) == KILL


@pytest.mark.parametrize("arch", [0x40000003, 0x40000028, AUDIT_ARCH["aarch64"]])
def test_known_other_architectures_are_killed(arch: int) -> None:
    assert evaluate(compile_policy(cell_policy(), "x86_64"), arch=arch, nr=20) == KILL


@given(low=st.integers(0, 2**30 - 1))
def test_x32_numbers_are_killed(low: int) -> None:
    program = compile_policy(cell_policy(), "x86_64")
    assert evaluate(program, arch=AUDIT_ARCH["x86_64"], nr=0x40000000 | low) == KILL


@pytest.mark.parametrize("machine", MACHINES)
@given(nr=st.integers(2**31, 2**32 - 1))
def test_negative_numbers_are_unknown(machine: str, nr: int) -> None:
    program = compile_policy(cell_policy(), machine)
    assert evaluate(program, arch=AUDIT_ARCH[machine], nr=nr) == ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
@given(nr=st.integers(700, 2**30 - 1))
def test_numbers_past_the_table_are_unknown(machine: str, nr: int) -> None:
    program = compile_policy(cell_policy(), machine)
    assert evaluate(program, arch=AUDIT_ARCH[machine], nr=nr) == ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
@given(flags=WORD)
def test_clone_makes_no_namespace(machine: str, flags: int) -> None:
    wanted = EPERM if flags & 0x7E020000 else ALLOW
    assert verdict("clone", flags, machine=machine) == wanted


@pytest.mark.parametrize("shift", [17, 25, 26, 27, 28, 29, 30])
def test_clone_is_refused_for_each_namespace_alone(shift: int) -> None:
    assert verdict("clone", 1 << shift | 17) == EPERM


def test_clone_for_threads_and_forks_is_allowed() -> None:
    assert verdict("clone", 0x3D0F00) == ALLOW  # pthread_create of glibc
    assert verdict("clone", 0x01200011) == ALLOW  # fork of glibc
    assert verdict("clone", 0x8000 | 17) == ALLOW  # CLONE_PARENT


@pytest.mark.parametrize("call", ["socket", "socketpair"])
@given(family=st.integers(0, 2**32 - 1) | st.integers(0, 50), high=HIGH)
def test_socket_families(call: str, family: int, high: int) -> None:
    wanted = ALLOW if family in (1, 2, 10, 16) else EPERM
    assert verdict(call, high << 32 | family) == wanted


@given(request=st.integers(0, 2**32 - 1) | st.sampled_from([0x5412, 0x541C]), high=HIGH)
def test_ioctl_allows_all_but_terminal_injection(request: int, high: int) -> None:
    wanted = EPERM if request in (0x5412, 0x541C) else ALLOW
    assert verdict("ioctl", 3, high << 32 | request) == wanted


IDS = st.sampled_from([0, 1, 999, 1000, 1001, 1002, 0xFFFFFFFE, 0xFFFFFFFF]) | HIGH


@pytest.mark.parametrize("machine", MACHINES)
@given(ids=st.tuples(IDS, IDS, IDS), high=HIGH)
def test_only_the_two_users_of_a_session(machine: str, ids: tuple[int, ...], high: int) -> None:
    args = tuple(high << 32 | one for one in ids)
    fine = [one in (1000, 1001, 0xFFFFFFFF) for one in ids]
    calls = {1: ("uid", "gid", "fsuid", "fsgid"), 2: ("reuid", "regid"), 3: ("resuid", "resgid")}
    for count, names in calls.items():
        wanted = ALLOW if all(fine[:count]) else EPERM
        for name in names:
            assert verdict(f"set{name}", *args, machine=machine) == wanted


@given(value=HIGH | st.sampled_from([0, 8, 0x20000, 0x20008, 0xFFFFFFFF, 0x40000]))
def test_personality(value: int) -> None:
    wanted = ALLOW if value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF) else EPERM
    assert verdict("personality", value) == wanted


@pytest.mark.parametrize("machine", MACHINES)
def test_program_is_one_that_the_kernel_takes(machine: str) -> None:
    code = list(struct.iter_unpack("=HBBI", compile_policy(cell_policy(), machine)))
    assert len(code) <= 512
    for at, (opcode, if_true, if_false, value) in enumerate(code):
        reach = value if opcode == 0x05 else max(if_true, if_false)
        assert at + 1 + reach < len(code) or opcode == 0x06
        assert opcode != 0x20 or (value % 4 == 0 and value < 64)
    assert code[-1][0] == 0x06


def test_jumps_that_eight_bits_do_not_hold() -> None:
    calls = sorted(NUMBERS["x86_64"])
    rules = tuple(
        Rule((call,), ALLOW, (Condition(0, tuple(range(index, index + 3))),))
        for index, call in enumerate(calls)
    )
    program = compile_policy(Policy(rules), "x86_64")
    for index, call in enumerate(calls):
        for value in range(index - 1, index + 4):
            wanted = ALLOW if index <= value < index + 3 else EPERM
            nr = NUMBERS["x86_64"][call]
            args = (value & 0xFFFFFFFF,)
            assert evaluate(program, arch=AUDIT_ARCH["x86_64"], nr=nr, args=args) == wanted


def test_first_rule_that_fits_decides() -> None:
    busy = seccomp.refuse(errno.EBUSY)
    policy = Policy((Rule(("read",), busy, (Condition(2, (7,)),)), Rule(("read",), ALLOW)))
    program = compile_policy(policy, "x86_64")
    for count, wanted in ((7, busy), (8, ALLOW)):
        assert evaluate(program, arch=AUDIT_ARCH["x86_64"], nr=0, args=(0, 0, count)) == wanted


def test_misspelt_call_is_an_error() -> None:
    with pytest.raises(ConfigError, match="raed"):
        Policy((Rule(("raed",), ALLOW),))


def test_unknown_machine_is_an_error() -> None:
    with pytest.raises(HostError, match="riscv64"):
        compile_policy(cell_policy(), "riscv64")


def test_too_long_a_program_is_an_error() -> None:
    policy = Policy(
        (Rule(("read",), ALLOW, tuple(Condition(0, tuple(range(200))) for _ in range(30))),)
    )
    with pytest.raises(HostError, match="instructions"):
        compile_policy(policy, "x86_64")


def test_too_many_values_for_a_jump_are_an_error() -> None:
    with pytest.raises(ConfigError, match="values"):
        Policy((Rule(("read",), ALLOW, (Condition(0, tuple(range(300))),)),))


@pytest.mark.parametrize(
    ("call", "x86_64", "aarch64"),
    [("clone", 56, 220), ("capset", 126, 91), ("seccomp", 317, 277), ("openat2", 437, 437)],
)
def test_numbers_of_a_few_calls(call: str, x86_64: int, aarch64: int) -> None:
    assert (NUMBERS["x86_64"][call], NUMBERS["aarch64"][call]) == (x86_64, aarch64)


def test_tables_name_each_number_once() -> None:
    for numbers in NUMBERS.values():
        assert len(set(numbers.values())) == len(numbers)


GUARDED = "kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal".split()


@pytest.mark.parametrize("machine", MACHINES)
def test_a_session_with_one_user_has_its_signals_asked(machine: str) -> None:
    def act(name: str, *args: int, guards: bool = True) -> int:
        program = compile_policy(cell_policy(guards_signals=guards), machine)
        number = NUMBERS[machine][name]
        return evaluate(program, arch=AUDIT_ARCH[machine], nr=number, args=args)

    for name in GUARDED:
        assert act(name, 5, 9) == NOTIFY
        assert act(name, 5, 9, guards=False) == ALLOW
    for name in ("prlimit64", "sched_setaffinity", "sched_setattr", "sched_setscheduler"):
        assert act(name, 0, 7) == ALLOW
        assert act(name, 5, 7) == NOTIFY
    one_process, of_a_user = 0, 2
    assert act("setpriority", one_process, 0, 5) == ALLOW
    assert act("setpriority", one_process, 5, 5) == NOTIFY
    assert act("setpriority", of_a_user, 0, 5) == NOTIFY
    set_owner, get_flags = 8, 3
    assert act("fcntl", 5, set_owner, 7) == EPERM
    assert act("fcntl", 5, get_flags) == ALLOW
    assert act("fcntl", 5, set_owner, 7, guards=False) == ALLOW
