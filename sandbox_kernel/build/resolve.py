"""Variables of an instruction, put in: which of its words they are looked for in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import singledispatch

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.expand import expand
from sandbox_kernel.build.lexer import Heredoc
from sandbox_kernel.build.mounts import Mount, parse_mount


@dataclass(frozen=True)
class Resolved:
    """An instruction without variables, its mounts, and the variables that were not set."""

    instruction: ins.Instruction
    mounts: tuple[Mount, ...] = ()
    unset: frozenset[str] = frozenset()


def resolve(
    instruction: ins.Instruction, env: Mapping[str, str], working_dir: str, *, escape: str = "\\"
) -> Resolved:
    """Put the values of `env` into an instruction; raises BuildError, which names its line.

    The commands of RUN, CMD, ENTRYPOINT and HEALTHCHECK are left to their shell. ARG is left to
    `config.apply`, which knows whether its default counts at all.
    """
    with instruction.place.blamed():
        words = _Words(env, escape)
        mounts: tuple[Mount, ...] = ()
        if isinstance(instruction, ins.Run):
            mounts = tuple(parse_mount(one, words.one, working_dir) for one in instruction.mounts)
        return Resolved(_put_in(instruction, words), mounts, frozenset(words.unset))


class _Words:
    def __init__(self, env: Mapping[str, str], escape: str) -> None:
        self._env = env
        self._escape = escape
        self.unset: set[str] = set()

    def one(self, word: str) -> str:
        found = expand(word, self._env, escape=self._escape)
        self.unset |= found.unset
        return found.text

    def all(self, words: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.one(word) for word in words)

    def split(self, words: tuple[str, ...]) -> tuple[str, ...]:
        found = [expand(word, self._env, escape=self._escape) for word in words]
        self.unset |= {name for one in found for name in one.unset}
        return tuple(word for one in found for word in one.words)

    def document(self, heredoc: Heredoc) -> Heredoc:
        """Resolve a heredoc, in which a backslash escapes whatever the file's character is."""
        if not heredoc.expand:
            return heredoc
        found = expand(heredoc.text, self._env, quotes=False)
        self.unset |= found.unset
        return replace(heredoc, content=found.text, expand=False, strip_tabs=False)


@singledispatch
def _put_in(instruction: ins.Instruction, _words: _Words) -> ins.Instruction:
    return instruction


@_put_in.register
def _env(instruction: ins.Env | ins.Label, words: _Words) -> ins.Instruction:
    pairs = tuple((words.one(name), words.one(value)) for name, value in instruction.pairs)
    return replace(instruction, pairs=pairs)


@_put_in.register
def _transfer(instruction: ins.Transfer, words: _Words) -> ins.Instruction:
    found = replace(
        instruction,
        sources=words.all(instruction.sources),
        destination=words.one(instruction.destination),
        documents=tuple(words.document(one) for one in instruction.documents),
        chown=words.one(instruction.chown),
        chmod=words.one(instruction.chmod),
    )
    return (
        replace(found, checksum=words.one(found.checksum)) if isinstance(found, ins.Add) else found
    )


@_put_in.register
def _workdir(instruction: ins.Workdir, words: _Words) -> ins.Instruction:
    return replace(instruction, path=words.one(instruction.path))


@_put_in.register
def _user(instruction: ins.User, words: _Words) -> ins.Instruction:
    return replace(instruction, user=words.one(instruction.user))


@_put_in.register
def _volume(instruction: ins.Volume, words: _Words) -> ins.Instruction:
    return replace(instruction, paths=words.all(instruction.paths))


@_put_in.register
def _expose(instruction: ins.Expose, words: _Words) -> ins.Instruction:
    return replace(instruction, ports=words.split(instruction.ports))


@_put_in.register
def _stop_signal(instruction: ins.StopSignal, words: _Words) -> ins.Instruction:
    return replace(instruction, signal=words.one(instruction.signal))
