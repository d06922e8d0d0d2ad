"""What each instruction does to the config of the image: pure, one step after the other."""

from __future__ import annotations

import posixpath
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import singledispatch

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.expand import expand
from sandbox_kernel.build.lexer import Heredoc, heredoc_of
from sandbox_kernel.build.ports import exposed_ports
from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.image_config import ImageConfig
from sandbox_kernel.model import Json

DEFAULT_SHELL = ("/bin/sh", "-c")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy")
"""Arguments that need no ARG, in both cases; they are in no key of the cache."""

Pairs = ins.Pairs
_REAL_TIME = re.compile(r"RT(MIN|MAX)([+-]\d{1,2})?", re.ASCII)


@dataclass(frozen=True)
class Arguments:
    """What may give an ARG its value: what was given, then what stands before the first FROM."""

    given: Mapping[str, str]
    scope: Mapping[str, str]


@dataclass(frozen=True)
class StageState:
    """A stage after some of its instructions.

    `env` is what commands of the build see: what ENV and ARG have set, the last one counts.
    """

    config: ImageConfig
    env: Pairs
    declared: tuple[str, ...] = ()
    """Names that ARG has declared, with or without a value."""
    triggers: tuple[str, ...] = ()
    """ONBUILD instructions of the image that the stage begins with: they are due now."""
    own_command: bool = False
    """Whether CMD stood in this stage; ENTRYPOINT resets a command that comes from the base."""

    @property
    def variables(self) -> dict[str, str]:
        """What variables in instructions are looked up in."""
        return dict(self.env)


@dataclass(frozen=True)
class Process:
    """What RUN starts. `script` is a file to be put at argv[0] for as long as it runs."""

    argv: tuple[str, ...]
    script: Heredoc | None = None


SCRIPT_FOLDER = "/dev/pipes"
"""Where Docker puts a heredoc that begins with a shebang."""


def begin(config: ImageConfig) -> StageState:
    """Start a stage on an image. Its ONBUILD instructions are due, and leave the config."""
    env = config.env
    if "PATH" not in dict(env):
        env = (*env, ("PATH", DEFAULT_PATH))
    return StageState(config.replace(env=env, on_build=()), env, triggers=config.on_build)


def inherit(state: StageState) -> StageState:
    """Start a stage on another one, which passes its arguments on."""
    config = state.config.replace(on_build=())
    return replace(state, config=config, triggers=(), own_command=False)


def apply(
    instruction: ins.Instruction, state: StageState, arguments: Arguments, *, escape: str = "\\"
) -> StageState:
    """Give the state after an instruction, which is resolved; raises BuildError.

    RUN, COPY and ADD change files only, and leave it as it is.
    """
    with instruction.place.blamed():
        if isinstance(instruction, ins.Arg):
            return _declare(instruction, state, arguments, escape)
        return _changed(instruction, state)


def command_line(command: ins.Command, config: ImageConfig) -> tuple[str, ...]:
    """Give the argv of a CMD or ENTRYPOINT, with the image's shell for the shell form."""
    if not command.shell:
        return command.argv
    return (*(config.shell or DEFAULT_SHELL), *command.argv)


def process(run: ins.Run, config: ImageConfig) -> Process:
    """Give what a RUN starts.

    A heredoc alone is the shell's script, or with a shebang a program; beside other words it is
    handed to the shell as it stands.
    """
    command = run.command
    if not command.shell:
        return Process(command.argv)
    text, heredocs = command.argv[0], command.heredocs
    if heredocs and heredoc_of(text.strip()) is not None:
        document = heredocs[0]
        if document.text.startswith("#!"):
            return Process((f"{SCRIPT_FOLDER}/{document.name}",), document)
        text = document.text
    else:
        text += "".join(f"\n{one.content}{one.name}" for one in heredocs)
    return Process((*(config.shell or DEFAULT_SHELL), text))


def proxy_environment(given: Mapping[str, str]) -> Pairs:
    """Give the proxies that were given as build arguments, in both cases, for RUN."""
    found = {name.lower(): value for name, value in sorted(given.items())}
    pairs = [(name, found[name]) for name in PROXIES if name in found]
    return tuple(pair for name, value in pairs for pair in ((name, value), (name.upper(), value)))


def _declare(
    instruction: ins.Arg, state: StageState, arguments: Arguments, escape: str
) -> StageState:
    for name, default in instruction.arguments:
        value = arguments.given.get(name)
        if value is None and default is not None:
            value = expand(default, state.variables, escape=escape).text
        elif value is None:
            value = arguments.scope.get(name)
        env = state.env if value is None else _set(state.env, ((name, value),))
        declared = tuple(dict.fromkeys((*state.declared, name)))
        state = replace(state, env=env, declared=declared)
    return state


def _set(pairs: Pairs, new: Pairs) -> Pairs:
    """Set values: a name that is there keeps its place."""
    return tuple({**dict(pairs), **dict(new)}.items())


@singledispatch
def _changed(_instruction: ins.Instruction, state: StageState) -> StageState:
    return state


@_changed.register
def _env(instruction: ins.Env, state: StageState) -> StageState:
    for name, _ in instruction.pairs:
        if not name or "=" in name:
            raise BuildError(f"ENV of the name {name!r}", hint="write ENV NAME=VALUE")
    config = state.config.replace(env=_set(state.config.env, instruction.pairs))
    return replace(state, config=config, env=_set(state.env, instruction.pairs))


@_changed.register
def _label(instruction: ins.Label, state: StageState) -> StageState:
    if not all(name for name, _ in instruction.pairs):
        raise BuildError("LABEL without a name", hint="write LABEL NAME=VALUE")
    return _configured(state, labels=_set(state.config.labels, instruction.pairs))


@_changed.register
def _workdir(instruction: ins.Workdir, state: StageState) -> StageState:
    return _configured(state, working_dir=join(state.config.working_dir, instruction.path))


def join(working_dir: str, path: str) -> str:
    """Give an absolute, clean path; a relative one begins at the working directory."""
    return "/" + posixpath.normpath(posixpath.join("/", working_dir, path)).lstrip("/")


@_changed.register
def _user(instruction: ins.User, state: StageState) -> StageState:
    if not instruction.user.strip():
        raise BuildError("USER comes out empty", hint="name a user, or a number")
    return _configured(state, user=instruction.user)


@_changed.register
def _cmd(instruction: ins.Cmd, state: StageState) -> StageState:
    changed = _configured(state, cmd=command_line(instruction.command, state.config))
    return replace(changed, own_command=True)


@_changed.register
def _entrypoint(instruction: ins.Entrypoint, state: StageState) -> StageState:
    changed = _configured(state, entrypoint=command_line(instruction.command, state.config))
    return changed if state.own_command else _configured(changed, cmd=())


@_changed.register
def _shell(instruction: ins.Shell, state: StageState) -> StageState:
    return _configured(state, shell=instruction.argv)


@_changed.register
def _expose(instruction: ins.Expose, state: StageState) -> StageState:
    ports = {port for word in instruction.ports for port in exposed_ports(word)}
    known = ports | set(state.config.exposed_ports)
    return _configured(state, exposed_ports=tuple(sorted(known)))


@_changed.register
def _volume(instruction: ins.Volume, state: StageState) -> StageState:
    if not all(instruction.paths):
        raise BuildError("VOLUME comes out empty", hint="name a path")
    volumes = sorted({*state.config.volumes, *instruction.paths})
    return _configured(state, volumes=tuple(volumes))


@_changed.register
def _stop_signal(instruction: ins.StopSignal, state: StageState) -> StageState:
    text = instruction.signal
    name = text.upper().removeprefix("SIG")
    is_number = text.isascii() and text.isdigit() and 0 < int(text[:4]) < signal.NSIG
    if not (is_number or f"SIG{name}" in signal.Signals.__members__ or _REAL_TIME.fullmatch(name)):
        raise BuildError(
            f"STOPSIGNAL {text} is no signal", hint="write SIGTERM, or a number up to 64"
        )
    return _configured(state, stop_signal=text)


@_changed.register
def _healthcheck(instruction: ins.Healthcheck, state: StageState) -> StageState:
    command = instruction.command
    if command is None:
        return _configured(state, healthcheck={"Test": ["NONE"]})
    kind = "CMD-SHELL" if command.shell else "CMD"
    found: Json = {"Test": [kind, *command.argv], **dict(instruction.times_ns)}
    if instruction.retries:
        found["Retries"] = instruction.retries
    return _configured(state, healthcheck=found)


@_changed.register
def _on_build(instruction: ins.OnBuild, state: StageState) -> StageState:
    return _configured(state, on_build=(*state.config.on_build, instruction.trigger))


@_changed.register
def _maintainer(instruction: ins.Maintainer, state: StageState) -> StageState:
    return _configured(state, author=instruction.name)


def _configured(state: StageState, **changes: object) -> StageState:
    return replace(state, config=state.config.replace(**changes))
