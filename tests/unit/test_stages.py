"""The graph of stages, the values of arguments before them, and the warnings about a file."""

from __future__ import annotations

import pytest

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.dockerfile import parse
from sandbox_kernel.build.ignore import Ignore
from sandbox_kernel.build.lint import check, undefined_variables
from sandbox_kernel.build.stages import Kind, Origin, Plan, plan
from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.platform import Platform

AMD64 = Platform("linux", "amd64")


def planned(text: str, target: str = "", **arguments: str) -> Plan:
    return plan(parse(text), target=target, arguments=arguments, platform=AMD64)


def titles(found: Plan) -> list[str]:
    return [stage.title for stage in found.order()]


def refused(text: str, target: str = "") -> BuildError:
    with pytest.raises(BuildError) as caught:
        planned(text, target)
    assert caught.value.hint
    return caught.value


MANY = """\
FROM debian AS base
FROM base AS tools
FROM scratch AS unused
FROM tools
COPY --from=base /a /
FROM host AS last
COPY --from=3 /b /
RUN --mount=type=bind,from=base,target=/x true
COPY --from=busybox:1 /c /
"""


def test_only_what_the_target_needs_is_in_the_order() -> None:
    assert titles(planned(MANY)) == ["base", "tools", "stage-3", "last"]
    assert titles(planned(MANY, "tools")) == ["base", "tools"]
    assert titles(planned(MANY, "unused")) == ["unused"]
    assert titles(planned(MANY, "3")) == ["base", "tools", "stage-3"]
    assert titles(planned(MANY, "TOOLS")) == ["base", "tools"]


def test_what_stages_begin_with() -> None:
    found = planned(MANY)
    assert [stage.origin for stage in found.stages] == [
        Origin(Kind.IMAGE, "debian"),
        Origin(Kind.STAGE, stage=0),
        Origin(Kind.SCRATCH),
        Origin(Kind.STAGE, stage=1),
        Origin(Kind.HOST),
    ]
    last = found.stages[4]
    assert found.origin("busybox:1", last, last.begin.place) == Origin(Kind.IMAGE, "busybox:1")
    assert found.origin("BASE", last, last.begin.place) == Origin(Kind.STAGE, stage=0)


def test_the_last_of_two_stages_with_a_name_counts() -> None:
    found = planned("FROM a AS x\nFROM b AS x\nFROM x")
    assert found.stages[2].origin == Origin(Kind.STAGE, stage=1)


def test_an_image_may_have_the_name_of_a_later_stage() -> None:
    found = planned("FROM debian AS x\nFROM x AS debian")
    assert found.stages[0].origin == Origin(Kind.IMAGE, "debian")


@pytest.mark.parametrize(
    ("text", "says", "place"),
    [
        ("FROM a\nCOPY --from=b x /\nFROM c AS b", "the stage b is not one before", 2),
        ("FROM a AS b\nCOPY --from=b x /", "the stage b is not one before", 2),
        ("FROM a\nCOPY --from=0 x /", "the stage 0 is not one before", 2),
        ("FROM a\nCOPY --from=7 x /", "no stage 7", 2),
        ("FROM a\nRUN --mount=from=b,target=/x y\nFROM c AS b", "the stage b is not one before", 2),
        ("RUN x\nFROM a", "RUN before the first FROM", 1),
        ("ARG x\nENV a=b\nFROM a", "ENV before the first FROM", 2),
        ("FROM $X", "FROM $X comes out empty", 1),
        ("FROM --platform=$X a", "--platform=$X comes out empty", 1),
        ("FROM --platform=linux/a/b/c a", "'linux/a/b/c' is not a platform", 1),
        ("ARG A='x' B=\"${B:?set B}\"\nFROM a", "B: set B", 1),
        ("FROM ${A/b}", "without its /", 1),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(text: str, says: str, place: int) -> None:
    error = refused(text)
    assert says in error.problem
    assert error.place == f"Dockerfile:{place}"


def test_a_target_that_is_not_there_is_named() -> None:
    error = refused("FROM a AS build", "biuld")
    assert error.problem == "there is no stage 'biuld'"
    assert error.hint == "did you mean build?"
    assert refused("FROM a AS build", "9").hint == "there are build"


def test_a_file_of_arguments_only_has_no_stage() -> None:
    assert "has no FROM" in refused("ARG x").problem


def test_arguments_before_from_have_defaults_and_values() -> None:
    text = "ARG V=12 W\nARG T=slim-$V\nFROM debian:$V-${T}${W} AS s"
    assert planned(text).stages[0].origin.image == "debian:12-slim-12"
    assert planned(text, V="11", W="-x").stages[0].origin.image == "debian:11-slim-11-x"


def test_platforms_are_arguments() -> None:
    found = planned("FROM --platform=$TARGETPLATFORM a\nFROM --platform=linux/aarch64 b")
    assert [stage.platform for stage in found.stages] == [AMD64, Platform("linux", "arm64")]
    assert found.scope["TARGETARCH"] == "amd64"
    assert found.scope["BUILDPLATFORM"] == str(Platform.host())
    assert planned("FROM a AS x", "x").scope["TARGETSTAGE"] == "x"
    assert planned("FROM a").scope["TARGETSTAGE"] == "default"


def test_triggers_of_a_stage_fire_in_the_one_that_begins_with_it_and_not_in_the_next() -> None:
    text = "FROM a AS x\nONBUILD COPY --from=x a b\nRUN 1\nFROM x AS y\nRUN 2\nFROM y\nRUN 3"
    # The trigger names a stage that is known where it fires.
    found = planned(text)
    assert [one.keyword for one in found.stages[1].instructions] == ["COPY", "RUN"]
    assert [one.keyword for one in found.stages[2].instructions] == ["RUN"]
    assert str(found.stages[1].instructions[0].place) == "Dockerfile:4"


def test_triggers_of_an_image_fire_first() -> None:
    found = planned("FROM z AS z\nFROM a\nRUN 1")
    fired = found.with_triggers(found.stages[1], ("COPY --from=z . /app", "RUN make"))
    assert [one.keyword for one in fired.stages[1].instructions] == ["COPY", "RUN", "RUN"]
    assert titles(fired) == ["z", "stage-1"]
    copied = fired.stages[1].instructions[0]
    assert isinstance(copied, ins.Copy)
    assert copied.place.text == "ONBUILD COPY --from=z . /app"


@pytest.mark.parametrize(
    ("trigger", "says"),
    [
        ("FROM x", "is not one instruction"),
        ("RUN a\nRUN b", "is not one instruction"),
        ("RUX a", "there is no instruction RUX"),
        ("COPY --from=5 a b", "no stage 5"),
    ],
)
def test_a_bad_trigger_is_blamed_on_from(trigger: str, says: str) -> None:
    found = planned("FROM a\nRUN 1")
    with pytest.raises(BuildError) as caught:
        found.with_triggers(found.stages[0], (trigger,))
    assert says in caught.value.problem
    assert caught.value.place == "Dockerfile:1"


# Warnings


def rules(text: str, ignore: Ignore | None = None, **arguments: str) -> list[tuple[str, int]]:
    return [(one.rule, one.place.line) for one in check(planned(text, **arguments), ignore)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("FROM a AS B", [("StageNameCasing", 1)]),
        ("FROM a as b", [("FromAsCasing", 1)]),
        ("from a AS b", [("FromAsCasing", 1)]),
        ("FROM a\nRUN x \\\n\n y", [("NoEmptyContinuation", 2)]),
        ("FROM a\nrun x", [("ConsistentInstructionCasing", 2)]),
        ("from a\nrun x\nRUN y", [("ConsistentInstructionCasing", 3)]),
        ("FROM a\nRun x", [("ConsistentInstructionCasing", 2)]),
        ("FROM a AS b\nFROM a AS b", [("DuplicateStageName", 2)]),
        ("FROM a AS scratch", [("ReservedStageName", 1)]),
        ("FROM a\nCMD x", [("JSONArgsRecommended", 2)]),
        ("FROM a\nENTRYPOINT x", [("JSONArgsRecommended", 2)]),
        ('FROM a\nSHELL ["x"]\nCMD x', []),
        ('FROM a AS b\nSHELL ["x"]\nFROM b\nCMD x', []),
        ("FROM a\nRUN ['x']", [("MalformedJSONArgs", 2)]),
        ("FROM a\nMAINTAINER x", [("MaintainerDeprecated", 2)]),
        ("ARG v\nFROM a$v$w", [("UndefinedArgInFrom", 2)]),
        ("FROM a\nWORKDIR b\nWORKDIR c", [("WorkdirRelativePath", 2)]),
        ("FROM a\nWORKDIR /b\nWORKDIR c", []),
        ("FROM a AS b\nWORKDIR /b\nFROM b\nWORKDIR c", []),
        ('FROM a\nCMD ["x"]\nCMD ["y"]', [("MultipleInstructionsDisallowed", 2)]),
        ("FROM a\nENV a b", [("LegacyKeyValueFormat", 2)]),
        ("FROM a\nLABEL a b", [("LegacyKeyValueFormat", 2)]),
        ("FROM --platform=$TARGETPLATFORM a", [("RedundantTargetPlatform", 1)]),
        ("FROM --platform=linux/amd64 a", [("FromPlatformFlagConstDisallowed", 1)]),
        ("FROM --platform=linux/amd64 a AS x-amd64", []),
        ("FROM a\nARG GIT_TOKEN", [("SecretsUsedInArgOrEnv", 2)]),
        ("FROM a\nENV API_KEY=1 KEY_FILE=2 PUBLIC_KEY=3", [("SecretsUsedInArgOrEnv", 2)]),
        ("FROM a\nEXPOSE 80/TCP", [("ExposeProtoCasing", 2)]),
        ("FROM a\nEXPOSE 1.2.3.4:80:80", [("ExposeInvalidFormat", 2)]),
        ("FROM a\nRUN x", []),
    ],
)
def test_what_is_questionable_has_buildkits_name(text: str, found: list[tuple[str, int]]) -> None:
    assert rules(text) == found


def test_a_default_that_gives_no_image_is_found_even_if_a_value_is_given() -> None:
    found = planned("ARG v\nFROM a:$v", v="1")
    assert [one.rule for one in check(found)] == ["InvalidDefaultArgInFrom"]


def test_an_argument_that_nothing_declares_is_told() -> None:
    found = check(planned("FROM a\nARG x", x="1", y="2", HTTP_PROXY="p", TARGETARCH="z"))
    assert [(one.rule, one.message) for one in found] == [
        ("UnusedBuildArg", "Build argument 'y' was given, and no ARG declares it")
    ]


def test_copies_of_what_is_ignored_are_told() -> None:
    text = "FROM a AS b\nFROM b\nCOPY x/y z /\nADD ./x /\nCOPY --from=b x /\nCOPY . /"
    assert rules(text, Ignore(["x"])) == [("CopyIgnoredFile", 3), ("CopyIgnoredFile", 4)]
    assert rules(text, Ignore(["x", "!x/y"])) == []


def test_rules_are_left_out_by_name() -> None:
    text = "FROM a as b\nMAINTAINER x\n"
    assert rules("# check=skip=FromAsCasing\n" + text) == [("MaintainerDeprecated", 3)]
    assert rules("# check=skip=FromAsCasing, MaintainerDeprecated\n" + text) == []
    assert rules("# check=skip=all\n" + text) == []
    assert rules("FROM a as b\n# check=skip=MaintainerDeprecated\nMAINTAINER x") == [
        ("FromAsCasing", 1)
    ]


def test_warnings_can_be_errors() -> None:
    found = planned("# check=error=true;skip=FromAsCasing\nFROM a as b\nMAINTAINER x")
    with pytest.raises(BuildError, match=r"Dockerfile:3: MaintainerDeprecated"):
        check(found)
    with pytest.raises(BuildError, match=r"'warn=no' is not known"):
        check(planned("# check=warn=no\nFROM a"))


def test_a_variable_without_a_value_is_told() -> None:
    found = planned("FROM a\nENV x=$y$z")
    instruction = found.stages[0].instructions[0]
    (finding,) = undefined_variables(found, instruction, {"y", "z"}, ("z",))
    assert str(finding) == "Dockerfile:2: UndefinedVar: Usage of undefined variable '$y'"
