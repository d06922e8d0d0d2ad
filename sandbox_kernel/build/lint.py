"""Warnings about a Dockerfile, under the names that BuildKit's checks have where it has them.

They never change what is built. `# check=skip=RULE,RULE` or `skip=all` at the top of the file
leaves rules out, as such a comment right above an instruction does for that one;
`# check=error=true` makes warnings errors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.config import PROXIES
from sandbox_kernel.build.dockerfile import Dockerfile, is_url
from sandbox_kernel.build.expand import expand
from sandbox_kernel.build.ignore import Ignore
from sandbox_kernel.build.place import Place
from sandbox_kernel.build.ports import published
from sandbox_kernel.build.stages import Plan, Stage, declare, predefined
from sandbox_kernel.errors import BuildError, ImageError
from sandbox_kernel.image.platform import Platform
from sandbox_kernel.image.reference import Reference

_SECRET = re.compile(
    r"(?:_|^)(?:apikey|auth|credentials?|key|password|pword|passwd|secret|token)(?:_|$)",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(r"(?:_|^)(?:public|file|version)(?:_|$)", re.IGNORECASE)
_CHECK = re.compile(r"check\s*=\s*(\S+)", re.IGNORECASE)
_RESERVED = ("context", "scratch", "host")


@dataclass(frozen=True)
class Finding:
    """One warning: the rule, what is wrong, and where."""

    rule: str
    message: str
    place: Place

    def __str__(self) -> str:
        return f"{self.place}: {self.rule}: {self.message}"


@dataclass(frozen=True)
class Checks:
    """What `# check=` says."""

    skipped: frozenset[str] = frozenset()
    skips_all: bool = False
    errors: bool = False

    def takes(self, rule: str) -> bool:
        """Tell whether findings of a rule are wanted."""
        return not self.skips_all and rule not in self.skipped


def parse_checks(text: str) -> Checks:
    """Read `skip=RULE,RULE;error=true`; raises BuildError."""
    skipped: set[str] = set()
    errors = False
    for part in text.split(";") if text.strip() else ():
        key, _, value = (one.strip() for one in part.partition("="))
        if key == "skip" and value:
            skipped |= {rule.strip() for rule in value.split(",")}
        elif key == "error" and value.lower() in {"true", "false", "1", "0"}:
            errors = value.lower() in {"true", "1"}
        elif key != "experimental":
            raise BuildError(
                f"# check={text}: {part!r} is not known",
                hint="write # check=skip=RULE,RULE;error=true",
            )
    return Checks(frozenset(skipped), "all" in skipped, errors)


def check(plan: Plan, ignore: Ignore | None = None) -> tuple[Finding, ...]:
    """Give what is questionable in a Dockerfile, in the order of its lines; raises BuildError.

    That is: for a bad `# check=`, or if it says that warnings are errors and there is one.
    """
    found = [finding for rule in _RULES for finding in rule(plan)]
    if ignore is not None:
        found += _ignored_sources(plan, ignore)
    return report(plan.dockerfile, found)


def undefined_variables(
    plan: Plan, instruction: ins.Instruction, unset: Iterable[str], declared: Iterable[str]
) -> tuple[Finding, ...]:
    """Give findings for variables that an instruction asked for in vain; raises as `check`."""
    names = sorted(set(unset) - set(declared))
    found = [
        Finding("UndefinedVar", f"Usage of undefined variable '${name}'", instruction.place)
        for name in names
    ]
    return report(plan.dockerfile, found)


def report(dockerfile: Dockerfile, found: Iterable[Finding]) -> tuple[Finding, ...]:
    """Leave out what the file skips; raises BuildError if findings are errors to it."""
    checks = parse_checks(dockerfile.check)
    local = {one.place: _local(one) for one in dockerfile.instructions}
    wanted = [
        one
        for one in found
        if checks.takes(one.rule) and local.get(one.place, Checks()).takes(one.rule)
    ]
    wanted.sort(key=lambda one: (one.place.line, one.rule))
    if checks.errors and wanted:
        raise wanted[0].place.error(
            f"{wanted[0].rule}: {wanted[0].message}",
            hint=f"mend it, or say # check=skip={wanted[0].rule}; warnings are errors in this file",
        )
    return tuple(wanted)


def _local(instruction: ins.Instruction) -> Checks:
    for comment in instruction.comments:
        if match := _CHECK.fullmatch(comment):
            with instruction.place.blamed():
                return parse_checks(match[1])
    return Checks()


def _written(place: Place) -> str:
    return place.text.split(maxsplit=1)[0]


def _casing(plan: Plan) -> Iterator[Finding]:
    words = [(_written(one.place), one.place) for one in plan.dockerfile.instructions]
    counted = Counter(word.islower() for word, _ in words if word.islower() or word.isupper())
    lower = counted[True] > counted[False]
    wanted = "lowercase" if lower else "uppercase"
    for word, place in words:
        if word != (word.lower() if lower else word.upper()):
            text = f"Command '{word}' should match the case of the command majority ({wanted})"
            yield Finding("ConsistentInstructionCasing", text, place)
    for place in plan.dockerfile.empty_continuations:
        yield Finding("NoEmptyContinuation", "Empty continuation line", place)


def _stage_names(plan: Plan) -> Iterator[Finding]:
    seen: set[str] = set()
    for stage in plan.stages:
        place, name = stage.begin.place, stage.name
        if not name:
            continue
        keyword, *_, as_word, written = place.text.split()
        if written != name:
            yield Finding("StageNameCasing", f"Stage name '{written}' should be lowercase", place)
        if (keyword.islower() and not as_word.islower()) or (
            keyword.isupper() and not as_word.isupper()
        ):
            text = f"'{as_word}' and '{keyword}' keywords' casing do not match"
            yield Finding("FromAsCasing", text, place)
        if name in seen:
            text = f'Duplicate stage name "{name}", stage names should be unique'
            yield Finding("DuplicateStageName", text, place)
        if name in _RESERVED:
            text = f'Stage name should not use the same name as reserved stage "{name}"'
            yield Finding("ReservedStageName", text, place)
        seen.add(name)


def _bases(plan: Plan) -> Iterator[Finding]:
    escape = plan.dockerfile.escape
    defaults = predefined(plan.platform, plan.stages[plan.target].name)
    declared: set[str] = set()
    for instruction in plan.dockerfile.instructions:
        if not isinstance(instruction, ins.Arg):
            break
        declare(instruction, defaults, {}, escape=escape)
        declared |= {name for name, _ in instruction.arguments}
    for stage in plan.stages:
        begin = stage.begin
        found = [expand(text, plan.scope, escape=escape) for text in (begin.base, begin.platform)]
        for name in sorted((found[0].unset | found[1].unset) - declared):
            text = f"FROM argument '{name}' is not declared"
            yield Finding("UndefinedArgInFrom", text, begin.place)
        if not _is_reference(begin.base, defaults, escape):
            text = f"Default value for ARG {begin.base} results in empty or invalid base image name"
            yield Finding("InvalidDefaultArgInFrom", text, begin.place)
        yield from _platform_flags(stage)


def _is_reference(base: str, defaults: dict[str, str], escape: str) -> bool:
    try:
        Reference.parse(expand(base, defaults, escape=escape).text)
    except ImageError:
        return False
    return True


def _platform_flags(stage: Stage) -> Iterator[Finding]:
    text = stage.begin.platform
    if text in ("$TARGETPLATFORM", "${TARGETPLATFORM}"):
        message = (
            f"Setting platform to predefined {text} in FROM is redundant as this is the default "
            "behavior"
        )
        yield Finding("RedundantTargetPlatform", message, stage.begin.place)
    elif text and "$" not in text and not _named_for(stage):
        message = f'FROM --platform flag should not use constant value "{text}"'
        yield Finding("FromPlatformFlagConstDisallowed", message, stage.begin.place)


def _named_for(stage: Stage) -> bool:
    platform = stage.platform or Platform.host()
    return platform.os in stage.name or platform.architecture in stage.name


def _shells(plan: Plan) -> Iterator[Finding]:
    has_shell: dict[int, bool] = {}
    for stage in plan.stages:
        shell = has_shell.get(stage.origin.stage, False)
        for one in stage.instructions:
            shell = shell or isinstance(one, ins.Shell)
            if isinstance(one, ins.Cmd | ins.Entrypoint) and one.command.shell and not shell:
                text = (
                    f"JSON arguments recommended for {one.keyword} to prevent unintended behavior "
                    "related to OS signals"
                )
                yield Finding("JSONArgsRecommended", text, one.place)
            command = getattr(one, "command", None)
            if isinstance(command, ins.Command) and command.malformed:
                text = f"{one.keyword} looks like a JSON list and is none: it goes to the shell"
                yield Finding("MalformedJSONArgs", text, one.place)
        has_shell[stage.index] = shell


def _singles(plan: Plan) -> Iterator[Finding]:
    for stage in plan.stages:
        last: dict[type, ins.Instruction] = {}
        for one in stage.instructions:
            if not isinstance(one, ins.Cmd | ins.Entrypoint | ins.Healthcheck):
                continue
            if type(one) in last:
                text = (
                    f"Multiple {one.keyword} instructions should not be used in the same stage "
                    "because only the last one will be used"
                )
                yield Finding("MultipleInstructionsDisallowed", text, last[type(one)].place)
            last[type(one)] = one


def _workdirs(plan: Plan) -> Iterator[Finding]:
    settled: dict[int, bool] = {}
    for stage in plan.stages:
        known = settled.get(stage.origin.stage, False)
        for one in stage.instructions:
            if isinstance(one, ins.Workdir):
                if not known and not one.path.lstrip("'\"").startswith(("/", "$")):
                    text = (
                        f'Relative workdir "{one.path}" can have unexpected results if the base '
                        "image changes"
                    )
                    yield Finding("WorkdirRelativePath", text, one.place)
                known = True
        settled[stage.index] = known


def _words(plan: Plan) -> Iterator[Finding]:
    for one in plan.dockerfile.instructions:
        if isinstance(one, ins.Maintainer):
            text = "Maintainer instruction is deprecated in favor of using label"
            yield Finding("MaintainerDeprecated", text, one.place)
        if isinstance(one, ins.Env | ins.Label) and one.legacy:
            text = (
                f'"{one.keyword} key=value" should be used instead of legacy '
                f'"{one.keyword} key value" format'
            )
            yield Finding("LegacyKeyValueFormat", text, one.place)
        if isinstance(one, ins.Env | ins.Arg):
            yield from _secrets(one)
        if isinstance(one, ins.Expose):
            yield from _exposed(one)


def _secrets(one: ins.Env | ins.Arg) -> Iterator[Finding]:
    for name, _ in one.pairs if isinstance(one, ins.Env) else one.arguments:
        if _SECRET.search(name) and not _NO_SECRET.search(name):
            text = f'Do not use ARG or ENV instructions for sensitive data ({one.keyword} "{name}")'
            yield Finding("SecretsUsedInArgOrEnv", text, one.place)


def _exposed(one: ins.Expose) -> Iterator[Finding]:
    for port in one.ports:
        before, _, protocol = published(port) if "$" not in port else ("", "", "")
        if protocol != protocol.lower():
            text = f"Defined protocol '{port}' in EXPOSE instruction should be lowercase"
            yield Finding("ExposeProtoCasing", text, one.place)
        if before:
            text = (
                "EXPOSE instruction should not define an IP address or host-port mapping, found "
                f"'{port}'"
            )
            yield Finding("ExposeInvalidFormat", text, one.place)


def _unused_arguments(plan: Plan) -> Iterator[Finding]:
    named = {
        name
        for one in plan.dockerfile.instructions
        if isinstance(one, ins.Arg)
        for name, _ in one.arguments
    }
    for name in sorted(set(plan.arguments) - named):
        if name.lower() not in PROXIES and name not in predefined(plan.platform, ""):
            place = plan.stages[0].begin.place
            text = f"Build argument '{name}' was given, and no ARG declares it"
            yield Finding("UnusedBuildArg", text, place)


def _ignored_sources(plan: Plan, ignore: Ignore) -> Iterator[Finding]:
    # With `!` a file in a folder that is left out may be in, so nothing can be said.
    if ignore.takes_back:
        return
    for one in plan.dockerfile.instructions:
        if not isinstance(one, ins.Transfer) or (isinstance(one, ins.Copy) and one.stage):
            continue
        for source in one.sources:
            path = source.strip("/").removeprefix("./").rstrip("/")
            if path and path != "." and not is_url(source) and ignore.ignores(path):
                verb = one.keyword.capitalize()
                text = f'Attempting to {verb} file "{path}" that is excluded by .dockerignore'
                yield Finding("CopyIgnoredFile", text, one.place)


_RULES: tuple[Callable[[Plan], Iterator[Finding]], ...] = (
    _casing,
    _stage_names,
    _bases,
    _shells,
    _singles,
    _workdirs,
    _words,
    _unused_arguments,
)
