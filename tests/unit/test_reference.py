"""Names of images, as Docker's users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.reference import Reference, check_registry

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full", "short"),
    [
        ("debian", "docker.io/library/debian:latest", "debian:latest"),
        ("debian:12", "docker.io/library/debian:12", "debian:12"),
        ("jupyter/base", "docker.io/jupyter/base:latest", "jupyter/base:latest"),
        ("docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
        ("index.docker.io/library/debian", "docker.io/library/debian:latest", "debian:latest"),
        ("ghcr.io/a/b:1", "ghcr.io/a/b:1", "ghcr.io/a/b:1"),
        ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest", "localhost:5000/x:latest"),
        ("127.0.0.1:5000/x:y", "127.0.0.1:5000/x:y", "127.0.0.1:5000/x:y"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        ("GHCR.io/a", "ghcr.io/a:latest", "ghcr.io/a:latest"),
        (f"debian@{DIGEST}", f"docker.io/library/debian@{DIGEST}", f"debian@{DIGEST}"),
        (f"debian:12@{DIGEST}", f"docker.io/library/debian:12@{DIGEST}", f"debian:12@{DIGEST}"),
        ("a/b__c/d-e/f.g:V_1.0", "docker.io/a/b__c/d-e/f.g:V_1.0", "a/b__c/d-e/f.g:V_1.0"),
    ],
)
def test_forms(text: str, full: str, short: str) -> None:
    reference = Reference.parse(text)
    assert reference.full == full
    assert str(reference) == short
    assert Reference.parse(full) == reference
    assert Reference.parse(short) == reference


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be a part of an image's name"),
        ("Debian", "lower case"),
        ("a//b", "''"),
        ("a/../b", "'..'"),
        ("-a", "'-a'"),
        ("a:", "not a tag"),
        ("a:-x", "'-x'"),
        ("a:" + "x" * 129, "not a tag"),
        ("a@sha256:abc", "not a digest"),
        ("a@md5:" + "a" * 32, "not a digest"),
        ("https://ghcr.io/a", "leave out https://"),
        ("a" * 64, f"NAME@sha256:{'a' * 64}"),
        ("a b", "'a b'"),
        ("a\nb", "not an image reference"),
        ("дебиан", "not an image reference"),
        ("host:99999/x", "not a registry"),
        ("ho_st.x/y", "not a registry"),
        ("a/" * 130 + "b", "too long"),
        ("u:p@reg.io/x", "not a digest"),
        ("[::1%eth0]/x", "not a registry"),
        ("x.io/", "''"),
    ],
)
def test_refused(text: str, says: str) -> None:
    with pytest.raises(ImageError) as caught:
        Reference.parse(text)
    assert says in str(caught.value)


def test_at_pins_a_digest() -> None:
    pinned = Reference.parse("ghcr.io/a:1").at(DIGEST)
    assert pinned.full == f"ghcr.io/a:1@{DIGEST}"
    assert pinned.version == DIGEST


def test_registries_have_one_name() -> None:
    assert check_registry("registry-1.docker.io") == "docker.io"
    with pytest.raises(ImageError, match="HOST:PORT"):
        check_registry("a/b")


@given(st.text(alphabet="ab.:/@-_[]A0%\n ", max_size=40))
def test_any_text_is_refused_or_read_back_the_same(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except ImageError:
        return
    assert Reference.parse(reference.full) == reference
    assert Reference.parse(str(reference)) == reference
