"""Logins at a registry on loopback, and where it may send us."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.credentials import Credentials
from sandbox_kernel.image.documents import (
    digest_of,
)
from sandbox_kernel.image.registry_auth import Login, parse_challenges
from sandbox_kernel.image.registry_http import Call, Transport, is_loopback, is_off_limits
from tests.fakes.registry import FakeImage, FakeRegistry
from tests.fakes.registry_bench import SECRET, Bench, answers, opened, two_layers


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with opened(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def image(bench: Bench) -> FakeImage:
    return two_layers(bench)


@pytest.fixture(params=["Bearer", "Basic"])
def guarded(bench: Bench, image: FakeImage, request: pytest.FixtureRequest) -> Bench:
    bench.registry.scheme = request.param
    bench.registry.password = f"me:{SECRET}"
    bench.login = Credentials("me", SECRET)
    return bench


def test_a_login_is_sent_when_the_registry_asks(guarded: Bench, image: FakeImage) -> None:
    assert guarded.pull().digest == digest_of(image.raw)
    assert guarded.registry.asked("GET", "manifests")[0].authorization == ""
    if guarded.registry.scheme == "Bearer":
        asked = guarded.registry.asked("GET", "^/token")
        assert len(asked) == 1, "one token serves all threads"
        assert httpx.URL(asked[0].path).params.multi_items() == [
            ("service", "fake"),
            ("scope", "repository:team/app:pull"),
        ]


def test_nobody_is_logged_in(guarded: Bench) -> None:
    guarded.login = None
    error = guarded.refuses("wants a login for team/app")
    assert f"docker login {guarded.registry.host}" in error.hint


def test_a_login_that_is_refused(guarded: Bench) -> None:
    guarded.login = Credentials("me", "wrong")
    error = guarded.refuses("refuses the login")
    assert "log in anew" in error.hint
    assert len(guarded.registry.requests) < 10


def test_a_token_that_ends_in_the_middle_is_renewed(bench: Bench, image: FakeImage) -> None:
    bench.registry.password = f"me:{SECRET}"
    bench.registry.uses_per_token = 1
    bench.login = Credentials("me", SECRET)
    assert bench.pull().digest == digest_of(image.raw)
    assert bench.registry.token_requests >= 3
    assert bench.waits == []


def test_a_token_that_never_works_is_given_up(bench: Bench, image: FakeImage) -> None:
    bench.registry.password = f"me:{SECRET}"
    bench.login = Credentials("me", SECRET)
    challenge = f'Bearer realm="http://{bench.registry.host}/token"'
    bench.registry.rule("GET", "manifests", answers(401, www_authenticate=challenge), times=0)
    bench.refuses("refuses the login")
    assert bench.registry.token_requests <= 3


def test_an_identity_token_is_exchanged(bench: Bench, image: FakeImage) -> None:
    bench.registry.password = SECRET
    bench.login = Credentials(identity_token=SECRET)
    assert bench.pull().digest == digest_of(image.raw)
    (asked,) = bench.registry.asked("POST", "^/token")
    assert asked.authorization == ""
    assert SECRET not in asked.path


def test_a_registry_token_is_sent_as_it_is(bench: Bench, image: FakeImage) -> None:
    bench.registry.password = f"me:{SECRET}"
    bench.registry.tokens.add(SECRET)
    bench.login = Credentials(registry_token=SECRET)
    assert bench.pull().digest == digest_of(image.raw)
    assert bench.registry.asked("GET", "^/token") == []


def test_secrets_are_not_logged_or_shown(
    bench: Bench, image: FakeImage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    bench.registry.password = f"me:{SECRET}"
    bench.login = Credentials("me", SECRET)
    basic = bench.login.basic.partition(" ")[2]
    said = json.dumps({"errors": [{"code": "NO", "message": f"{SECRET} {basic} token-1"}]})
    bench.registry.rule("GET", "/blobs/", answers(403, said.encode()))
    error = bench.refuses("NO *** *** ***")
    for secret in (SECRET, basic, "token-1"):
        assert secret not in str(error)
        assert secret not in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"token":1}',
        b'{"token":""}',
        b'{"token":"a b"}',
        b'{"token":"a\\r\\nX: y"}',
        b'{"token":"' + b"x" * 70_000 + b'"}',
        b"x" * (2 << 20),
        b"{" * 100_000,
    ],
)
def test_a_token_server_that_answers_nonsense(bench: Bench, image: FakeImage, body: bytes) -> None:
    bench.registry.password = f"me:{SECRET}"
    bench.login = Credentials("me", SECRET)
    bench.registry.rule("GET", "^/token", answers(200, body), times=0)
    bench.refuses("token")
    assert len(bench.registry.asked("GET", "manifests")) == 1


def test_a_token_server_that_is_busy_is_asked_again(bench: Bench, image: FakeImage) -> None:
    bench.registry.password = f"me:{SECRET}"
    bench.login = Credentials("me", SECRET)
    bench.registry.rule("GET", "^/token", answers(503, retry_after="3"))
    bench.pull()
    assert bench.waits == [3.0]


@pytest.mark.parametrize(
    ("challenge", "says"),
    [
        ('Bearer realm="http://auth.example.com/token"', "which is plain HTTP"),
        ('Bearer realm="file://a/etc/passwd"', "neither https nor http"),
        ('Bearer realm="https://169.254.169.254/latest"', "inside of this machine"),
        ('Bearer realm="https://u:p@auth.example.com/"', "a URL with a login in it"),
        ('Bearer realm="https://[x"', "broken host"),
        ('Bearer realm=""', "of a kind that is not known here"),
        ("Bearer", "of a kind that is not known here"),
        ("Negotiate", "it offers negotiate"),
        ("", "it offers none"),
        ('=,"', "a challenge cannot be understood"),
        ('Bearer realm="' + "x" * 9000 + '"', "a challenge has 90"),
        ("Bearer " + ",".join(f"a{n}=1" for n in range(40)), "more than 32 parts"),
        ("A, " * 40 + "B", "more than 32 parts"),
    ],
)
def test_a_hostile_challenge(bench: Bench, image: FakeImage, challenge: str, says: str) -> None:
    bench.login = Credentials("me", SECRET)
    answer = answers(401, www_authenticate=challenge)
    bench.registry.rule("GET", "manifests", answer, times=0)
    error = bench.refuses(says)
    assert bench.registry.host in str(error)


def test_challenges_are_read() -> None:
    (bearer, basic) = parse_challenges(
        ['Bearer realm="https://a/t?x=1,2" , service = s, SCOPE="a \\"b\\"", realm="late"', "Basic"]
    )
    assert (bearer.scheme, basic.scheme) == ("bearer", "basic")
    assert bearer.parameters == {"realm": "https://a/t?x=1,2", "service": "s", "scope": 'a "b"'}
    both = parse_challenges(['Basic realm="x", Bearer realm="y"'])
    assert [(one.scheme, one.parameters["realm"]) for one in both] == [
        ("basic", "x"),
        ("bearer", "y"),
    ]


def test_a_login_does_not_follow_a_redirect(guarded: Bench, image: FakeImage) -> None:
    cdn = FakeRegistry()
    try:
        for digest, data in image.blobs.items():
            cdn.rule("GET", digest, answers(200, data, set_cookie="a=b"), times=0)
        guarded.registry.elsewhere = cdn.host
        assert guarded.pull().digest == digest_of(image.raw)
        assert len(cdn.requests) == 3
        for request in cdn.requests:
            assert request.authorization == ""
            assert "cookie" not in request.headers
    finally:
        cdn.close()


def test_a_login_wanted_by_another_host_is_not_given(bench: Bench, image: FakeImage) -> None:
    bench.login = Credentials("me", SECRET)
    other = FakeRegistry()
    try:
        challenge = answers(401, www_authenticate='Basic realm="x"')
        other.rule("GET", "/", challenge, times=0)
        location = f"http://{other.host}/cdn"
        bench.registry.rule("GET", "/blobs/", answers(302, location=location), times=0)
        bench.refuses(f"{other.host} answers 401")
        assert all(one.authorization == "" for one in other.requests)
    finally:
        other.close()


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("http://cdn.example.com/x", "which is plain HTTP"),
        ("https://169.254.169.254/x", "an address inside of this machine"),
        ("https://[::ffff:169.254.169.254]/x", "an address inside of this machine"),
        ("https://metadata.google.internal/x", "an address inside of this machine"),
        ("https://0.0.0.0/x", "an address inside of this machine"),
        ("https://u:p@cdn.example.com/x", "a URL with a login in it"),
        ("ftp://cdn.example.com/x", "which is neither https nor http"),
        ("file://a/etc/passwd", "which is neither https nor http"),
        ("https://[", "broken host"),
        ("https://a%2fb/x", "broken host"),
        ("https://\\u202e.com/x", "broken host"),
        ("https:///x", "broken host"),
        ("https://x:99999/", "broken host"),
        ("", "without a usable Location"),
        ("/" + "x" * 20_000, "without a usable Location"),
    ],
)
def test_a_redirect_that_is_not_followed(
    bench: Bench, image: FakeImage, location: str, says: str
) -> None:
    bench.registry.rule("GET", "/blobs/", answers(307, location=location))
    bench.refuses(says)


def test_redirects_end(bench: Bench, image: FakeImage) -> None:
    bench.registry.rule("GET", "/blobs/", answers(307, location="?again"), times=0)
    bench.refuses("redirects more than 5 times")
    assert len(bench.registry.asked("GET", "/blobs/")) == 6


@pytest.mark.parametrize(
    ("registry", "url", "says"),
    [
        ("ghcr.io", "http://ghcr.io/x", "which is plain HTTP"),
        ("ghcr.io", "https://localhost/x", "inside of this machine"),
        ("ghcr.io", "https://127.1/x", "inside of this machine"),
        ("ghcr.io", "https://2130706433/x", "inside of this machine"),
        ("ghcr.io", "https://[::1]/x", "inside of this machine"),
        ("ghcr.io", "https://app.localhost./x", "inside of this machine"),
        ("10.0.0.1", "http://127.0.0.1/x", "inside of this machine"),
    ],
)
def test_a_registry_elsewhere_may_not_lead_here(registry: str, url: str, says: str) -> None:
    transport = Transport(registry)
    with pytest.raises(ImageError, match=says):
        transport.check(httpx.URL(url), "x")
    transport.check(httpx.URL("https://cdn.example.com/x"), "x")
    transport.close()


def test_what_is_spoken_to_whom() -> None:
    for registry, insecure, base in (
        ("docker.io", False, "https://registry-1.docker.io/v2/"),
        ("ghcr.io", False, "https://ghcr.io/v2/"),
        ("reg.corp:5000", True, "http://reg.corp:5000/v2/"),
    ):
        transport = Transport(registry, insecure=insecure)
        assert str(transport.base) == base
        transport.close()


def test_plain_http_that_was_asked_for_is_not_for_any_token_server() -> None:
    asked: list[tuple[str, str]] = []

    def fetch(call: Call, authorization: str) -> tuple[int, bytes]:
        asked.append((str(call.url), authorization))
        return 200, b'{"token":"t"}'

    transport = Transport("reg.corp", insecure=True)
    scopes = ("repository:app:pull",)
    login = Login("reg.corp", scopes, transport, lambda: Credentials("me", SECRET))
    with pytest.raises(ImageError, match="a login would cross the net in the open"):
        login.renew("", ['Bearer realm="http://auth.example.com/t"'], fetch)
    assert asked == []
    login.renew("", ['Bearer realm="http://reg.corp/t"'], fetch)
    assert asked[0][0] == "http://reg.corp/t?scope=repository%3Aapp%3Apull"
    assert login.header == "Bearer t"
    login.renew("Bearer old", [], fetch)
    assert len(asked) == 1, "another thread had renewed it"
    transport.close()


def test_which_hosts_are_here() -> None:
    here = ("localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")
    assert all(is_loopback(host) and is_off_limits(host) for host in here)
    elsewhere = ("localhost.example.com", "127.0.0.1.example.com", "10.0.0.1", "8.8.8.8", "fe.com")
    assert not any(is_loopback(host) or is_off_limits(host) for host in elsewhere)
    assert all(
        is_off_limits(host) for host in ("169.254.1.1", "fe80::1", "fd00:ec2::254", "224.0.0.1")
    )


def test_a_broken_environment_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "gone.pem"))
    with pytest.raises(ImageError, match="SSL_CERT_FILE"):
        Transport("ghcr.io")
