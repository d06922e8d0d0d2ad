"""The values that every layer speaks: limits, requests, events, usage, results.

All are frozen; units stand in the names. Nothing here touches the system.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Json = dict[str, Any]

CELL_UID = 1000
"""User and group of a running cell, inside the session's user namespace."""
HEAD_UID = 1001
"""User and group of parked interpreters, so that a cell cannot signal or trace them."""


def head_beside(cell_uid: int) -> int:
    """Give the user and group of heads where cells have this user."""
    return HEAD_UID if cell_uid != HEAD_UID else HEAD_UID + 1


class Outcome(str, Enum):
    """How an execution ended; the first three commit, the others roll back."""

    OK = "ok"
    ERROR = "error"
    INTERRUPTED = "interrupted"
    MEMORY = "memory"
    WALL_TIME = "wall_time"
    CPU_TIME = "cpu_time"
    PROCESSES = "processes"
    DISK = "disk"
    CRASHED = "crashed"
    EXITED = "exited"

    @property
    def commits(self) -> bool:
        """Tell whether the state after such a cell is kept."""
        return self in (Outcome.OK, Outcome.ERROR, Outcome.INTERRUPTED)


@dataclass(frozen=True)
class Limits:
    """What one execution may use; every field is a hard limit."""

    memory_bytes: int
    cpus: float
    cpu_time_s: float
    wall_time_s: float
    processes: int
    disk_bytes: int
    output_bytes: int
    open_files: int
    io_bytes_per_s: int | None = None
    """From and to disks, each way; None without a limit."""


def total_memory_bytes(ceiling: Limits) -> int:
    """Give what a whole session may hold: a full state, a cell that rewrites it, all files."""
    return 2 * ceiling.memory_bytes + ceiling.disk_bytes


@dataclass(frozen=True)
class Usage:
    """What one execution used; None where the host does not count it."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_memory_bytes: int | None = None
    peak_processes: int | None = None
    disk_bytes: int = 0
    output_bytes: int = 0
    denied_forks: int = 0
    """Processes and threads that the limit of processes refused."""


@dataclass(frozen=True)
class Bind:
    """A folder or file of the host that is shown in the container.

    `source` is a path of the host, `target` the absolute path inside.
    """

    source: str
    target: str
    read_only: bool = True


@dataclass(frozen=True)
class Layers:
    """Unpacked layers of an image: folders of one folder of the host, lowest first."""

    folder: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Image:
    """A root file system as plan: layers, and what is bound, written and linked on top of them."""

    reference: str
    binds: tuple[Bind, ...]
    layers: Layers | None = None
    files: tuple[tuple[str, str], ...] = ()
    """(absolute path, content) of small files of the skeleton, `/etc/passwd` for one."""
    folders: tuple[tuple[str, int, int, int], ...] = ()
    """(absolute path, mode, user, group) of empty folders of the skeleton."""
    links: tuple[tuple[str, str], ...] = ()
    """(absolute path, target) of symbolic links of the skeleton."""
    tmpfs: tuple[str, ...] = ()
    """Folders that are a file system in memory, new in every container."""
    python: tuple[str, ...] = ("python3",)
    """The interpreter inside, as argv prefix."""
    env: tuple[tuple[str, str], ...] = ()
    home: str = "/home/jovyan"
    packages: tuple[str, ...] = ()
    """Folders inside with what the guest needs, behind the packages of the interpreter."""
    working_dir: str = ""
    """Where cells begin; empty for the notebook's folder."""
    uid: int = CELL_UID
    gid: int = CELL_UID
    store: str = ""
    """The folder of the store that the layers are in."""
    leased: tuple[str, ...] = ()
    """Digests that a session claims there, so that no prune takes them away under it."""


@dataclass(frozen=True)
class SessionSpec:
    """All that a session needs to know to start, decided by `config`."""

    session_id: str
    image: Image
    workspace: str
    """The notebook's folder on the host; empty where there is none."""
    workspace_mode: str
    """One of `overlay`, `ro`, `rw`, `none`."""
    limits: Limits
    """What a cell has unless it says otherwise."""
    ceiling: Limits
    """How far a cell may raise its limits."""
    grace_s: float = 2.0
    """How long an interrupted cell may take to stop before it is killed."""
    waived: frozenset[str] = frozenset()
    """Protections and limits that the user does without, by name."""


@dataclass(frozen=True)
class Execution:
    """One `execute_request`, as the guest needs it."""

    code: str
    silent: bool = False
    store_history: bool = True
    user_expressions: Json = field(default_factory=dict)
    allow_stdin: bool = False
    execution_count: int = 1
    cell_id: str | None = None
    parent: Json = field(default_factory=dict)
    """The header of the request: widgets compare its `msg_id`."""


@dataclass(frozen=True)
class CommMessage:
    """A `comm_open`, `comm_msg` or `comm_close` of a client."""

    msg_type: str
    content: Json
    metadata: Json = field(default_factory=dict)
    buffers: tuple[bytes, ...] = ()
    parent: Json = field(default_factory=dict)
    """The header of the message, as of a request."""


@dataclass(frozen=True)
class Stream:
    """Text that the cell wrote to a standard stream; `name` is `stdout` or `stderr`."""

    name: str
    text: str


@dataclass(frozen=True)
class Message:
    """A message that the guest asks the kernel to publish on iopub.

    `msg_type` is one of the types that `session.link` admits; content and metadata are JSON.
    """

    msg_type: str
    content: Json
    metadata: Json = field(default_factory=dict)
    buffers: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class InputRequest:
    """The cell waits for a line from the user; answer by `Session.answer`."""

    prompt: str
    password: bool = False


Event = Stream | Message | InputRequest


@dataclass(frozen=True)
class CellResult:
    """How an execution ended and what it used."""

    outcome: Outcome
    committed: bool
    usage: Usage
    limits: Limits
    container_id: str
    resident: bool = False
    reply: Json = field(default_factory=dict)
    """The guest's reply content; empty when it was killed before it had one."""
    traceback: tuple[str, ...] = ()
    """Where a cell stood when a time limit interrupted it, as IPython formats it."""
    exit_code: int | None = None
    signal: int | None = None
    notes: tuple[str, ...] = ()
    """Sentences that the user must read: what could not be carried over, and why."""
