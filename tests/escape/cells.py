"""The probes that are one cell: what it does, what it must see, what its twin sees."""

from __future__ import annotations

from tests.escape.probe import Probe

_CALL = "print(call({}))"


def _calls(
    number: int, guard: str, **calls: tuple[str, str | tuple[str, ...]]
) -> tuple[Probe, ...]:
    return tuple(
        Probe(
            number,
            name.replace("_", " "),
            "EPERM",
            guard,
            answer,
            f"{'arm(); ' if guard == 'filter' else ''}{_CALL.format(arguments)}",
            needs_root="Linux asks for capabilities of the host" if guard == "container" else "",
        )
        for name, (arguments, answer) in calls.items()
    )


_MOUNTS = _calls(
    17,
    "filter",
    mount=("'mount', b'none', b'/tmp', b'tmpfs', 0, 0", "ok"),
    bind_mount=("'mount', b'/usr', b'/tmp', 0, 4096, 0", "ok"),
    umount_of_a_mask=("'umount2', b'/proc/interrupts', 2", "ok"),
    remount_of_proc_sys=("'mount', 0, b'/proc/sys', 0, 32 | 4096, 0", "ok"),
    fsopen=("'fsopen', b'tmpfs', 0", "ok"),
    open_tree=("'open_tree', -100, b'/tmp', 1", "ok"),
    move_mount=("'move_mount', -1, b'', -1, b'', 0", "ENOENT"),
    mount_setattr=("'mount_setattr', -100, b'/tmp', 0, 0, 0", "EINVAL"),
    pivot_root=("'pivot_root', b'/tmp', b'/tmp'", "EINVAL"),
)

_NAMESPACES = (
    *_calls(
        18,
        "filter",
        unshare_user=("'unshare', 0x10000000", "ok"),
        unshare_mounts=("'unshare', 0x20000", "ok"),
    ),
    Probe(
        18, "clone with a user namespace", "EPERM", "filter", "ok",
        "flags = 0x10000000 | 17\n"
        "def child():\n"
        "    result = _libc.syscall(NR['clone'], flags, 0, 0, 0, 0)\n"
        "    if result == 0: os._exit(0)\n"
        "    return errno.errorcode[ctypes.get_errno()] if result < 0 else 'ok'\n"
        "print(fresh(child))",
    ),
    Probe(18, "clone3", "ENOSYS", "filter", "EINVAL", "print(call('clone3', 0, 0))"),
    Probe(
        9, "cgroup namespace for release_agent", "EPERM", "filter", "ok",
        "print(call('unshare', 0x10000000 | 0x20000 | 0x02000000))",
    ),
    Probe(
        19, "chroot twice", "EPERM", "filter", "ok",
        "arm(); os.makedirs('/tmp/inner', exist_ok=True); print(call('chroot', b'/tmp/inner'))",
    ),
)  # fmt: skip

# Arguments that no kernel acts on, so that the twin does no harm as root of the host.
_OBJECTS = (
    *_calls(
        20,
        "container",
        bpf=("'bpf', 99, 0, 0", "EINVAL"),
        perf_event_open=("'perf_event_open', 0, 0, -1, -1, 0", ("EFAULT", "EINVAL")),
        kexec_load=("'kexec_load', 0, 99, 0, 0", ("EINVAL", "ENOSYS")),
        init_module=("'init_module', 0, 0, 0", ("ENOEXEC", "EFAULT", "EINVAL", "ENOSYS")),
        delete_module=("'delete_module', b'no-such-module', 0", ("ENOENT", "ENOSYS")),
        swapon=("'swapon', b'/nowhere', 0", "ENOENT"),
        swapoff=("'swapoff', b'/nowhere'", "ENOENT"),
        reboot=("'reboot', 0, 0, 0, 0", "EINVAL"),
        settimeofday=("'settimeofday', 0, 0", "ok"),
        clock_settime=("'clock_settime', 99, 0", ("EFAULT", "EINVAL")),
        acct=("'acct', b'/nowhere'", ("ENOENT", "ENOSYS")),
        quotactl=("'quotactl', 0xFFFFFF00, 0, 0, 0", ("EINVAL", "ENOSYS", "ENODEV", "ENOTBLK")),
        syslog=("'syslog', 10, 0, 0", "ok"),
    ),
    *_calls(
        20,
        "filter",
        userfaultfd=("'userfaultfd', 1", "ok"),
        io_uring_setup=("'io_uring_setup', 1, 0", "EFAULT"),
        keyctl=("'keyctl', 0, -4 & (1 << 64) - 1, 1", "ok"),
        add_key=("'add_key', b'user', b'probe', b'x', 1, -3 & (1 << 64) - 1", "ok"),
        sethostname=("'sethostname', b'probe', 5", "ok"),
        setgroups=("'setgroups', 0, 0", "ok"),
    ),
    Probe(
        16, "open_by_handle_at", "EPERM", "container", ("ok", "ESTALE"),
        "handle = ctypes.create_string_buffer(struct.pack('=Ii', 128, 0) + bytes(128))\n"
        "where = ctypes.c_int()\n"
        "folder = os.open('/', os.O_RDONLY)\n"
        "assert call('name_to_handle_at', -100, b'/usr', ctypes.addressof(handle),"
        " ctypes.addressof(where), 0) in ('ok', 'EOPNOTSUPP')\n"
        "print(call('open_by_handle_at', folder, ctypes.addressof(handle), 0))",
        needs_root="Linux asks for CAP_DAC_READ_SEARCH of the host",
    ),
)  # fmt: skip

_SOCKETS = (
    *_calls(
        21,
        "filter",
        AF_ALG=("'socket', 38, 5, 0", ("ok", "EAFNOSUPPORT")),
        AF_VSOCK=("'socket', 40, 1, 0", ("ok", "EAFNOSUPPORT")),
    ),
    *_calls(21, "container", AF_PACKET=("'socket', 17, 3, 0", ("EAFNOSUPPORT", "ok"))),
    Probe(
        31, "raw socket", "EPERM", "container", "ok", "print(call('socket', 2, 3, 1))",
        needs_root="Linux asks for CAP_NET_RAW",
    ),
    Probe(
        23, "terminal injection (TIOCSTI)", "EPERM", "filter", ("ok", "EIO"),
        "import fcntl, termios\n"
        "def child():\n"
        "    os.setsid()\n"
        "    master, slave = os.openpty()\n"
        "    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)\n"
        "    return call('ioctl', slave, 0x5412, b'x')\n"
        "print(fresh(child))",
    ),
)  # fmt: skip

_PAGE = (
    "import mmap\n"
    "def native(code):\n"
    "    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
    "    page.write(bytes.fromhex(code))\n"
    "    at = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
    "    return ctypes.CFUNCTYPE(ctypes.c_int)(at)()\n"
)
_ABI = (
    # mov eax, 21 (mount); int 0x80; ret
    Probe(
        22, "mount by int 0x80", "SIGSYS", "filter", ("-14", "-1", "SIGSEGV"),
        _PAGE + "print(fresh(lambda: native('b81500000031db31c931d231f631ffcd80c3')))",
    ),
    # mov eax, 102 (socketcall); mov ebx, 1
    Probe(
        21, "socketcall by int 0x80", "SIGSYS", "filter", ("-14", "SIGSEGV"),
        _PAGE + "print(fresh(lambda: native('53b866000000bb0100000031c9cd805bc3')))",
    ),
    Probe(
        22, "x32 system call", "SIGSYS", "filter", ("ENOSYS", "ok"),
        "print(fresh(lambda: call(0x40000000 | 39)))",
    ),
)  # fmt: skip

_STATUS = (
    "status = dict(l.split(':\\t', 1) for l in open('/proc/self/status').read().splitlines())\n"
)
_PRIVILEGES = (
    Probe(
        25, "raising capabilities", "EPERM", "filter", "ok", "print(arm())",
    ),
    Probe(
        25, "capabilities in effect", "0 0 0", "filter", "2400c0 0 0",
        "arm()\n" + _STATUS
        + "print(*(f'{int(status[n], 16):x}' for n in ('CapEff', 'CapInh', 'CapAmb')))",
    ),
    Probe(
        24, "no_new_privs", "1", "no_new_privs", "0", _STATUS + "print(status['NoNewPrivs'])",
    ),
    Probe(26, "becoming root of the session", "EPERM", "filter", "ok",
          "arm(); print(fresh(lambda: attempt(os.setuid, 0)))"),
    Probe(
        26, "uid map that names the host's root", "no", "container", "yes",
        "print('yes' if any(int(l.split()[1]) == 0 for l in open('/proc/self/uid_map')) else 'no')",
        needs_root="the processes of an ordinary user see another map",
    ),
    Probe(38, "core dumps allowed again", "EPERM", "rlimits", "ok",
          "def act():\n"
          "    try: resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))\n"
          "    except ValueError: return 'EPERM'\n"  # what Python makes of it
          "    return 'ok'\n"
          "print(fresh(act))"),
    Probe(38, "more open files than the limit", "EPERM", "rlimits", "ok",
          "def act():\n"
          "    try: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n"
          "    except ValueError: return 'EPERM'\n"
          "    return 'ok'\n"
          "print(fresh(act))"),
)  # fmt: skip

_PROC = (
    Probe(1, "file of init's program (/proc/1/exe)", "ENOENT", "hidepid", "EACCES",
          "print(opened('/proc/1/exe', os.O_RDONLY))"),
    Probe(30, "environment of init", "ENOENT", "hidepid", "EACCES",
          "print(opened('/proc/1/environ', os.O_RDONLY))"),
    Probe(1, "the interpreter's own program, for writing", "EACCES", "container", "ETXTBSY",
          "print(opened('/proc/self/exe', os.O_RDWR))",
          needs_root="the program is not the ordinary user's"),
    # The link to the kernel, and the two ends with which asyncio wakes itself.
    Probe(2, "descriptors that are open", "null pipe pipe socket socket socket", "descriptors closed",
          "null pipe pipe socket socket socket true /",
          "kinds = []\n"
          "for fd in sorted(map(int, os.listdir('/proc/self/fd'))):\n"
          "    try: target = os.readlink(f'/proc/self/fd/{fd}')\n"
          "    except OSError: continue\n"  # of the listing itself
          "    kinds.append(target.partition(':')[0].rpartition('/')[2] or target)\n"
          "print(*kinds)"),
    Probe(12, "writing core_pattern", "EROFS", "read-only proc", "EACCES",
          "print(opened('/proc/sys/kernel/core_pattern', os.O_WRONLY | os.O_TRUNC))"),
    Probe(12, "writing the settings of panics", "EROFS", "read-only proc", "EACCES",
          "print(opened('/proc/sys/kernel/panic', os.O_WRONLY | os.O_TRUNC))"),
    Probe(12, "writing in /proc/irq", "EROFS", "read-only proc", "EACCES",
          "print(opened('/proc/irq/default_smp_affinity', os.O_WRONLY | os.O_TRUNC))"),
    Probe(12, "writing a setting of its own network", "EROFS", "read-only proc", "EACCES",
          "print(opened('/proc/sys/net/ipv4/ip_forward', os.O_WRONLY | os.O_TRUNC))"),
    Probe(13, "what masked files of proc tell", "nothing", "masks", "interrupts",
          "told = set()\n"
          "for name in 'kcore keys timer_list latency_stats sched_debug interrupts'.split():\n"
          "    try: told |= {name} if open(f'/proc/{name}', 'rb').read(1) else set()\n"
          "    except OSError: pass\n"
          "print('interrupts' if 'interrupts' in told else ' '.join(told) or 'nothing')"),
    Probe(11, "path of its cgroup", "/", "cgroup namespace", "a path",
          "paths = {l.rstrip().split(':', 2)[2] for l in open('/proc/self/cgroup')}\n"
          "print('/' if paths == {'/'} else 'a path')"),
    Probe(10, "cgroup file systems", "absent", "cgroupfs left out", "EACCES",
          "points = [l.split()[4] for l in open('/proc/self/mountinfo') if ' - cgroup' in l]\n"
          "print(opened(points[0] + '/cgroup.procs', os.O_WRONLY) if points else 'absent')"),
)  # fmt: skip

_PROCESSES = (
    Probe(27, "signal to init", "EPERM", "container", "ok", "print(attempt(os.kill, 1, 0))",
          needs_root="init of the host is root's"),
    Probe(27, "signal to the head", "EPERM", "heads' own user", "ok",
          "print(attempt(os.kill, os.getppid(), 0))"),
    Probe(27, "memory of the head", "EPERM", "heads' own user + heads undumpable",
          ("ok", "EFAULT", "Yama"),
          "buffer = ctypes.create_string_buffer(16)\n"
          "vector = struct.pack('=QQ', ctypes.addressof(buffer), 8)\n"
          "said = call('process_vm_readv', os.getppid(), vector, 1, vector, 1, 0)\n"
          "yama = '/proc/sys/kernel/yama/ptrace_scope'\n"
          "strict = os.path.exists(yama) and open(yama).read().strip() != '0'\n"
          "print('Yama' if TWIN and strict and said == 'EPERM' else said)"),
    Probe(27, "limits of the head", "EPERM", "heads' own user", "ok",
          "print(attempt(resource.prlimit, os.getppid(), resource.RLIMIT_NOFILE))"),
    Probe(27, "processes of the host in proc", "absent", "container", "there",
          "print(found(f'/proc/{HOST_PID}'))"),
    Probe(27, "signal to a process of the host", "ESRCH", "container", "ok",
          "print(attempt(os.kill, HOST_PID, 0))"),
)  # fmt: skip

_SURROUNDINGS = (
    Probe(28, "abstract socket of the host", "ECONNREFUSED", "network namespace", "ok",
          "s = socket.socket(socket.AF_UNIX)\n"
          "print(attempt(s.connect, '\\0' + ABSTRACT)); s.close()"),
    Probe(29, "Unix socket in a folder of the host", "ENOENT", "container", "ok",
          "s = socket.socket(socket.AF_UNIX)\nprint(attempt(s.connect, SOCKET)); s.close()"),
    Probe(31, "service on the host's loopback", "ECONNREFUSED", "network namespace", "ok",
          "s = socket.socket(); print(attempt(s.connect, ('127.0.0.1', PORT))); s.close()"),
    Probe(31, "address of the host in its network", "ENETUNREACH", "network namespace",
          ("ok", "ECONNREFUSED", "EINPROGRESS"),
          "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)\n"
          "print(attempt(s.connect, (ADDRESS, PORT))); s.close()"),
    Probe(31, "service of instances' metadata", "ENETUNREACH", "network namespace",
          ("EINPROGRESS", "ECONNREFUSED", "EHOSTUNREACH", "no route"),
          "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)\n"
          "said = attempt(s.connect, ('169.254.169.254', 80)); s.close()\n"
          "print('no route' if TWIN and said == 'ENETUNREACH' else said)"),
    Probe(32, "network interfaces of the host", "its own", "network namespace", "the host's",
          "print('the host\\'s' if os.readlink('/proc/self/ns/net') == NET else 'its own')"),
    Probe(30, "variables of the host's environment", "absent", "container", "there",
          "print('there' if 'SANDBOX_PROBE_TOKEN' in os.environ else 'absent')"),
    Probe(29, "sockets and keys of daemons and of Jupyter", "absent", "container", "there",
          "print('there' if any(map(os.path.lexists, PRIVATE)) else 'absent')"),
    Probe(14, "sysfs, with its powercap and uevent_helper", "absent", "container", "there",
          "print(found('/sys/kernel'))"),
    Probe(40, "a file of the image, for writing", "EROFS", "read-only binds", "ok",
          "print(opened('/opt/probe/file', os.O_RDWR))"),
    Probe(40, "the same through a descriptor of it", "EROFS", "read-only binds", "ok",
          "fd = os.open('/opt/probe/file', os.O_RDONLY)\n"
          "print(opened(f'/proc/self/fd/{fd}', os.O_RDWR)); os.close(fd)"),
    Probe(40, "a new file in a folder of the image", "EROFS", "read-only binds",
          ("ok", "EOVERFLOW"),  # nobody with an id of the session can own it

          "print(opened('/opt/probe/new', os.O_WRONLY | os.O_CREAT))"),
    Probe(40, "chattr of a file of the image", "EROFS", "read-only binds",
          ("ok", "EPERM", "EOPNOTSUPP", "ENOTTY"),
          "import fcntl\n"
          "fd = os.open('/opt/probe/file', os.O_RDONLY)\n"
          "print(attempt(fcntl.ioctl, fd, 0x40086602, struct.pack('l', 0))); os.close(fd)"),
    Probe(15, "mknod of a disk", "EPERM", "container", "ok",
          "print(attempt(os.mknod, f'{FOLDER}/disk' if os.path.isdir(FOLDER) else '/tmp/disk',"
          " stat.S_IFBLK | 0o600, os.makedev(8, 0)))",
          needs_root="Linux asks for CAP_MKNOD of the host"),
    Probe(15, "mknod of /dev/mem", "EPERM", "container", "ok",
          "print(attempt(os.mknod, f'{FOLDER}/mem' if os.path.isdir(FOLDER) else '/tmp/mem',"
          " stat.S_IFCHR | 0o600, os.makedev(1, 1)))",
          needs_root="Linux asks for CAP_MKNOD of the host"),
)  # fmt: skip

PROBES = (
    *_MOUNTS, *_NAMESPACES, *_OBJECTS, *_SOCKETS, *_ABI, *_PRIVILEGES, *_PROC, *_PROCESSES,
    *_SURROUNDINGS,
)  # fmt: skip
