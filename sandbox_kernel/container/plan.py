"""Decide the steps of a cell's root file system; nothing here touches the system.

Init's small root, in which the paths below are valid:

    /b/0 ...      folders and files of the image, read-only (image.binds, in order)
    /i/0 ...      unpacked layers of the image, read-only, lowest first (links into /l)
    /w            the notebook's folder, where there is one
    /d/null ...   device nodes
    /k            skeleton: mount points, and files and folders of our own, on top of the image's
                  layers: whatever they have in such a place, a link for one, is hidden
    /s/N/{u,w}    upper and work folder of cell N's root
    /s/N/{x,y}    upper and work folder of cell N's /workspace
    /r            where the next root is put together
    /e            an empty folder and an empty file, to mask with
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sandbox_kernel.container.steps import (
    BindMount,
    FileSystem,
    Overlay,
    Pivot,
    ReadOnlyBind,
    Step,
)
from sandbox_kernel.linux import libc

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")

# What Docker masks (moby, daemon/pkg/oci/defaults.go), so that Docker's users find the same.
MASKED = (
    "acpi",
    "asound",
    "interrupts",
    "kcore",
    "keys",
    "latency_stats",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
)
READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")

IMAGE = "/i"
SKELETON = "/k"
SCRATCH = "/s"
ROOT = "/r"
EMPTY_FOLDER = "/e/folder"
EMPTY_FILE = "/e/file"


@dataclass(frozen=True)
class RootSpec:
    """What the plan of one container depends on."""

    layer: int
    """The number of the cell: the name of its folder in the scratch file system."""
    root_layers: tuple[int, ...]
    """Committed cells that changed files of the root, newest first."""
    workspace_layers: tuple[int, ...]
    """Committed cells that changed files of /workspace, newest first."""
    image_layers: int
    """How many layers the image has."""
    cell: tuple[int, int]
    """User and group of cells, to whom /workspace belongs."""
    binds: tuple[str, ...]
    """Targets of the image's binds; the n-th is shown from /b/n."""
    workspace_mode: str
    masked_files: tuple[str, ...]
    masked_folders: tuple[str, ...]
    read_only: tuple[str, ...]
    tmpfs: tuple[tuple[str, int], ...] = ()
    """Folders that get a file system in memory of their own, and its size in bytes if not 0."""

    def as_json(self) -> dict[str, Any]:
        """Give an object for the control channel."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> RootSpec:
        """Make one of such an object."""
        frozen: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in body.items()
        }
        return cls(**frozen)


def root_plan(spec: RootSpec) -> tuple[Step, ...]:
    """Give the steps that build the root of one container, in order."""
    return (
        Overlay(
            folder=SCRATCH,
            lowers=(
                *(f"{n}/u" for n in spec.root_layers),
                SKELETON,
                *(f"{IMAGE}/{n}" for n in reversed(range(spec.image_layers))),
            ),
            upper=f"{spec.layer}/u",
            work=f"{spec.layer}/w",
            target=ROOT,
        ),
        *(BindMount(f"/b/{n}", ROOT + target) for n, target in enumerate(spec.binds)),
        *_workspace(spec),
        FileSystem("proc", f"{ROOT}/proc", options="hidepid=2"),
        *(BindMount(EMPTY_FILE, f"{ROOT}/proc/{name}") for name in spec.masked_files),
        *(BindMount(EMPTY_FOLDER, f"{ROOT}/proc/{name}") for name in spec.masked_folders),
        *(ReadOnlyBind(f"{ROOT}/proc/{name}") for name in spec.read_only),
        *(BindMount(f"/d/{name}", f"{ROOT}/dev/{name}") for name in DEVICES),
        FileSystem(
            "devpts",
            f"{ROOT}/dev/pts",
            options="newinstance,ptmxmode=0666,mode=0620",
            flags=FileSystem.flags & ~4,  # devpts is a file system of devices: no MS_NODEV
        ),
        *(_tmpfs(path, size_bytes) for path, size_bytes in spec.tmpfs),
        Pivot(ROOT),
    )


def _tmpfs(path: str, size_bytes: int) -> Step:
    size = f",size={size_bytes}" if size_bytes else ""
    return FileSystem("tmpfs", ROOT + path, f"mode=1777{size}", FileSystem.flags & ~libc.MS_NOEXEC)


def _workspace(spec: RootSpec) -> tuple[Step, ...]:
    target = f"{ROOT}/workspace"
    if spec.workspace_mode == "none":
        return ()
    if spec.workspace_mode in ("ro", "rw"):
        return (BindMount("/w", target),)
    return (
        Overlay(
            folder=SCRATCH,
            lowers=(*(f"{n}/x" for n in spec.workspace_layers), "/w"),
            upper=f"{spec.layer}/x",
            work=f"{spec.layer}/y",
            target=target,
        ),
    )
