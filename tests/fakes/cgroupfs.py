"""A cgroup file system in ordinary directories: layout and refusals as the kernel's, no force.

It knows the files of each controller, which process is where, the rule of v2 that inner groups
hold no process, the order of memory and memory+swap, and when a directory is busy. It enforces
no limit and counts nothing; tests/contract runs one suite over it and over the kernel's.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from sandbox_kernel.linux.cgroup_files import CgroupFiles

MEMSW = "memory.memsw.limit_in_bytes"
CONTROLLERS = ("cpu", "io", "memory", "pids")
DISK = (8, 0)
"""The only device that there is."""
DISK_NAME = "8:0"
UNLIMITED = "9223372036854771712"
V1_FILES = {
    "memory": {
        "memory.limit_in_bytes": UNLIMITED,
        "memory.memsw.limit_in_bytes": UNLIMITED,
        "memory.swappiness": "60",
        "memory.use_hierarchy": "1",
        "memory.usage_in_bytes": "4096",
        "memory.max_usage_in_bytes": "8192",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
    },
    "cpu": {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "-1"},
    "cpuacct": {"cpuacct.usage": "2000000000"},
    "pids": {"pids.max": "max", "pids.peak": "3", "pids.events": "max 0\n"},
    "blkio": {"blkio.throttle.read_bps_device": "", "blkio.throttle.write_bps_device": ""},
    "freezer": {"freezer.state": "THAWED"},
}
V2_FILES = {
    "memory": {
        "memory.max": "max",
        "memory.swap.max": "max",
        "memory.oom.group": "0",
        "memory.current": "4096",
        "memory.peak": "8192",
        "memory.events": "oom 0\noom_kill 0\n",
        "memory.events.local": "oom 0\noom_kill 0\n",
    },
    "cpu": {"cpu.max": "max 100000"},
    "io": {"io.max": ""},
    "pids": V1_FILES["pids"],
}


class FakeCgroupFiles(CgroupFiles):
    """Files whose kernel is in this class."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def make_dir(self, path: str, *, dir_fd: int | None = None) -> int:
        """Make a group with its files."""
        target = Path(path) if dir_fd is None else _path(dir_fd) / path
        self._host.refuse_write(target)
        if self._host.mkdir_errno:
            raise OSError(self._host.mkdir_errno, os.strerror(self._host.mkdir_errno))
        target.mkdir()
        self._host.fill(target)
        return super().open_dir(str(target))

    def remove_dir(self, path: str) -> None:
        """Remove a group; EBUSY when it holds processes or groups."""
        target = Path(path)
        if any(p.is_dir() for p in target.iterdir()) or self._host.members(target):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        shutil.rmtree(target)

    def read(self, dir_fd: int, name: str) -> str:
        """Read a file; the dead leave cgroup.procs."""
        if name == "cgroup.procs":
            return "".join(f"{pid}\n" for pid in self._host.members(_path(dir_fd)))
        if name == "cgroup.events":
            self._host.refresh(_path(dir_fd))
        return super().read(dir_fd, name)

    def open(self, dir_fd: int, name: str) -> int:
        """Open a file as it is now."""
        if name == "cgroup.events":
            self._host.refresh(_path(dir_fd))
        return super().open(dir_fd, name)

    def write(self, dir_fd: int, name: str, text: str) -> None:
        """Act as the kernel would on the value."""
        self.open_for_writing(dir_fd, name)
        self._host.act(_path(dir_fd), name, text)

    def open_for_writing(self, dir_fd: int, name: str) -> None:
        """Refuse as the kernel does on opening."""
        group = _path(dir_fd)
        if not (group / name).exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        self._host.refuse_write(group / name)

    def is_marked_delegated(self, path: str) -> bool:
        """Tell whether the test has marked it."""
        return Path(path) in self._host.delegated

    def owner(self, path: str) -> int:
        """Give the owner that the test says, else root."""
        return self._host.owners.get(Path(path), 0)


class FakeHost:
    """A host with one of the layouts below `base`, and this process at group `own`."""

    def __init__(self, base: Path, layout: str, *, own: str = "/user/scope") -> None:
        self.proc = base / "proc"
        self.root = base / "root"
        self.mounts = self.root / "sys/fs/cgroup"
        self.read_only: set[str] = set()
        """The hierarchies, by directory, that are mounted read-only."""
        self.mkdir_errno = 0
        """What making a group fails with; 0: it does not."""
        self.denied: set[str] = set()
        """Files of the own v2 group that may not be written."""
        self.delegated: set[Path] = set()
        self.owners: dict[Path, int] = {}
        self.layout = layout
        self.kernel_has_kill = True
        (self.proc / "self").mkdir(parents=True)
        v1 = ["cpu,cpuacct", "memory", "pids", "freezer", "blkio"] if layout != "v2" else []
        v2 = {"v2": [""], "hybrid": ["unified"], "v1": []}[layout]
        self.v2_controllers = set(CONTROLLERS) if layout == "v2" else set()
        mountinfo, cgroup = [], []
        for number, names in enumerate(v1, 1):
            mountinfo.append(f"{_point(number, names)} - cgroup cgroup rw,{names}")
            cgroup.append(f"{number}:{names}:{own}")
            self._own_group(names, own)
        for name in v2:
            mountinfo.append(f"{_point(99, name)} - cgroup2 cgroup2 rw")
            cgroup.append(f"0::{own}")
            self._own_group(name, own)
        (self.proc / "self/mountinfo").write_text("\n".join(mountinfo) + "\n")
        (self.proc / "self/cgroup").write_text("\n".join(cgroup) + "\n")
        for pid in (os.getpid(), "self"):
            stat = self.proc / str(pid) / "stat"
            stat.parent.mkdir(exist_ok=True)
            stat.write_text(Path(f"/proc/{os.getpid()}/stat").read_text())
        shutil.copy(f"/proc/{os.getpid()}/status", self.proc / str(os.getpid()) / "status")
        self.files = FakeCgroupFiles(self)

    def own(self, hierarchy: str, own: str = "/user/scope") -> Path:
        """Give the directory of this process' group in a hierarchy."""
        return self.mounts / hierarchy / own.lstrip("/")

    def run_systemd(self) -> None:
        """Let systemd be PID 1 here."""
        (self.root / "run/systemd/system").mkdir(parents=True)

    def move_to(self, own: str) -> None:
        """Put this process into another v2 group, and make that and those above if need be."""
        (self.proc / "self/cgroup").write_text(f"0::{own}\n")
        group = self.own("", own)
        above = [folder for folder in group.parents if folder.is_relative_to(self.mounts)]
        for folder in [*reversed(above), group]:
            if not (folder / "cgroup.procs").exists():
                folder.mkdir(exist_ok=True)
                self.fill(folder)
            if folder != group:
                control = " ".join(sorted(self.v2_controllers))
                (folder / "cgroup.subtree_control").write_text(control)
        (group / "cgroup.procs").write_text(str(os.getpid()))

    def refuse_write(self, path: Path) -> None:
        """Raise what the kernel does for a path that cannot be written or made."""
        hierarchy = "" if self.layout == "v2" else path.relative_to(self.mounts).parts[0]
        if hierarchy in self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if path.name in self.denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def fill(self, group: Path) -> None:
        """Make the files of a group."""
        (group / "cgroup.procs").write_text("")
        hierarchy = group.relative_to(self.mounts).parts[0] if self.layout != "v2" else ""
        if hierarchy not in ("", "unified"):
            for controller in hierarchy.split(","):
                _write_all(group, V1_FILES[controller])
            return
        self._fill_v2(group)

    def _fill_v2(self, group: Path) -> None:
        """Make the files of a v2 group."""
        parent = group.parent / "cgroup.subtree_control"
        given = set(parent.read_text().split()) if parent.exists() else self.v2_controllers
        _write_all(
            group,
            {
                "cgroup.controllers": " ".join(sorted(given)),
                "cgroup.subtree_control": "",
                "cgroup.events": "populated 0\nfrozen 0\n",
                "cgroup.freeze": "0",
                "cpu.stat": "usage_usec 2000000\nuser_usec 1\n",
            },
        )
        if self.kernel_has_kill:
            (group / "cgroup.kill").write_text("")
        for controller in given:
            _write_all(group, V2_FILES[controller])

    def members(self, group: Path) -> list[int]:
        """List the processes that are in a group and alive."""
        pids = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        return [pid for pid in pids if pid == 0 or _alive(pid)]

    def refresh(self, group: Path) -> None:
        """Write cgroup.events as the group is."""
        if not (group / "cgroup.events").exists():
            return
        inside = any(self.members(path.parent) for path in group.rglob("cgroup.procs"))
        frozen = (group / "cgroup.freeze").read_text()
        (group / "cgroup.events").write_text(f"populated {int(inside)}\nfrozen {frozen}\n")

    def act(self, group: Path, name: str, text: str) -> None:
        """Do what a write means."""
        if name == "cgroup.procs":
            self._move(group, int(text))
        elif name == "cgroup.subtree_control":
            self._give(group, text)
        elif name == "cgroup.kill":
            for path in group.rglob("cgroup.procs"):
                for pid in self.members(path.parent):
                    os.kill(pid, 9)
                    path.write_text("")
        else:
            if name in ("io.max", *V1_FILES["blkio"]) and text.split()[0] != DISK_NAME:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            if name == "memory.limit_in_bytes" and int(text) > _int(group, MEMSW):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if name == MEMSW and int(text) < _int(group, "memory.limit_in_bytes"):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            (group / name).write_text(text)

    def _move(self, group: Path, pid: int) -> None:
        """Move a process inside one hierarchy."""
        if not _alive(pid):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        inner = group / "cgroup.subtree_control"
        if inner.exists() and inner.read_text():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        depth = 0 if self.layout == "v2" else 1
        hierarchy = self.mounts.joinpath(*group.relative_to(self.mounts).parts[:depth])
        for path in hierarchy.rglob("cgroup.procs"):
            pids = [p for p in path.read_text().split() if p != str(pid)]
            path.write_text("\n".join(pids))
        with (group / "cgroup.procs").open("a") as procs:
            procs.write(f"\n{pid}")

    def _give(self, group: Path, text: str) -> None:
        """Enable or disable a controller for a group's children."""
        path, controller = group / "cgroup.subtree_control", text[1:]
        now = set(path.read_text().split())
        if text[0] == "+":
            if controller not in (group / "cgroup.controllers").read_text().split():
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            if self.members(group):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            now.add(controller)
        else:
            now.discard(controller)
        path.write_text(" ".join(sorted(now)))

    def _own_group(self, hierarchy: str, own: str) -> None:
        """Make the group that this process is in."""
        group = self.own(hierarchy, own)
        group.mkdir(parents=True)
        self.fill(group)
        (group / "cgroup.procs").write_text(str(os.getpid()))


def _point(number: int, name: str) -> str:
    """Give the left half of a mountinfo line."""
    point = f"/sys/fs/cgroup/{name}".rstrip("/")
    return f"{number} 1 0:{number} / {point} rw,relatime"


def _path(dir_fd: int) -> Path:
    """Give the directory behind an fd."""
    return Path(os.readlink(f"/proc/self/fd/{dir_fd}"))


def _int(group: Path, name: str) -> int:
    """Read a limit; one that this host does not have is none."""
    path = group / name
    return int(path.read_text() if path.exists() else UNLIMITED)


def _write_all(group: Path, values: dict[str, str]) -> None:
    """Write files by name."""
    for name, value in values.items():
        (group / name).write_text(value)


def _alive(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
