"""The monitor of a container with named guards taken off, for the twins of probes.

A twin runs what a probe runs, and must get through: else the probe would also pass where nothing
guards. The monitor, init, the builder and the first guest up to its exec are forks of one process,
so what is replaced here before `main` is replaced in all of them. Nothing of the product knows it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from sandbox_kernel.container import base, boot, build, gate, job, plan, steps
from sandbox_kernel.linux import libc

SOURCE = Path(__file__).resolve().parents[2]
LEAKED_FOLDER_FD = 9
LEAKED_PROGRAM_FD = 7
_ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)  # BPF_RET, SECCOMP_RET_ALLOW


def program(guards: Iterable[str]) -> str:
    """Give the program that `begin` execs in the monitor's place; it fills in `{fd}`."""
    return (
        f"import sys; sys.path[:0] = [{{root!r}}, {str(SOURCE)!r}]; "
        f"from tests.escape.weakened import main; main({{fd}}, {list(guards)!r})"
    )


def main(control_fd: int, guards: list[str]) -> NoReturn:
    """Take the guards off and be the monitor."""
    for guard in guards:
        GUARDS[guard]()
    from sandbox_kernel.container import monitor

    monitor.main(control_fd)


def _filter() -> None:
    for module in (boot, job):
        module.compile_policy = lambda policy: _ALLOW_ALL


def _gate() -> None:
    gate.Gate.judge = lambda self, call: gate.PROCEED


def _new_privileges() -> None:
    libc.set_no_new_privs = lambda: None
    load = libc.seccomp_load

    def load_if_allowed(program: bytes, *, listener: bool = False) -> int | None:
        try:
            return load(program, listener=listener)
        except PermissionError:  # without the flag only for who has CAP_SYS_ADMIN
            return None

    libc.seccomp_load = load_if_allowed


def _change_spec(**changes: Any) -> None:
    before = plan.root_plan
    build.root_plan = lambda spec: before(replace(spec, **changes))


def _change_steps(change: Callable[[Any], Any]) -> None:
    before = build.root_plan
    build.root_plan = lambda spec: tuple(change(step) for step in before(spec))


def _masks() -> None:
    _change_spec(masked_files=(), masked_folders=())


def _read_only_proc() -> None:
    _change_spec(read_only=())


def _hidepid() -> None:
    def shown(step: Any) -> Any:
        return replace(step, options="") if getattr(step, "fstype", "") == "proc" else step

    _change_steps(shown)


def _skeleton() -> None:
    def below(step: Any) -> Any:
        if not isinstance(step, steps.Overlay):
            return step
        image = tuple(name for name in step.lowers if name.startswith(f"{plan.IMAGE}/"))
        return replace(step, lowers=(*image, *(n for n in step.lowers if n not in image)))

    _change_steps(below)


def _cgroupfs() -> None:
    before = build.root_plan

    def shown(spec: plan.RootSpec) -> tuple[Any, ...]:
        *first, pivot = before(spec)
        return (*first, steps.FileSystem("cgroup2", f"{plan.ROOT}/run"), pivot)

    build.root_plan = shown


def _without_namespace(name: str, flag: int) -> None:
    build._NEW &= ~flag
    build.NAMESPACES = tuple(known for known in build.NAMESPACES if known != name)
    capset, *setns, last = gate.SEQUENCES["enter"]
    gate.SEQUENCES["enter"] = (capset, *setns[1:], last)


def _network() -> None:
    from sandbox_kernel.container import launch

    _without_namespace("net", 0)
    before = build.isolate
    build.isolate = lambda hostname, network=True: before(hostname, network=False)
    clone = launch.libc.clone
    launch.libc.clone = lambda flags: clone(flags & ~libc.CLONE_NEWNET)


def _descriptors() -> None:
    def leaving(before: Callable[..., Any]) -> Callable[..., Any]:
        def arrange(*args: Any) -> Any:
            result = before(*args)
            os.dup2(os.open("/", os.O_PATH), LEAKED_FOLDER_FD, inheritable=True)
            os.dup2(os.open("/bin/true", os.O_RDONLY), LEAKED_PROGRAM_FD, inheritable=True)
            return result

        return arrange

    boot._arrange_descriptors = leaving(boot._arrange_descriptors)
    job._arrange_descriptors = leaving(job._arrange_descriptors)


def _without_attribute(attribute: int) -> None:
    before = libc.mount_setattr

    def set_less(*args: Any, attr_set: int = 0, **options: Any) -> None:
        if attr_set & ~attribute:
            before(*args, attr_set=attr_set & ~attribute, **options)

    base.libc.mount_setattr = set_less


def _nosuid() -> None:
    _without_attribute(libc.MOUNT_ATTR_NOSUID)
    steps.ROOT_FLAGS &= ~libc.MS_NOSUID


def _rlimits() -> None:
    boot.resource.setrlimit = lambda which, limits: None


def _heads_user() -> None:
    boot.head_beside = lambda uid: uid


def _dumpable_heads() -> None:
    # The guest is exec'ed: what it shall do otherwise goes into its program.
    boot._BOOT = boot._BOOT.replace(
        "from sandbox_kernel.guest.main",
        "from sandbox_kernel.guest import enter; enter.libc.set_dumpable = lambda dumpable: None; "
        "from sandbox_kernel.guest.main",
    )


GUARDS: dict[str, Callable[[], None]] = {
    "cgroup namespace": lambda: _without_namespace("cgroup", libc.CLONE_NEWCGROUP),
    "cgroupfs left out": _cgroupfs,
    "descriptors closed": _descriptors,
    "filter": _filter,
    "gate": _gate,
    "heads' own user": _heads_user,
    "heads undumpable": _dumpable_heads,
    "hidepid": _hidepid,
    "ipc namespace": lambda: _without_namespace("ipc", libc.CLONE_NEWIPC),
    "masks": _masks,
    "network namespace": _network,
    "no_new_privs": _new_privileges,
    "nodev": lambda: _without_attribute(libc.MOUNT_ATTR_NODEV),
    "nosuid": _nosuid,
    "read-only binds": lambda: _without_attribute(libc.MOUNT_ATTR_RDONLY),
    "read-only proc": _read_only_proc,
    "rlimits": _rlimits,
    "skeleton on top": _skeleton,
}
"""Each guard by its name in the table, and what takes it off."""
