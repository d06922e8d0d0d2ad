"""What instructions do to the config of an image, one after the other."""

from __future__ import annotations

import pytest

from sandbox_kernel.build import config, lint, resolve
from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.config import Arguments, StageState
from sandbox_kernel.build.dockerfile import parse
from sandbox_kernel.build.stages import plan
from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.image_config import ImageConfig
from sandbox_kernel.image.platform import Platform

AMD64 = Platform("linux", "amd64")
BASE = ImageConfig(AMD64, env=(("PATH", "/bin"),))
RT = "SIGRTMIN+3"


def built(text: str, base: ImageConfig = BASE, **arguments: str) -> StageState:
    """Apply all instructions of all stages, each stage on the one before."""
    found = plan(parse(text), arguments=arguments, platform=AMD64)
    state = config.begin(base)
    for stage in found.stages:
        state = config.inherit(state) if stage.index else state
        for one in stage.instructions:
            resolved = resolve.resolve(one, state.variables, state.config.working_dir)
            given = Arguments(found.arguments, found.scope)
            state = config.apply(resolved.instruction, state, given)
    return state


def refused(text: str) -> BuildError:
    with pytest.raises(BuildError) as caught:
        built(text)
    assert caught.value.hint
    return caught.value


def process(text: str) -> config.Process:
    (found,) = [one for one in parse(text).instructions if isinstance(one, ins.Run)]
    return config.process(found, built(text).config)


# ENV and ARG


def test_env_sees_what_was_before_its_line() -> None:
    state = built("FROM a\nENV a=hello\nENV a=bye b=$a\nENV c=$a PATH=/x:$PATH")
    assert state.config.env == (("PATH", "/x:/bin"), ("a", "bye"), ("b", "hello"), ("c", "bye"))


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('ENV n="a b"', "a b"),
        ("ENV n=a\\ b", "a b"),
        ("ENV n a  b", "a  b"),
        ('ENV n "a b"', "a b"),
        ("ENV n='$PATH'", "$PATH"),
        ('ENV n="a\\"b"', 'a"b'),
        ("ENV n=", ""),
        ("ENV n=a=b", "a=b"),
        ("ENV n=${PATH:+p}", "p"),
    ],
)
def test_a_value_loses_its_quotes(line: str, value: str) -> None:
    assert dict(built(f"FROM a\n{line}").config.env)["n"] == value


def test_arguments_are_seen_by_the_build_and_are_not_in_the_config() -> None:
    state = built("ARG g=1\nFROM a\nARG x=2 y g\nENV e=$x$y$g", y="3")
    assert state.config.env == (("PATH", "/bin"), ("e", "231"))
    assert dict(state.env) == {"PATH": "/bin", "x": "2", "y": "3", "g": "1", "e": "231"}


def test_an_argument_before_from_is_unknown_until_it_is_declared() -> None:
    assert dict(built("ARG g=1\nFROM a\nENV e=$g").config.env)["e"] == ""


def test_a_given_value_beats_the_default_and_a_default_beats_the_outer_one() -> None:
    state = built("ARG a=1 b=1\nFROM a\nARG a=2 b=2\nARG TARGETARCH TARGETOS=x", a="3")
    assert {name: dict(state.env)[name] for name in ("a", "b", "TARGETARCH", "TARGETOS")} == {
        "a": "3",
        "b": "2",
        "TARGETARCH": "amd64",
        "TARGETOS": "x",
    }


def test_env_hides_an_argument_that_was_declared_before() -> None:
    assert dict(built("FROM a\nARG x\nENV x=env", x="arg").env)["x"] == "env"
    assert dict(built("FROM a\nARG x\nENV x=${x:-d}", x="arg").config.env)["x"] == "arg"


def test_an_argument_without_a_value_sets_nothing() -> None:
    state = built("FROM a\nENV x=1\nARG x y")
    assert dict(state.env)["x"] == "1"
    assert "y" not in dict(state.env)
    assert state.declared == ("x", "y")


def test_a_default_is_not_looked_at_where_a_value_is_given() -> None:
    assert dict(built("FROM a\nARG x=${no:?never}", x="1").env)["x"] == "1"
    assert "no: never" in refused("FROM a\nARG x=${no:?never}").problem


def test_a_stage_passes_arguments_on() -> None:
    assert dict(built("FROM a AS b\nARG x=1\nFROM b\nENV e=$x").config.env)["e"] == "1"


def test_a_path_is_there_even_on_nothing() -> None:
    state = built("FROM scratch", ImageConfig(AMD64))
    assert state.config.env == (("PATH", config.DEFAULT_PATH),)


def test_proxies_need_no_declaration() -> None:
    given = {"HTTP_PROXY": "p", "no_proxy": "n", "OTHER": "o"}
    assert config.proxy_environment(given) == (
        ("http_proxy", "p"),
        ("HTTP_PROXY", "p"),
        ("no_proxy", "n"),
        ("NO_PROXY", "n"),
    )


# Folders, users, labels


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        ("WORKDIR /a\nWORKDIR b\nWORKDIR ../c", "/a/c"),
        ("WORKDIR a", "/a"),
        ("WORKDIR /a/../../..", "/"),
        ("WORKDIR //a//b/", "/a/b"),
        ("ENV D=/d\nWORKDIR $D/$X", "/d"),
        ('WORKDIR "/a b"', "/a b"),
    ],
)
def test_the_working_directory_is_absolute_and_clean(lines: str, path: str) -> None:
    assert built(f"FROM a\n{lines}").config.working_dir == path


def test_the_user() -> None:
    assert built("FROM a\nARG u=me\nUSER $u:adm").config.user == "me:adm"
    assert refused("FROM a\nUSER $nobody").problem == "USER comes out empty"


def test_labels_keep_their_order_and_the_last_value_counts() -> None:
    state = built('FROM a\nLABEL a=1 "b c"=2\nLABEL a=$PATH')
    assert state.config.labels == (("a", "/bin"), ("b c", "2"))
    assert "LABEL without a name" in refused('FROM a\nLABEL ""=1').problem
    assert "ENV of the name ''" in refused("FROM a\nENV $no=1").problem


def test_volumes_and_author() -> None:
    state = built('FROM a\nVOLUME /v $PATH\nVOLUME ["/w x"]\nMAINTAINER Ann <a@b>')
    assert state.config.volumes == ("/bin", "/v", "/w x")
    assert state.config.author == "Ann <a@b>"


# Commands


def test_commands_get_the_shell_in_the_shell_form() -> None:
    state = built('FROM a\nCMD echo $x\nSHELL ["/bin/bash", "-ec"]\nENTRYPOINT run $x')
    assert state.config.cmd == ("/bin/sh", "-c", "echo $x")
    assert state.config.entrypoint == ("/bin/bash", "-ec", "run $x")
    assert built('FROM a\nCMD ["a", "$x"]').config.cmd == ("a", "$x")


def test_an_entry_point_resets_a_command_of_the_base_only() -> None:
    base = BASE.replace(cmd=("old",), entrypoint=("entry",))
    assert built('FROM a\nENTRYPOINT ["e"]', base).config.cmd == ()
    assert built('FROM a\nCMD ["c"]\nENTRYPOINT ["e"]', base).config.cmd == ("c",)
    assert built('FROM a AS b\nCMD ["c"]\nFROM b\nENTRYPOINT ["e"]', base).config.cmd == ()
    assert built('FROM a\nCMD ["c"]', base).config.entrypoint == ("entry",)
    cleared = built("FROM a\nENTRYPOINT []\nCMD []", base).config
    assert (cleared.entrypoint, cleared.cmd) == ((), ())


def test_what_run_starts() -> None:
    assert process("FROM a\nRUN echo 1").argv == ("/bin/sh", "-c", "echo 1")
    assert process('FROM a\nSHELL ["/x"]\nRUN echo 1').argv == ("/x", "echo 1")
    assert process('FROM a\nRUN ["a", "b c"]').argv == ("a", "b c")


def test_what_run_starts_from_a_heredoc() -> None:
    assert process("FROM a\nRUN <<-EOF\n\techo\nEOF").argv == ("/bin/sh", "-c", "echo\n")
    found = process("FROM a\nRUN <<'a.py'\n#!/usr/bin/python3\nprint(1)\na.py")
    assert found.argv == ("/dev/pipes/a.py",)
    assert found.script is not None
    assert found.script.text == "#!/usr/bin/python3\nprint(1)\n"
    mixed = process("FROM a\nRUN cat <<A - <<-B\n1\nA\n\t2\nB")
    assert mixed.argv[-1] == "cat <<A - <<-B\n1\nA\n\t2\nB"


# The rest


def test_ports() -> None:
    state = built("FROM a\nENV P='80 443'\nEXPOSE $P 53/UDP 8000-8002/tcp 127.0.0.1:1:99")
    assert state.config.exposed_ports == (
        "443/tcp",
        "53/udp",
        "80/tcp",
        "8000/tcp",
        "8001/tcp",
        "8002/tcp",
        "99/tcp",
    )


@pytest.mark.parametrize("port", ["x", "65536", "80/icmp", "9-8", "-1", "80-", "1-2-3", "/tcp"])
def test_a_bad_port_is_named(port: str) -> None:
    error = refused(f"FROM a\nEXPOSE {port}")
    assert error.problem == f"EXPOSE {port}"
    assert error.place == "Dockerfile:2"


@pytest.mark.parametrize("name", ["SIGTERM", "TERM", "sigkill", "9", RT, "RTMAX-1", "64"])
def test_a_signal_is_kept_as_it_is_written(name: str) -> None:
    assert built(f"FROM a\nSTOPSIGNAL {name}").config.stop_signal == name


@pytest.mark.parametrize("name", ["SIGNOT", "0", "65", "-9", "99999999", "\uff19"])
def test_a_bad_signal_is_named(name: str) -> None:
    assert refused(f"FROM a\nSTOPSIGNAL {name}").problem == f"STOPSIGNAL {name} is no signal"


def test_healthchecks() -> None:
    state = built("FROM a\nHEALTHCHECK --timeout=2s --retries=2 CMD curl x")
    assert state.config.healthcheck == {
        "Test": ["CMD-SHELL", "curl x"],
        "Timeout": 2_000_000_000,
        "Retries": 2,
    }
    assert built('FROM a\nHEALTHCHECK CMD ["a"]').config.healthcheck == {"Test": ["CMD", "a"]}
    assert built("FROM a\nHEALTHCHECK NONE").config.healthcheck == {"Test": ["NONE"]}


def test_triggers_are_kept_as_they_are_and_those_of_the_base_dropped() -> None:
    base = BASE.replace(on_build=("RUN old",))
    state = built("FROM a\nONBUILD RUN echo $x \\\n && y\nONBUILD COPY . /", base)
    assert state.config.on_build == ("RUN echo $x  && y", "COPY . /")
    assert state.triggers == ("RUN old",)
    assert built("FROM a AS b\nONBUILD RUN x\nFROM b", base).config.on_build == ()


def test_copies_and_mounts_are_resolved() -> None:
    text = (
        "FROM a\nWORKDIR /w\nENV s=src d=/dst\n"
        "COPY --chown=$s --chmod=$m $s/* ${d} \n"
        "RUN --mount=type=cache,target=$s x\n"
        "COPY <<E <<'F' /\n$s \"q\"\nE\n$s\nF\n"
    )
    state = built(text)
    _, _, _, first, second, third = parse(text).instructions
    found = [
        resolve.resolve(one, state.variables, state.config.working_dir)
        for one in (first, second, third)
    ]
    copied = found[0].instruction
    assert isinstance(copied, ins.Copy)
    assert (copied.sources, copied.destination, copied.chown) == (("src/*",), "/dst", "src")
    assert found[0].unset == {"m"}
    assert found[1].mounts[0].target == "/w/src"
    documents = found[2].instruction
    assert isinstance(documents, ins.Copy)
    assert [one.text for one in documents.documents] == ['src "q"\n', "$s\n"]


def test_errors_of_words_name_the_line() -> None:
    error = refused("FROM a\n\nWORKDIR ${x:?no x}")
    assert error.place == "Dockerfile:3"
    assert error.problem == "x: no x"
    assert refused("FROM a\nRUN --mount=type=$x,target=/y z").problem.startswith("--mount=type=")


def test_a_config_does_not_change_the_one_before() -> None:
    before = BASE.render()
    built("FROM a\nENV PATH=/x\nLABEL a=b\nEXPOSE 1")
    assert BASE.render() == before
    assert lint.parse_checks("").errors is False
