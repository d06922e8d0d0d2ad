"""What to do about a thing that this host lacks: from its name and the errno to one line.

Settings of the kernel (sysctl) are looked at only after the thing itself was tried and failed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

OUTER = "inside of another container start that one with --privileged"
AS_USER = "or start Jupyter as an ordinary user"
KERNEL = "boot Linux 5.12 or newer"
CGROUPS = (
    "as root, in a group of your own: systemd-run --scope -p Delegate=yes jupyter lab; "
    "cgroup v1 must be mounted writable"
)
NO_RIGHTS = (
    "AppArmor restricts user namespaces (Ubuntu); as root: "
    "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or give this Python a profile "
    "with the rule `userns,`; or start Jupyter as root"
)
SHOW_PROC = (
    "inside of another container have it show the whole /proc; Docker: --security-opt "
    "systempaths=unconfined, Podman: --security-opt unmask=ALL, Kubernetes: procMount: Unmasked"
)

COUNTED = {
    "user_namespace": "user",
    "pid_namespace": "pid",
    "mount_namespace": "mnt",
    "network_namespace": "net",
    "ipc_namespace": "ipc",
    "uts_namespace": "uts",
    "cgroup_namespace": "cgroup",
}
"""The namespaces by the name of their limit, /proc/sys/user/max_NAME_namespaces."""

CONFIG = {
    "user_namespace": "CONFIG_USER_NS",
    "pid_namespace": "CONFIG_PID_NS",
    "mount_namespace": "CONFIG_NAMESPACES",
    "network_namespace": "CONFIG_NET_NS",
    "ipc_namespace": "CONFIG_IPC_NS",
    "uts_namespace": "CONFIG_UTS_NS",
    "cgroup_namespace": "CONFIG_CGROUPS",
}

MAPPED = ("id_range", "subordinate_ids", "idmapped_mount", "idmapped_image")
"""What begins with a user namespace."""
NEEDS_USER_NAMESPACE = "first see user_namespace"
NEEDS_OWN_CGROUP = "first see own_cgroup"
POINTERS = (NEEDS_USER_NAMESPACE, NEEDS_OWN_CGROUP)
"""Remedies that name what is missing too, and has a remedy of its own."""

_FIXED = {
    "id_range": f"{OUTER} and without a map of its own; {AS_USER}",
    "host_binds": OUTER,
    "subordinate_ids": "install package uidmap anew, so that newuidmap and newgidmap are setuid "
    "root",
    "idmapped_mount": "keep notebooks on ext4, xfs, btrfs or tmpfs with Linux 5.12 or newer, or "
    "show no folder: --workspace none",
    "idmapped_image": "keep Python on ext4, xfs, btrfs or tmpfs with Linux 5.12 or newer",
    "workspace": "start Jupyter in a folder of your own that is neither an overlay's nor on the "
    "network, or show no folder: --workspace none",
    "devices": f"have /dev mounted without nodev, with null, zero, full, random, urandom and tty; "
    f"{OUTER}",
    "proc": SHOW_PROC,
    "overlay": f"load the module, as root: modprobe overlay; {KERNEL}",
    "overlay_volatile": KERNEL,
    "overlay_whiteout": KERNEL,
    "overlay_layers": KERNEL,
    "overlay_opaque": "boot Linux 6.6 or newer with CONFIG_TMPFS_XATTR",
    "swap": "boot with swapaccount=1, or switch swap off: swapoff -a",
    "freeze": "mount a v2 tree: mount -t cgroup2 none /sys/fs/cgroup/unified",
    "kill": "boot Linux 5.14 or newer with a v2 tree, or mount the freezer controller",
    "open_files": "raise the hard limit of the process that starts Jupyter: ulimit -Hn 1024, or "
    "LimitNOFILE=1024 of its unit; or set a lower --open-files",
    "seccomp": f"boot Linux 5.5 or newer with CONFIG_SECCOMP_FILTER; {OUTER}",
    "pidfd": "boot Linux 5.3 or newer and use a Python that was built on one",
    **dict.fromkeys(("own_cgroup", "memory", "cpus", "processes", "cpu_time", "io"), CGROUPS),
}

REFUSED = {
    "idmapped_mount": OUTER,
    "idmapped_image": OUTER,
    "workspace": "start Jupyter in a folder of your own, or show no folder: --workspace none",
}
"""The remedies where the act was denied (EPERM, EACCES), if another one than else."""

WITHOUT = {
    "subordinate_ids": "parked interpreters have the cell's user id, so a filter guards them "
    "against signals instead; a cell has one user, no root, and keeps the groups of who started "
    "Jupyter",
    "idmapped_image": "what is root's in the image's folders looks like nobody's in a cell",
    "overlay_opaque": "a cell cannot delete a folder of the notebook or of an earlier cell that "
    "held files",
    "swap": "a cell may swap beyond its memory limit",
    "freeze": "what a cell started is ended process by process",
    "io": "the disk traffic of cells cannot be limited",
}
"""What is different where a thing is missing that the kernel can run without."""


def sysctl(name: str) -> str:
    """Give a setting of the kernel, `user.max_user_namespaces`; empty where there is none."""
    try:
        text = Path("/proc/sys", *name.split(".")).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return text.strip()


def remedy(name: str, number: int, *, read: Callable[[str], str] = sysctl) -> str:
    """Give the line for `name`, which failed with errno `number` (0: another reason)."""
    if name in MAPPED and number == errno.ENOSPC:
        name = "user_namespace"
    if name in COUNTED:
        return _for_namespace(name, number, read)
    denied = number in (errno.EPERM, errno.EACCES)
    if name in REFUSED and denied:
        return REFUSED[name]
    return _FIXED.get(name, OUTER if denied else KERNEL)


def _for_namespace(name: str, number: int, read: Callable[[str], str]) -> str:
    limit = f"user.max_{COUNTED[name]}_namespaces"
    if read(limit) == "0" or number == errno.ENOSPC:
        return f"allow more of them, as root: sysctl -w {limit}=10000"
    if number in (errno.EINVAL, errno.ENOSYS):
        return f"boot a kernel that has them: {CONFIG[name]}=y"
    if read("kernel.unprivileged_userns_clone") == "0":
        return "allow them to ordinary users, as root: sysctl -w kernel.unprivileged_userns_clone=1"
    if read("kernel.apparmor_restrict_unprivileged_userns") == "1":
        return NO_RIGHTS
    return OUTER
