"""The Dockerfile's syntax: from bytes to typed instructions, and what is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.dockerfile import Dockerfile, parse, words_of
from sandbox_kernel.build.lexer import MAX_FILE_BYTES
from sandbox_kernel.build.mounts import parse_mount
from sandbox_kernel.errors import BuildError

SECOND_NS = 1_000_000_000


def one(line: str, *, before: str = "FROM a\n") -> ins.Instruction:
    """Give the one instruction behind FROM."""
    (_, instruction) = parse(before + line).instructions
    return instruction


def run(line: str) -> ins.Run:
    found = one(line)
    assert isinstance(found, ins.Run)
    return found


def copy(line: str) -> ins.Copy:
    found = one(line)
    assert isinstance(found, ins.Copy)
    return found


def refused(text: str) -> BuildError:
    with pytest.raises(BuildError) as caught:
        parse(text)
    assert caught.value.hint
    return caught.value


# Lines


def test_lines_are_joined_and_comments_between_them_left_out() -> None:
    text = "FROM a\nRUN one \\\n  # a comment\n\n  two \\  \n# another\n  three\nRUN four\n"
    found = parse(text)
    first, second = found.instructions[1:]
    assert isinstance(first, ins.Run)
    assert isinstance(second, ins.Run)
    assert first.command.argv == ("one   two   three",)
    assert (first.place.line, first.place.last_line, second.place.line) == (2, 7, 8)
    assert [place.line for place in found.empty_continuations] == [2]


@pytest.mark.parametrize(
    ("text", "argv"),
    [
        ("RUN a\\\nb", "ab"),
        ("RUN a \\\\\n", "a \\\\"),
        ("RUN a \\", "a "),
        ("RUN a \\\n", "a "),
        ("  RUN   a  b  ", "a  b"),
        ("run\ta", "a"),
        ("RUN a # b", "a # b"),
        ("RUN a\r\n", "a"),
        ("RUN a\\\r\nb\r\n", "ab"),
        ("RUN --network=none -- --a", "--a"),
        ("\\\nRUN a", "a"),
    ],
)
def test_a_command_of_the_shell_form(text: str, argv: str) -> None:
    assert run(text).command == ins.Command((argv.strip(),), shell=True)


def test_the_escape_character_is_chosen_at_the_top() -> None:
    found = parse("# escape=`\nFROM a\nRUN dir C:\\\nRUN a `\n b\n")
    assert found.escape == "`"
    assert [str(one.place) for one in found.instructions] == [
        "Dockerfile:2",
        "Dockerfile:3",
        "Dockerfile:4",
    ]


@pytest.mark.parametrize(
    "top", ["# a comment\n# escape=`\n", "\n# escape=`\n", "# other=1\n# escape=`\n"]
)
def test_a_directive_below_anything_else_is_a_comment(top: str) -> None:
    assert parse(top + "FROM a").escape == "\\"


def test_directives_of_all_kinds_stand_together() -> None:
    found = parse("#SYNTAX = docker/dockerfile:1.7-labs\n# check=skip=all\n# escape=`\nFROM a")
    assert (found.escape, found.check) == ("`", "skip=all")


@pytest.mark.parametrize(
    ("text", "says", "place"),
    [
        ("# escape=/\nFROM a", "escape=/", "Dockerfile:1"),
        ("# escape=`\n# escape=`\nFROM a", "a second escape directive", "Dockerfile:2"),
        ("# syntax=example.com/other:1\nFROM a", "example.com/other:1", "Dockerfile:1"),
        ("FROM a\nRUN <<EOF\nx\n", "EOF has no end", "Dockerfile:2"),
        ("FROM a\nRNU x", "no instruction RNU", "Dockerfile:2"),
        ("FROM a\n\n\\\n", "nothing but the escape", "Dockerfile:3"),
        ("FROM a\nRUN x\0y", "NUL", "Dockerfile:2"),
    ],
)
def test_a_bad_line_is_named(text: str, says: str, place: str) -> None:
    error = refused(text)
    assert says in error.problem
    assert error.place == place
    assert error.message.startswith(f"{place}: {error.problem}")


def test_an_error_quotes_the_line_and_knows_better() -> None:
    error = refused("FROM a\nRUM echo \\\n hi\n")
    assert error.text == "RUM echo  hi"
    assert error.text in error.message
    assert error.hint == "did you mean RUN?"


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_a_file_without_instructions_is_refused(text: str) -> None:
    assert "has no instructions" in refused(text).problem


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(BuildError, match=r"My\.Dockerfile:2: the text is not UTF-8"):
        parse(b"FROM a\nRUN \xff", "My.Dockerfile")
    with pytest.raises(BuildError, match="bytes"):
        parse(b" " * (MAX_FILE_BYTES + 1))
    assert parse(b"\xef\xbb\xbfFROM a").instructions


def test_comments_belong_to_the_instruction_below() -> None:
    found = parse("FROM a\n# gone\n#\n# kept\n\n# too\nRUN x\nRUN y").instructions
    assert [one.comments for one in found] == [(), ("kept", "too"), ()]


# Exec form


@pytest.mark.parametrize(
    ("text", "argv"),
    [
        ('["a", "b"]', ("a", "b")),
        ('  [ "a" ,\t"b c" ]  ', ("a", "b c")),
        ('["\\u00e9\\n"]', ("é\n",)),
        ("[]", ()),
        ('[""]', ("",)),
    ],
)
def test_the_exec_form_is_json(text: str, argv: tuple[str, ...]) -> None:
    found = one("CMD " + text)
    assert isinstance(found, ins.Cmd)
    assert found.command == ins.Command(argv, shell=False)


@pytest.mark.parametrize(
    "text", ["['a']", '["a"', '["a"] b', '["a",]', "[a]", "[" * 5000, '["a\tb"]']
)
def test_what_is_no_json_goes_to_the_shell_and_is_marked(text: str) -> None:
    found = one("CMD " + text)
    assert isinstance(found, ins.Cmd)
    assert found.command == ins.Command((text,), shell=True, malformed=True)


@pytest.mark.parametrize(
    "text", ['["a", 1]', '["a", ["b"]]', "[null]", "[" + "1" * 9999 + "]", '["\\u0000"]']
)
def test_json_of_other_things_than_strings_is_refused(text: str) -> None:
    assert refused("FROM a\nCMD " + text).place == "Dockerfile:2"


@settings(deadline=None)
@given(st.lists(st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8"))))
def test_any_argv_survives_the_exec_form(argv: list[str]) -> None:
    found = one("ENTRYPOINT " + json.dumps(argv))
    assert isinstance(found, ins.Entrypoint)
    assert found.command.argv == tuple(argv)


# Heredocs


def test_a_heredoc_is_the_command() -> None:
    found = run("RUN <<EOF\necho 1\n# kept\n\nRUN no\nEOF\n")
    (document,) = found.command.heredocs
    assert document.text == "echo 1\n# kept\n\nRUN no\n"
    assert document.expand
    assert found.place.last_line == 7


def test_several_heredocs_and_tabs() -> None:
    found = run("RUN cat <<A 3<<-'B' | sh\none\nA\n\ttwo\n\tB\n")
    first, second = found.command.heredocs
    assert (first.text, first.expand, first.strip_tabs) == ("one\n", True, False)
    assert (second.text, second.content, second.expand) == ("two\n", "\ttwo\n", False)


@pytest.mark.parametrize(
    "command",
    [
        "echo $((1<<2))",
        "cat <<<word",
        "echo '<<EOF'",
        'echo "a <<EOF"',
        "echo it's <<EOF",
        '["sh", "<<EOF"]',
    ],
)
def test_what_only_looks_like_a_heredoc_is_none(command: str) -> None:
    assert run("RUN " + command).command.heredocs == ()


def test_heredocs_are_sources_of_copy() -> None:
    found = copy('COPY a <<x.txt << "y z" /dst/\n$X\nx.txt\n$Y\ny z\n')
    assert found.sources == ("a",)
    assert [(one.name, one.text, one.expand) for one in found.documents] == [
        ("x.txt", "$X\n", True),
        ("y z", "$Y\n", False),
    ]
    assert "to a heredoc" in refused("FROM a\nCOPY a <<EOF\nEOF\n").problem


def test_a_heredoc_goes_into_the_trigger() -> None:
    found = one("ONBUILD RUN <<EOF\nx\nEOF\n")
    assert isinstance(found, ins.OnBuild)
    assert found.trigger == "RUN <<EOF\nx\nEOF"
    assert run(found.trigger).command.heredocs[0].text == "x\n"


# Instructions


def test_from() -> None:
    found = parse("FROM --platform=linux/arm64 debian:12 as Base").instructions[0]
    assert isinstance(found, ins.From)
    assert (found.base, found.name, found.platform) == ("debian:12", "base", "linux/arm64")


def test_copy_with_all_its_flags() -> None:
    found = copy(
        'COPY --from=b --chown="a b":c --chmod=755 --link --exclude=*.x --exclude=y --parents=false'
        ' ["a b", "/c d/"]'
    )
    assert found.sources == ("a b",)
    assert found.destination == "/c d/"
    assert (found.stage, found.chown, found.chmod) == ("b", "a b:c", "755")
    assert (found.link, found.parents, found.excludes) == (True, False, ("*.x", "y"))


def test_add() -> None:
    found = one("ADD --checksum=sha256:0 --unpack https://example.com/x.tar /")
    assert isinstance(found, ins.Add)
    assert (found.checksum, found.unpack) == ("sha256:0", True)
    plain = one("ADD a b /c/")
    assert isinstance(plain, ins.Add)
    assert (plain.unpack, plain.sources) == (None, ("a", "b"))


@pytest.mark.parametrize("keyword", ["ENV", "LABEL"])
@pytest.mark.parametrize(
    ("rest", "pairs"),
    [
        ("a=b", (("a", "b"),)),
        ("a=b c=d", (("a", "b"), ("c", "d"))),
        ("a='b c' d=\"e f\"", (("a", "'b c'"), ("d", '"e f"'))),
        ("a=b\\ c d=", (("a", "b\\ c"), ("d", ""))),
        ("a=b=c", (("a", "b=c"),)),
        ("a b c", (("a", "b c"),)),
        ("a  b=c", (("a", "b=c"),)),
    ],
)
def test_pairs(keyword: str, rest: str, pairs: ins.Pairs) -> None:
    found = one(f"{keyword} {rest}")
    assert isinstance(found, ins.Env | ins.Label)
    assert found.pairs == pairs
    assert found.legacy == (rest.split()[0].count("=") == 0)


def test_arg() -> None:
    found = one('ARG a b= c="d e"')
    assert isinstance(found, ins.Arg)
    assert found.arguments == (("a", None), ("b", ""), ("c", '"d e"'))


def test_run_with_mounts() -> None:
    found = run("RUN --mount=type=cache,target=/c --mount=target=$X --network=host a")
    assert found.mounts == ("type=cache,target=/c", "target=$X")
    assert found.network == "host"


def test_healthcheck() -> None:
    found = one("HEALTHCHECK --interval=1m30s --timeout=1.5s --retries=3 CMD curl -f x")
    assert isinstance(found, ins.Healthcheck)
    assert found.times_ns == (("Interval", 90 * SECOND_NS), ("Timeout", SECOND_NS * 3 // 2))
    assert (found.retries, found.command) == (3, ins.Command(("curl -f x",), shell=True))
    none = one("HEALTHCHECK none")
    assert isinstance(none, ins.Healthcheck)
    assert none.command is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("FROM a b", "FROM takes one image"),
        ("FROM a AS 1x", "'1x' is no name for a stage"),
        ("FROM a IN b", "FROM takes one image"),
        ("RUN", "RUN without a command"),
        ("RUN []", "RUN without a command"),
        ("RUN --network=vpn x", "RUN --network=vpn"),
        ("RUN --security=insecure x", "--security=insecure is not supported"),
        ("RUN --device=gpu x", "RUN --device is not supported"),
        ("RUN --mount=type=ssh x", "type=ssh is not supported"),
        ("RUN --mount=type=cache x", "the target '' cannot be mounted on"),
        ("RUN --mount=from=$X,target=/a x", "from=$X holds a variable"),
        ("RUN --mount x", "RUN --mount has no value"),
        ("COPY a", "COPY needs a source and a destination"),
        ("COPY --chwon=a a b", "no flag --chwon"),
        ("COPY --link=maybe a b", "COPY --link=maybe"),
        ("COPY --link= a b", "COPY --link="),
        ("COPY --chown a b", "COPY --chown has no value"),
        ("COPY --chown=a --chown=b a b", "--chown is given twice"),
        ("COPY --from=$X a b", "--from=$X holds a variable"),
        ("COPY --from= a b", "COPY --from without a value"),
        ("ADD --from=a a b", "no flag --from"),
        ("ADD --keep-git-dir x /y", "ADD --keep-git-dir is not supported"),
        ("ADD https://example.com/a/b.git#main /x", "Git repository"),
        ("ADD git@example.com:a/b /x", "Git repository"),
        ("ADD --checksum=sha256:0 a /x", "--checksum is for one URL"),
        ("ENV", "ENV needs a name and a value"),
        ("ENV a", "ENV a has no value"),
        ("ENV a=b c", "'c' is not NAME=VALUE"),
        ("LABEL a=b =c", "'=c' is not NAME=VALUE"),
        ("ARG", "ARG needs a name"),
        ("ARG =x", "ARG =x has no name"),
        ("ARG --x a", "ARG has no flag --x"),
        ("WORKDIR", "WORKDIR needs one argument"),
        ("CMD", "CMD needs one argument"),
        ("SHELL /bin/sh -c", "SHELL is a JSON list"),
        ("SHELL []", "SHELL is a JSON list"),
        ('VOLUME ["", "a"]', "VOLUME of an empty path"),
        ("HEALTHCHECK", "HEALTHCHECK without a command"),
        ("HEALTHCHECK CMD", "HEALTHCHECK without a command"),
        ("HEALTHCHECK NONE x", "HEALTHCHECK NONE with arguments"),
        ("HEALTHCHECK --interval=1 CMD x", "--interval=1 is no duration"),
        ("HEALTHCHECK --interval=1us CMD x", "--interval=1us"),
        ("HEALTHCHECK --retries=-1 CMD x", "--retries=-1"),
        ("ONBUILD ONBUILD RUN x", "ONBUILD ONBUILD is not allowed"),
        ("ONBUILD FROM x", "ONBUILD FROM is not allowed"),
        ("ONBUILD COPY x", "COPY needs a source and a destination"),
    ],
)
def test_what_cannot_be_is_refused_by_name(line: str, says: str) -> None:
    error = refused("FROM a\n" + line)
    assert says in error.problem
    assert error.place == "Dockerfile:2"


# Mounts


def as_it_is(text: str) -> str:
    return text


def test_a_bind_mount_is_read_only_unless_it_says_otherwise() -> None:
    mount = parse_mount("target=x,source=/s,from=b", as_it_is, "/app")
    assert (mount.type, mount.target, mount.source, mount.stage) == ("bind", "/app/x", "/s", "b")
    assert mount.read_only
    assert not parse_mount("target=/x,rw", as_it_is).read_only
    assert not parse_mount("target=/x,ro=false", as_it_is).read_only


def test_a_cache_mount() -> None:
    mount = parse_mount(
        "type=cache,dst=/c/../d,sharing=locked,uid=5,gid=6,mode=0700,id=k", as_it_is
    )
    assert (mount.target, mount.id, mount.sharing) == ("/d", "k", "locked")
    assert (mount.uid, mount.gid, mount.mode, mount.read_only) == (5, 6, 0o700, False)
    assert parse_mount("type=cache,target=/c", as_it_is).id == "/c"


def test_a_tmpfs_mount_has_a_size() -> None:
    assert parse_mount("type=tmpfs,target=/t,size=64m", as_it_is).size_bytes == 64 << 20


@pytest.mark.parametrize(
    ("text", "identity", "target", "env"),
    [
        ("id=key", "key", "/run/secrets/key", ""),
        ("src=a/key", "a/key", "/run/secrets/key", ""),
        ("target=/x/key", "key", "/x/key", ""),
        ("id=key,env=KEY", "key", "", "KEY"),
        ("id=key,env", "key", "", "key"),
        ("id=key,env=KEY,target=/k", "key", "/k", "KEY"),
    ],
)
def test_a_secret_mount(text: str, identity: str, target: str, env: str) -> None:
    mount = parse_mount("type=secret,required," + text, as_it_is)
    assert (mount.id, mount.target, mount.env) == (identity, target, env)
    assert mount.required
    assert mount.read_only


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("type=volume,target=/x", "type=volume is not supported"),
        ("target=/", "the target '/'"),
        ("target=..", "the target '..'"),
        ("type=tmpfs,target=/x,source=/y", "a tmpfs mount takes no source"),
        ("type=secret", "a secret without id"),
        ("type=secret,id=a,source=b", "both id and source"),
        ("type=cache,target=/x,sharing=none", "sharing=none"),
        ("type=cache,target=/x,mode=9", "mode=9"),
        ("type=cache,target=/x,uid=4294967295", "uid=4294967295"),
        ("type=cache,target=/x,uid=-1", "uid=-1"),
        ("type=tmpfs,target=/x,size=big", "size: 'big' is not a size"),
        ("target=/x,target=/y", "target is given twice"),
        ("target=/x,what", "'what' is not known"),
        ("target=/x,bind-propagation=shared", "'bind-propagation=shared' is not known"),
        ("target=/x,ro=2", "readonly=2"),
        ('"target=/x', "unexpected end"),
    ],
)
def test_a_bad_mount_is_named(text: str, says: str) -> None:
    with pytest.raises(BuildError) as caught:
        parse_mount(text, as_it_is)
    assert says in caught.value.problem
    assert caught.value.hint


# Any text


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_parsed_or_named(text: str) -> None:
    try:
        assert isinstance(parse(text), Dockerfile)
    except BuildError as error:
        assert error.hint


WORDS = st.sampled_from(
    "FROM RUN COPY ADD ENV ARG CMD HEALTHCHECK ONBUILD VOLUME --mount=type=cache --from=a --link -- "
    "<<EOF <<-'EOF' EOF [ \"a\" ] , $x ${x ' \" \\ # a=b a b / = AS".split()
)


@settings(deadline=None)
@given(st.lists(st.tuples(WORDS, st.sampled_from([" ", "\n", "", "\\\n", "\t"])), max_size=40))
def test_any_words_of_dockerfiles_are_parsed_or_named(words: list[tuple[str, str]]) -> None:
    try:
        parse("".join(word + blank for word, blank in words))
    except BuildError as error:
        assert error.hint


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab '\"\\$\t", min_size=1), min_size=1, max_size=5))
def test_quoted_words_stay_whole(texts: list[str]) -> None:
    quoted = ['"' + "".join("\\" + c if c in '"\\$' else c for c in text) + '"' for text in texts]
    assert words_of(" ".join(quoted), "\\") == quoted
