"""The instructions of a Dockerfile as values; variables in them are not resolved yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sandbox_kernel.build.lexer import Heredoc
from sandbox_kernel.build.place import Place

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Instruction:
    """What every instruction has: its keyword, and where it stands."""

    keyword: ClassVar[str] = ""
    place: Place
    comments: tuple[str, ...] = field(default=(), kw_only=True)
    """The comment lines right above: `# check=skip=…` in them is for this instruction."""


@dataclass(frozen=True)
class Command:
    """A command line: in the exec form an argv, in the shell form one text for the shell."""

    argv: tuple[str, ...]
    shell: bool
    heredocs: tuple[Heredoc, ...] = ()
    malformed: bool = False
    """It begins like the exec form and is none: a missing quote mostly."""


@dataclass(frozen=True)
class From(Instruction):
    """Begin a stage on `base`; `platform` is empty where none is asked for."""

    keyword: ClassVar[str] = "FROM"
    base: str
    name: str = ""
    platform: str = ""


@dataclass(frozen=True)
class Arg(Instruction):
    """Declare build arguments, each with its default or None."""

    keyword: ClassVar[str] = "ARG"
    arguments: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Env(Instruction):
    """Set variables; `legacy` if written without an equals sign."""

    keyword: ClassVar[str] = "ENV"
    pairs: Pairs
    legacy: bool = False


@dataclass(frozen=True)
class Label(Instruction):
    """Set labels; `legacy` if written without an equals sign."""

    keyword: ClassVar[str] = "LABEL"
    pairs: Pairs
    legacy: bool = False


@dataclass(frozen=True)
class Run(Instruction):
    """Run a command; the texts of its mounts are read by `mounts.parse_mount`."""

    keyword: ClassVar[str] = "RUN"
    command: Command
    mounts: tuple[str, ...] = ()
    network: str = "default"
    """One of `default`, `none`, `host`."""


@dataclass(frozen=True)
class Transfer(Instruction):
    """What COPY and ADD have in common; `documents` are sources given as heredocs."""

    sources: tuple[str, ...]
    destination: str
    documents: tuple[Heredoc, ...] = ()
    chown: str = ""
    chmod: str = ""
    link: bool = False
    excludes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Copy(Transfer):
    """Copy from the build context, or from `stage`: a stage's name or number, or an image."""

    keyword: ClassVar[str] = "COPY"
    stage: str = ""
    parents: bool = False


@dataclass(frozen=True)
class Add(Transfer):
    """Copy from the build context or a URL; archives of the context are unpacked.

    `unpack` is None where the file leaves it to the kind of the source.
    """

    keyword: ClassVar[str] = "ADD"
    checksum: str = ""
    unpack: bool | None = None


@dataclass(frozen=True)
class Workdir(Instruction):
    """Set the working directory, relative to the one before."""

    keyword: ClassVar[str] = "WORKDIR"
    path: str


@dataclass(frozen=True)
class User(Instruction):
    """Set the user, and the group after a colon."""

    keyword: ClassVar[str] = "USER"
    user: str


@dataclass(frozen=True)
class Cmd(Instruction):
    """Set the default command."""

    keyword: ClassVar[str] = "CMD"
    command: Command


@dataclass(frozen=True)
class Entrypoint(Instruction):
    """Set the entry point; one of its own resets a command that came from the base."""

    keyword: ClassVar[str] = "ENTRYPOINT"
    command: Command


@dataclass(frozen=True)
class Shell(Instruction):
    """Set the shell of the shell form."""

    keyword: ClassVar[str] = "SHELL"
    argv: tuple[str, ...]


@dataclass(frozen=True)
class Expose(Instruction):
    """Name ports, each `port`, `first-last` or with `/tcp`, `/udp`, `/sctp` after it."""

    keyword: ClassVar[str] = "EXPOSE"
    ports: tuple[str, ...]


@dataclass(frozen=True)
class Volume(Instruction):
    """Name folders that are volumes."""

    keyword: ClassVar[str] = "VOLUME"
    paths: tuple[str, ...]


@dataclass(frozen=True)
class StopSignal(Instruction):
    """Set the signal that ends a container."""

    keyword: ClassVar[str] = "STOPSIGNAL"
    signal: str


@dataclass(frozen=True)
class Healthcheck(Instruction):
    """Set how a container is checked; `command` is None for NONE.

    `times_ns` are the durations by the names they have in a config.
    """

    keyword: ClassVar[str] = "HEALTHCHECK"
    command: Command | None
    times_ns: tuple[tuple[str, int], ...] = ()
    retries: int = 0


@dataclass(frozen=True)
class OnBuild(Instruction):
    """Keep an instruction for the builds that begin with this image."""

    keyword: ClassVar[str] = "ONBUILD"
    trigger: str


@dataclass(frozen=True)
class Maintainer(Instruction):
    """Set the author."""

    keyword: ClassVar[str] = "MAINTAINER"
    name: str
