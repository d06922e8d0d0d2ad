"""Decide the steps of a cell's root file system; nothing here touches the system.

Init's small root, in which the paths below are valid:

    /b/0 ...      folders and files of the image, read-only (image.binds, in order)
    /w            the notebook's folder, where there is one
    /d/null ...   device nodes
    /k            skeleton: files, folders and mount points of the image, the lowest layer
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
    binds: tuple[str, ...]
    """Targets of the image's binds; the n-th is shown from /b/n."""
    workspace_mode: str
    masked_files: tuple[str, ...]
    masked_folders: tuple[str, ...]
    read_only: tuple[str, ...]

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
            lowers=(*(f"{n}/u" for n in spec.root_layers), SKELETON),
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
        Pivot(ROOT),
    )


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
