"""What .dockerignore leaves out, and the globs that it shares with COPY."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.build.glob import Glob, has_wildcards, unescaped
from sandbox_kernel.build.ignore import Ignore, ignore_files
from sandbox_kernel.errors import BuildError


def ignores(text: str, path: str) -> bool:
    return Ignore.parse(text.encode()).ignores(path)


@pytest.mark.parametrize(
    ("patterns", "path", "out"),
    [
        ("*.pyc", "a.pyc", True),
        ("*.pyc", "a/a.pyc", False),
        ("**/*.pyc", "a.pyc", True),
        ("**/*.pyc", "a/b/a.pyc", True),
        ("*/temp*", "a/temporary.txt", True),
        ("*/temp*", "a/b/temporary.txt", False),
        ("*/*/temp*", "a/b/temp", True),
        ("temp?", "tempa", True),
        ("temp?", "temp/", False),
        ("temp", "temp/deep/file", True),
        ("/temp", "temp", True),
        ("temp/", "temp", True),
        ("./temp", "temp", True),
        ("a/../temp", "temp", True),
        ("../temp", "temp", False),
        ("  temp  ", "temp", True),
        ("# temp\ntemp2", "temp", False),
        ("\\#temp", "#temp", True),
        ("a/**", "a/b/c", True),
        ("a/**", "a", False),
        ("a/**/z", "a/z", True),
        ("a/**/z", "a/b/c/z", True),
        ("a/**/z", "a/bz", False),
        ("**", "anything/at/all", True),
        ("*", "a/b", True),
        ("**/node_modules", "web/node_modules/x/y.js", True),
        ("**.txt", "a/b.txt", True),
        ("**.txt", "b.txt", True),
        ("[a-c]x", "bx", True),
        ("[^a-c]x", "bx", False),
        ("[^a-c]x", "dx", True),
        ("a[b", "x", None),
        ("", "a", False),
        ("a.b", "axb", False),
        ("a+b", "a+b", True),
        ("a(b)|c$", "a(b)|c$", True),
    ],
)
def test_a_pattern_decides(patterns: str, path: str, out: bool | None) -> None:
    if out is None:
        with pytest.raises(BuildError):
            ignores(patterns, path)
    else:
        assert ignores(patterns, path) is out


@pytest.mark.parametrize(
    ("patterns", "path", "out"),
    [
        ("*.md\n!README.md", "README.md", False),
        ("*.md\n!README.md", "other.md", True),
        ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", True),
        ("*.md\nREADME-secret.md\n!README*.md", "README-secret.md", False),
        ("*\n!src", "src/main.py", False),
        ("*\n!src/**/*.py", "src/a/main.py", False),
        ("*\n!src/**/*.py", "src/a/main.c", True),
        ("src\n!src/keep", "src/keep", False),
        ("!src\n*", "src", True),
        ("*\n! src", "src", False),
        ("*\n!/src", "src", False),
    ],
)
def test_the_last_pattern_that_matches_decides(patterns: str, path: str, out: bool) -> None:
    assert ignores(patterns, path) is out


def test_a_bad_pattern_is_named_with_its_line() -> None:
    with pytest.raises(BuildError) as caught:
        Ignore.parse(b"ok\n\n[bad", ".dockerignore")
    assert caught.value.place == ".dockerignore:3"
    assert "'[bad'" in caught.value.problem
    with pytest.raises(BuildError, match=r"f:1: a pattern of nothing but !"):
        Ignore.parse(b"!", "f")


def test_a_mark_at_the_start_and_carriage_returns_are_no_part_of_patterns() -> None:
    ignore = Ignore.parse(b"\xef\xbb\xbfa\r\nb\r\n")
    assert [ignore.ignores(path) for path in "abc"] == [True, True, False]


def test_names_that_are_no_utf8_can_be_matched() -> None:
    ignore = Ignore.parse(b"\xff*")
    assert ignore.ignores(b"\xffx".decode("utf-8", "surrogateescape"))


def test_a_dockerfile_may_have_an_ignore_file_of_its_own() -> None:
    assert ignore_files("sub/My.Dockerfile") == ("sub/My.Dockerfile.dockerignore", ".dockerignore")


def test_a_folder_is_entered_only_if_something_in_it_may_be_taken_back() -> None:
    ignore = Ignore(["*", "!src/keep/*.py", "!**/x"][:2])
    assert ignore.takes_back_below("src")
    assert ignore.takes_back_below("src/keep")
    assert not ignore.takes_back_below("docs")
    assert Ignore(["*", "!**/x"]).takes_back_below("docs")


def test_a_pattern_takes_no_time_whatever_it_looks_like() -> None:
    assert not Glob("*a" * 500 + "*bx?", folders=True).matches("a" * 4000 + "x")
    assert not Glob("**/*a" * 200 + "bx?", folders=True).matches("a/" * 1500 + "x")


def test_wildcards_are_told_from_names() -> None:
    assert all(has_wildcards(pattern) for pattern in ("a*", "[a]", "?"))
    assert not has_wildcards("a\\*b")
    assert unescaped("a\\*b\\\\") == "a*b\\"
    assert Glob("arr[[]0].txt").matches("arr[0].txt")
    assert not Glob("a*").matches("a/b")
    assert [Glob("[\\]x-z]").matches(char) for char in "]yw"] == [True, True, False]


def model(pattern: str) -> re.Pattern[str]:
    """Give the same as one regular expression, which may take forever on bad ones."""
    parts = []
    for part in re.findall(r"\*\*/|\*\*|\*|\?|.", pattern):
        parts.append(
            {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
        )
    return re.compile("".join(parts))


PARTS = st.sampled_from(["a", "b", "ab", "*", "?", "a*", "*b", "**"])


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.lists(PARTS, min_size=1, max_size=4)), max_size=5),
    st.lists(st.sampled_from(["a", "b", "ab", "ba"]), min_size=1, max_size=4),
)
def test_matching_agrees_with_a_plain_model(
    rules: list[tuple[bool, list[str]]], parts: list[str]
) -> None:
    lines = [("!" if negated else "") + "/".join(pattern) for negated, pattern in rules]
    path = "/".join(parts)
    above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    out = False
    for negated, pattern in rules:
        if any(model("/".join(pattern)).fullmatch(one) for one in above):
            out = not negated
    assert ignores("\n".join(lines), path) is out


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_pattern_is_taken_or_named(pattern: str, path: str) -> None:
    try:
        Ignore([pattern]).ignores(path)
    except BuildError as error:
        assert error.hint
