"""A host with less: runs `doctor --json` where something real was taken away.

Nothing is pretended. Whatever a `Host` asks for is done by the kernel of Linux, in namespaces
that end with the process: mounts over files, a limit of user namespaces, a filter of system
calls, another user. Needs root. Run as a program with the fields of a `Host` as JSON.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[2])
ORDINARY = 12345
"""Nobody's user id, and one that no range of subordinate ids holds."""
TIMEOUT_S = 100


@dataclass(frozen=True)
class Host:
    """What is otherwise than on the host as it is."""

    uid: int = 0
    """The user who runs doctor."""
    files: dict[str, str] = field(default_factory=dict)
    """What other content files have; a file that is not there is made, empty, and stays."""
    without: tuple[str, ...] = ()
    """Files and folders that are covered: by /dev/null, or by nothing at all."""
    nosuid: str = ""
    """A folder that is mounted so that no setuid program works."""
    max_user_namespaces: int | None = None
    no_new_privs: bool = False
    denied: tuple[str, ...] = ()
    """System calls that fail with EPERM."""
    denied_flags: int = 0
    """CLONE_* flags with which clone fails with EPERM."""
    environ: dict[str, str] = field(default_factory=dict)

    def doctor(self, folder: Path | str = "/usr") -> dict[str, Any]:
        """Run doctor in a folder, and give its document."""
        argv = [sys.executable, __file__, json.dumps(asdict(self))]
        env = {**os.environ, "PYTHONPATH": ROOT, **self.environ}
        for name in {"DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"} - self.environ.keys():
            env.pop(name, None)  # they are root's
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, cwd=folder
        )
        assert done.stdout.startswith("{"), done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if document["ok"] else 1)
        return document


ALONE = Host(uid=ORDINARY)
"""An ordinary user without a name and without ranges."""
RANGED = Host(
    uid=ORDINARY,
    files={
        "/etc/subuid": f"{ORDINARY}:700000000:65536\n",
        "/etc/subgid": f"{ORDINARY}:700000000:65536\n",
        # newuidmap serves nobody without a name.
        "/etc/passwd": f"root:x:0:0::/:\nranged:x:{ORDINARY}:{ORDINARY}::/:\n",
    },
)
NO_NAMESPACES = Host(uid=ORDINARY, max_user_namespaces=0)
MASKED = Host(without=("/proc/irq", "/proc/keys"))


def main(host: Host) -> int:
    """Become that host, and run doctor."""
    from sandbox_kernel.cli import main as command_line
    from sandbox_kernel.linux import libc

    # What an ordinary user could not read any more: Python may be installed in root's home.
    for name in ("sandbox_kernel.cli.doctor", "encodings.ascii", "pwd", "select", "time"):
        __import__(name)
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("none", "/", flags=libc.MS_REC | libc.MS_PRIVATE)
    for path, content in host.files.items():
        _cover_file(path, content)
    for path in host.without:
        if os.path.isdir(path):
            libc.mount("none", path, fstype="tmpfs", flags=libc.MS_RDONLY)
        else:
            libc.mount("/dev/null", path, flags=libc.MS_BIND)
    if host.nosuid:
        libc.mount(host.nosuid, host.nosuid, flags=libc.MS_BIND)
        libc.mount_setattr(host.nosuid, attr_set=libc.MOUNT_ATTR_NOSUID)
    if host.max_user_namespaces is not None:
        _limit_user_namespaces(host.max_user_namespaces)
    if host.uid:
        os.setgroups([])
        os.setresgid(host.uid, host.uid, host.uid)
        os.setresuid(host.uid, host.uid, host.uid)
        libc.set_dumpable(True)
    if host.no_new_privs or host.denied or host.denied_flags:
        libc.set_no_new_privs()
    if host.denied or host.denied_flags:
        libc.seccomp_load(_filter(host.denied, host.denied_flags))
    return command_line.run_command(["doctor", "--json"])


def _cover_file(path: str, content: str) -> None:
    """Lay a file in memory over another."""
    from sandbox_kernel.linux import libc

    Path(path).touch()
    libc.mount("none", "/mnt", fstype="tmpfs", data="mode=0755")
    Path("/mnt/cover").write_text(content)
    libc.mount("/mnt/cover", path, flags=libc.MS_BIND)
    libc.umount2("/mnt", libc.MNT_DETACH)


def _limit_user_namespaces(count: int) -> None:
    """Go on in a user namespace with the same ids, which may have so many more inside."""
    from sandbox_kernel.linux import idmap, libc

    ready, go = os.pipe()
    pid = libc.clone(libc.CLONE_NEWUSER)
    if pid:
        extents = ((0, 0, 1 << 16),)
        idmap.write(pid, idmap.IdMap("high", extents, extents))
        os.write(go, b"g")
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.read(ready, 1)
    Path("/proc/sys/user/max_user_namespaces").write_text(str(count))


def _filter(denied: tuple[str, ...], flags: int) -> bytes:
    """Give a program of seccomp(2) that denies calls by name, and clone with certain flags."""
    from sandbox_kernel.linux.syscalls import NUMBERS

    def step(code: int, value: int, jumps: tuple[int, int] = (0, 0)) -> bytes:
        return struct.pack("=HBBI", code, *jumps, value)

    numbers = NUMBERS[os.uname().machine]
    load, equal, any_of, give = 0x20, 0x15, 0x45, 0x06
    eperm, allow = step(give, 0x00050001), step(give, 0x7FFF0000)
    program = [step(load, 0)]
    for name in denied:
        program += [step(equal, numbers[name], (0, 1)), eperm]
    # The first argument's lower half, on a little-endian machine.
    program += [step(equal, numbers["clone"], (0, 3)), step(load, 16)]
    program += [step(any_of, flags, (0, 1)), eperm, allow]
    return b"".join(program)


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    for name in ("without", "denied"):
        fields[name] = tuple(fields[name])
    sys.exit(main(Host(**fields)))
