"""The stages of a Dockerfile: what each begins with, and which of them a target needs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.dockerfile import Dockerfile, parse
from sandbox_kernel.build.expand import expand
from sandbox_kernel.build.mounts import mount_stage
from sandbox_kernel.build.place import Place
from sandbox_kernel.errors import BuildError, ImageError
from sandbox_kernel.image.platform import Platform

_ARCHITECTURES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386"}


class Kind(str, Enum):
    """What files may come from."""

    SCRATCH = "scratch"
    HOST = "host"
    IMAGE = "image"
    STAGE = "stage"


@dataclass(frozen=True)
class Origin:
    """What a stage begins with, or COPY copies from: the name of an image, or a stage."""

    kind: Kind
    image: str = ""
    stage: int = -1


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows; `platform` is None where it is the target's."""

    index: int
    name: str
    origin: Origin
    platform: Platform | None
    begin: ins.From
    instructions: tuple[ins.Instruction, ...]

    @property
    def title(self) -> str:
        """The name, or as Docker calls a stage without one: `stage-2`."""
        return self.name or f"stage-{self.index}"


@dataclass(frozen=True)
class Plan:
    """All stages, and the one that is asked for.

    `arguments` are the build arguments that were given, `scope` the values of the arguments
    declared before the first FROM, with the predefined ones.
    """

    dockerfile: Dockerfile
    stages: tuple[Stage, ...]
    target: int
    platform: Platform
    arguments: Mapping[str, str]
    scope: Mapping[str, str]
    names: Mapping[str, int]
    """The stage that each name means: the last one of it."""

    def origin(self, name: str, stage: Stage, place: Place) -> Origin:
        """Give what `--from=name` and `from=name` mean within this stage; raises BuildError."""
        number = int(name) if name.isascii() and name.isdigit() and len(name) < 6 else None
        if number is None:
            number = self.names.get(name.lower())
        if number is None:
            return _image_origin(name)
        if number >= stage.index:
            known = number < len(self.stages)
            raise place.error(
                f"the stage {name} is not one before this" if known else f"no stage {name}",
                hint="a stage may use those above it only",
            )
        return Origin(Kind.STAGE, stage=number)

    def needs(self, stage: Stage) -> frozenset[int]:
        """Give the stages that this one uses itself; raises BuildError."""
        origins = [stage.origin]
        for instruction in stage.instructions:
            origins += [
                self.origin(name, stage, instruction.place) for name in sources_of(instruction)
            ]
        return frozenset(one.stage for one in origins if one.kind is Kind.STAGE)

    def order(self) -> tuple[Stage, ...]:
        """Give the stages that the target needs, each behind those that it uses."""
        wanted, reached = [self.target], {self.target}
        while wanted:
            found = self.needs(self.stages[wanted.pop()]) - reached
            reached |= found
            wanted += found
        return tuple(self.stages[number] for number in sorted(reached))

    def with_triggers(self, stage: Stage, triggers: tuple[str, ...]) -> Plan:
        """Put the ONBUILD instructions of a stage's base image in front of its own.

        They are of the image, and so read without this file's escape character.
        """
        stages = list(self.stages)
        own = self.stages[stage.index]
        fired = tuple(_trigger(text, own.begin.place) for text in triggers)
        stages[stage.index] = replace(own, instructions=fired + own.instructions)
        plan = replace(self, stages=tuple(stages))
        plan.needs(plan.stages[stage.index])
        return plan


def plan(
    dockerfile: Dockerfile,
    *,
    target: str = "",
    arguments: Mapping[str, str] | None = None,
    platform: Platform | None = None,
) -> Plan:
    """Find the stages of a Dockerfile and the target among them; raises BuildError.

    Without `target` it is the last stage.
    """
    given = arguments or {}
    wanted = platform or Platform.host()
    groups = _groups(dockerfile)
    scope = predefined(wanted, target or groups[-1][0].name)
    scope.update({name: value for name, value in given.items() if name in scope})
    for instruction in dockerfile.instructions:
        if not isinstance(instruction, ins.Arg):
            break
        declare(instruction, scope, given, escape=dockerfile.escape)
    stages: list[Stage] = []
    names: dict[str, int] = {}
    for begin, *instructions in groups:
        begun = _begun(begin, scope, dockerfile.escape)
        stages.append(_stage(begun, tuple(instructions), stages, names))
        if begin.name:
            names[begin.name] = len(stages) - 1
    index = len(stages) - 1 if not target else _target(names, len(stages), target)
    found = Plan(dockerfile, tuple(stages), index, wanted, given, scope, names)
    for stage in found.stages:
        found.needs(stage)
    return found


def predefined(platform: Platform, target: str) -> dict[str, str]:
    """Give the arguments that exist without being given; a stage sees them if it declares them."""
    values = {"TARGETSTAGE": target or "default"}
    for side, one in (("TARGET", platform), ("BUILD", Platform.host())):
        values[f"{side}PLATFORM"] = str(one)
        values[f"{side}OS"] = one.os
        values[f"{side}ARCH"] = one.architecture
        values[f"{side}VARIANT"] = one.variant
    return values


def declare(
    instruction: ins.Arg, scope: dict[str, str], given: Mapping[str, str], *, escape: str
) -> None:
    """Put the arguments of an ARG before the first FROM into `scope`: given ones, or defaults."""
    with instruction.place.blamed():
        for name, default in instruction.arguments:
            if name in given:
                scope[name] = given[name]
            elif default is not None:
                scope[name] = expand(default, scope, escape=escape).text


def sources_of(instruction: ins.Instruction) -> tuple[str, ...]:
    """Give the names that an instruction takes files from, the build context left out."""
    if isinstance(instruction, ins.Copy):
        return (instruction.stage,) if instruction.stage else ()
    if isinstance(instruction, ins.Run):
        with instruction.place.blamed():
            return tuple(name for name in map(mount_stage, instruction.mounts) if name)
    return ()


def _groups(dockerfile: Dockerfile) -> list[tuple[ins.From, *tuple[ins.Instruction, ...]]]:
    groups: list[tuple[ins.From, *tuple[ins.Instruction, ...]]] = []
    for instruction in dockerfile.instructions:
        if isinstance(instruction, ins.From):
            groups.append((instruction,))
        elif groups:
            groups[-1] = (*groups[-1], instruction)
        elif not isinstance(instruction, ins.Arg):
            raise instruction.place.error(
                f"{instruction.keyword} before the first FROM",
                hint="begin with FROM, for example FROM host; only ARG may stand before it",
            )
    if not groups:
        raise BuildError(f"{dockerfile.file} has no FROM", hint="begin with FROM IMAGE")
    return groups


@dataclass(frozen=True)
class _Begun:
    """A FROM with its variables resolved."""

    begin: ins.From
    base: str
    platform: Platform | None


def _begun(begin: ins.From, scope: Mapping[str, str], escape: str) -> _Begun:
    with begin.place.blamed():
        base = expand(begin.base, scope, escape=escape).text
        platform = expand(begin.platform, scope, escape=escape).text
        if not base:
            raise BuildError(
                f"FROM {begin.base} comes out empty",
                hint="declare the argument before FROM, with a default: ARG NAME=VALUE",
            )
        if begin.platform and not platform:
            raise BuildError(f"--platform={begin.platform} comes out empty", hint="give it a value")
        return _Begun(begin, base, _platform(platform) if platform else None)


def _stage(
    begun: _Begun,
    instructions: tuple[ins.Instruction, ...],
    above: list[Stage],
    names: Mapping[str, int],
) -> Stage:
    begin = begun.begin
    number = names.get(begun.base.lower())
    origin = _image_origin(begun.base) if number is None else Origin(Kind.STAGE, stage=number)
    if number is not None:
        # A stage does not pass on what was meant for its own base.
        texts = [one.trigger for one in above[number].instructions if isinstance(one, ins.OnBuild)]
        fired = tuple(_trigger(text, begin.place) for text in texts)
        instructions = fired + instructions
    return Stage(len(above), begin.name, origin, begun.platform, begin, instructions)


def _platform(text: str) -> Platform:
    try:
        system, *others = text.lower().split("/")
        # A lone architecture is of Linux.
        if not others and system != "linux":
            system, others = "linux", [system]
        if not others:
            return Platform.host()
        machine = _ARCHITECTURES.get(others[0], others[0])
        return Platform.parse("/".join((system, machine, *others[1:])))
    except ImageError as error:
        raise BuildError(error.message, hint=error.hint) from error


def _image_origin(name: str) -> Origin:
    if name == Kind.SCRATCH.value:
        return Origin(Kind.SCRATCH)
    if name == Kind.HOST.value:
        return Origin(Kind.HOST)
    return Origin(Kind.IMAGE, name)


def _target(names: Mapping[str, int], count: int, target: str) -> int:
    number = names.get(target.lower())
    if number is None and target.isascii() and target.isdigit() and len(target) < 6:
        number = int(target) if int(target) < count else None
    if number is None:
        close = difflib.get_close_matches(target[:100], names, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names) or 'none'}"
        raise BuildError(f"there is no stage {target!r}", hint=hint)
    return number


def _trigger(text: str, place: Place) -> ins.Instruction:
    """Read one ONBUILD instruction; errors name the FROM that brought it."""
    with place.blamed():
        try:
            read = parse(text, place.file).instructions
        except BuildError as error:
            raise BuildError(f"ONBUILD {text!r}: {error.problem}", hint=error.hint) from error
        refused = (ins.From, ins.OnBuild, ins.Maintainer)
        if len(read) != 1 or isinstance(read[0], refused):
            raise BuildError(
                f"the base's ONBUILD {text!r} is not one instruction", hint="use another base"
            )
    return replace(read[0], place=replace(place, text=f"ONBUILD {text}"))
