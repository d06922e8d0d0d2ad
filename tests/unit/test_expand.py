"""Variables, quotes and escapes of a Dockerfile's words."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.build.expand import MAX_DEPTH, expand, unquoted
from sandbox_kernel.build.pattern import MAX_CHARACTERS
from sandbox_kernel.errors import BuildError

ENV = {"NAME": "sandbox", "EMPTY": "", "PATHS": "/usr/lib/python3/lib.so", "STARS": "a*b*c"}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("plain", "plain"),
        ("$NAME", "sandbox"),
        ("${NAME}s", "sandboxs"),
        ("a$NAMEs", "a"),
        ("$NAME.$NAME", "sandbox.sandbox"),
        ("\\$NAME", "$NAME"),
        ("\\\\$NAME", "\\sandbox"),
        ("'$NAME'", "$NAME"),
        ('"$NAME"', "sandbox"),
        ('"\\$NAME"', "$NAME"),
        ("'a\\'", "a\\"),
        ('"a\\tb"', "a\\tb"),
        ("a\\tb", "atb"),
        ('"it\'s"', "it's"),
        ("end\\", "end"),
        ("$", "$"),
        ("$.", "$."),
        ("$1a", "a"),
        ("$$", ""),
        ("${-:-none}", "none"),
        ("名$NAME", "名sandbox"),
        ("${NAME}}", "sandbox}"),
    ],
)
def test_a_word_is_resolved(source: str, text: str) -> None:
    assert expand(source, ENV).text == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("${NO-d}", "d"),
        ("${EMPTY-d}", ""),
        ("${EMPTY:-d}", "d"),
        ("${NAME:-d}", "sandbox"),
        ("${NO+a}", ""),
        ("${EMPTY+a}", "a"),
        ("${EMPTY:+a}", ""),
        ("${NAME:+a$NAME}", "asandbox"),
        ("${EMPTY?m}", ""),
        ("${NAME:?m}", "sandbox"),
        ("${NO:-${EMPTY:-${NAME}}}", "sandbox"),
        ("${NO:-'a b'}", "a b"),
        ("${NO:-\\}}", "}"),
        ("${NO:-{x}", "{x"),
    ],
)
def test_a_condition_is_decided(source: str, text: str) -> None:
    assert expand(source, ENV).text == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("${PATHS#*/}", "usr/lib/python3/lib.so"),
        ("${PATHS##*/}", "lib.so"),
        ("${PATHS%/*}", "/usr/lib/python3"),
        ("${PATHS%%/l*}", "/usr"),
        ("${PATHS%.s?}", "/usr/lib/python3/lib"),
        ("${PATHS#lib}", "/usr/lib/python3/lib.so"),
        ("${PATHS/lib/bin}", "/usr/bin/python3/lib.so"),
        ("${PATHS//lib/bin}", "/usr/bin/python3/bin.so"),
        ("${PATHS//\\//:}", ":usr:lib:python3:lib.so"),
        ("${PATHS/l*b/X}", "/usr/X.so"),
        ("${PATHS///}", "/usr/lib/python3/lib.so"),
        ("${STARS#a\\*}", "b*c"),
        ("${STARS//\\*/}", "abc"),
        ("${STARS%%\\**}", "a"),
        ("${STARS/*/x}", "x"),
        ("${EMPTY/*/x}", "x"),
        ("${NAME#}", "sandbox"),
        ("${NAME#[s]}", "sandbox"),
        ("${NO#x}", ""),
    ],
)
def test_a_glob_is_applied(source: str, text: str) -> None:
    assert expand(source, ENV).text == text


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("${NAME", "bad substitution ${NAME"),
        ("${NAME:-x", "without its }"),
        ("${}", "bad substitution ${}"),
        ("${:-x}", "bad substitution ${:"),
        ("${{NAME}", "bad substitution ${{"),
        ("${NAME:=x}", "bad substitution ${NAME:="),
        ("${NAME:#x}", "bad substitution"),
        ("${NAME/x}", "without its /"),
        ("'open", "a ' without an end"),
        ('"open', 'a " without an end'),
        ("${NO?}", "NO: the variable is unset"),
        ("${EMPTY:?}", "EMPTY: the variable is empty"),
        ("${NO:?say its name}", "NO: say its name"),
        ("${NAME#\\x}", "escapes 'x'"),
    ],
)
def test_a_bad_word_is_named(source: str, says: str) -> None:
    with pytest.raises(BuildError) as caught:
        expand(source, ENV)
    assert says in caught.value.problem
    assert caught.value.hint


def test_the_escape_character_may_be_another() -> None:
    assert expand("C:\\x`$NAME", ENV, escape="`").text == "C:\\x$NAME"


def test_quotes_are_characters_in_a_heredoc() -> None:
    assert expand("'$NAME' \"x\\$y\"", ENV, quotes=False).text == "'sandbox' \"x$y\""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("80 443", ("80", "443")),
        ("$PORTS", ("80", "443")),
        ('"$PORTS"', ("80 443",)),
        ("x$PORTS", ("x80", "443")),
        ("${PORTS}y", ("80", "443y")),
        ("a\\ b", ("a b",)),
        ("'a b'c d", ("a bc", "d")),
        ("${NO:-1 2}", ("1", "2")),
        ("", ()),
    ],
)
def test_words_are_split_where_nothing_quotes_the_blank(
    source: str, words: tuple[str, ...]
) -> None:
    assert expand(source, {"PORTS": "80 443"}).words == words


def test_what_was_not_set_is_told() -> None:
    assert expand("$A ${B:-$C} $NAME", ENV).unset == {"A", "B", "C"}


@pytest.mark.parametrize(
    ("word", "name"),
    [("EOF", "EOF"), ("'EOF'", "EOF"), ('"a b"', "a b"), ("$EOF", "$EOF"), ("a b", ""), ("'a", "")],
)
def test_the_name_of_a_heredoc_loses_its_quotes(word: str, name: str) -> None:
    assert unquoted(word) == name


def test_a_variable_cannot_fill_the_memory() -> None:
    half = {"A": "a" * (MAX_CHARACTERS // 2 + 1)}
    with pytest.raises(BuildError, match="longer than"):
        expand("$A$A$A", half)
    with pytest.raises(BuildError, match="longer than"):
        expand("${A//a/aaaaaaaaaa}", half)


def test_nesting_has_an_end() -> None:
    with pytest.raises(BuildError, match=f"more than {MAX_DEPTH} deep"):
        expand("${A:-" * 5000, {})


def test_many_stars_take_no_time() -> None:
    value = {"A": "a" * 20_000}
    assert expand("${A##" + "*a" * 500 + "*b}", value).text == value["A"]
    assert expand("${A//" + "*a" * 500 + "b/x}", value).text == value["A"]


@settings(deadline=None)
@given(st.text())
def test_single_quotes_give_back_any_text(text: str) -> None:
    quoted = '"\'"'.join(f"'{part}'" for part in text.split("'"))
    assert expand(quoted, ENV).text == text


@settings(deadline=None)
@given(st.text())
def test_double_quotes_give_back_any_text(text: str) -> None:
    quoted = "".join("\\" + char if char in '"$\\' else char for char in text)
    assert expand(f'"{quoted}"', ENV).text == text


@settings(deadline=None)
@given(st.text(alphabet="ab$\\{}:-+?#%/*'\" N", max_size=40))
def test_any_word_is_resolved_or_named(source: str) -> None:
    try:
        found = expand(source, {"N": "a/b", "a": "x"})
    except BuildError as error:
        assert error.hint
    else:
        # Words are the text without some blanks.
        assert "".join(found.words).replace(" ", "") == found.text.replace(" ", "")


@settings(deadline=None)
@given(
    st.text(alphabet="ab", max_size=12),
    st.lists(st.sampled_from(["a", "b", "*", "?"]), max_size=6).map("".join),
)
def test_globs_agree_with_regular_expressions(value: str, glob: str) -> None:
    pattern = re.compile("".join({"*": ".*", "?": "."}.get(char, char) for char in glob))
    places = range(len(value) + 1)
    ends = [place for place in places if pattern.fullmatch(value[:place])] or [0]
    begins = [place for place in places if pattern.fullmatch(value[place:])] or [len(value)]
    env = {"V": value}
    assert expand(f"${{V#{glob}}}", env).text == value[min(ends) :]
    assert expand(f"${{V##{glob}}}", env).text == value[max(ends) :]
    assert expand(f"${{V%{glob}}}", env).text == value[: max(begins)]
    assert expand(f"${{V%%{glob}}}", env).text == value[: min(begins)]
