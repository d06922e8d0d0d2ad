"""Pull and push against Debian's docker-registry on loopback, with skopeo as peer."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.credentials import find_credentials
from sandbox_kernel.image.documents import OCI_INDEX, Platform, digest_of
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.registry import RegistryOptions
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage
from sandbox_kernel.image.transfer import pull, push
from tests.fakes.registry import FakeImage, index_of, layer

PROGRAMS = ("docker-registry", "skopeo", "htpasswd", "openssl")
PASSWORD = "s3cr3t-password"
STARTED = re.compile(r"listening on 127\.0\.0\.1:(\d+)")

pytestmark = [pytest.mark.slow, pytest.mark.programs(*PROGRAMS)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, so that no login of the user's is found or changed."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return folder


def run(*argv: str | Path, **options: Any) -> str:
    done = subprocess.run(
        [str(one) for one in argv], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class RealRegistry:
    """A docker-registry with a configuration; close it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        folder.mkdir()
        http_settings = {"addr": "127.0.0.1:0", "secret": "x", **settings.pop("http", {})}
        configuration = {
            "version": "0.1",
            "log": {"level": "info", "formatter": "text"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": http_settings,
            **settings,
        }
        path = folder / "config.yml"
        # JSON is YAML too.
        path.write_text(json.dumps(configuration))
        self._process = subprocess.Popen(
            ["docker-registry", "serve", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)
            if match := STARTED.search(line):
                self.host = f"127.0.0.1:{match[1]}"
                break
        else:
            pytest.fail("".join(self.lines))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(10)

    def requests(self, method: str, path: str) -> list[str]:
        """Close, and give the log lines of requests of a kind."""
        self.close()
        return [line for line in self.lines if re.search(f'"{method} [^"]*{path}', line)]

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            self.lines.extend(lines)


class Quiet:
    """Progress that keeps the notes."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}

    def started(self, digest: str, total_bytes: int) -> None:
        """Take no note."""

    def advanced(self, digest: str, count_bytes: int) -> None:
        """Take no note."""

    def finished(self, digest: str, note: str) -> None:
        self.notes[digest] = note


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RealRegistry]]:
    started: list[RealRegistry] = []

    def start(**settings: Any) -> RealRegistry:
        started.append(RealRegistry(tmp_path / f"registry{len(started)}", **settings))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


NOISE = random.Random(7).randbytes(3 << 20)
IMAGE = FakeImage(
    (layer(("hello", b"hello")), layer(("noise", NOISE)), layer(("bye", b"bye"))),
    labels=(("from", "the tests"),),
)


def keep(store: Store, image: FakeImage, name: str = "localhost/made:1") -> StoredImage:
    for data in image.blobs.values():
        store.put_blob(data)
    return store.put_image(name, image.raw)


def layout(folder: Path, *images: FakeImage, index: bytes = b"") -> Path:
    """Write an OCI layout with one image, or an index of several, by the tag `x`."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    documents = [data for image in images for data in (image.raw, *image.blobs.values())]
    for data in [*documents, index]:
        (blobs / digest_of(data).partition(":")[2]).write_bytes(data)
    entry = replace(images[0].entry(), platform=None)
    if index:
        entry = replace(entry, media_type=OCI_INDEX, digest=digest_of(index), size_bytes=len(index))
    named = replace(entry, annotations=(("org.opencontainers.image.ref.name", "x"),))
    (folder / "index.json").write_bytes(index_of(named))
    return folder


def skopeo(*argv: str | Path) -> str:
    return run("skopeo", "--insecure-policy", *argv)


def test_what_skopeo_pushed_is_pulled(
    start: Callable[..., RealRegistry], store: Store, tmp_path: Path
) -> None:
    registry = start()
    folder = layout(tmp_path / "layout", IMAGE)
    name = f"{registry.host}/team/app:1"
    skopeo("copy", "--dest-tls-verify=false", f"oci:{folder}:x", f"docker://{name}")
    progress = Quiet()
    pulled = pull(Reference.parse(name), store, progress)
    assert pulled.digest == digest_of(IMAGE.raw)
    assert set(progress.notes.values()) == {"pulled"}
    for digest, data in IMAGE.blobs.items():
        assert store.read_blob(digest) == data
    again = Quiet()
    assert pull(Reference.parse(name), store, again).digest == pulled.digest
    assert set(again.notes.values()) == {"exists"}


def test_what_we_push_is_what_skopeo_takes(
    start: Callable[..., RealRegistry], store: Store, tmp_path: Path
) -> None:
    registry = start()
    name = f"{registry.host}/team/app:1"
    # Small chunks, so that the layer of noise goes up in several.
    options = RegistryOptions(chunk_bytes=1 << 20)
    progress = Quiet()
    digest = push(Reference.parse(name), keep(store, IMAGE), store, progress, options)
    assert set(progress.notes.values()) == {"pushed"}
    assert digest == digest_of(IMAGE.raw)
    raw = skopeo("inspect", "--tls-verify=false", "--raw", f"docker://{name}")
    assert raw.encode() == IMAGE.raw
    folder = tmp_path / "taken"
    skopeo("copy", "--src-tls-verify=false", f"docker://{name}", f"oci:{folder}:y")
    for digest, data in IMAGE.blobs.items():
        path = folder / "blobs/sha256" / digest.partition(":")[2]
        assert path.read_bytes() == data
    assert len(registry.requests("PATCH", "uploads")) >= 3


def test_a_push_to_another_repository_moves_no_layer(
    start: Callable[..., RealRegistry], store: Store
) -> None:
    registry = start()
    first = Reference.parse(f"{registry.host}/one:1")
    push(first, keep(store, IMAGE), store, Quiet())
    image = pull(first, store, Quiet())
    progress = Quiet()
    second = Reference.parse(f"{registry.host}/two:1")
    push(second, image, store, progress)
    assert set(progress.notes.values()) == {"mounted"}
    progress = Quiet()
    push(second, image, store, progress)
    assert set(progress.notes.values()) == {"exists"}


def test_an_index_that_skopeo_pushed_gives_this_platform(
    start: Callable[..., RealRegistry], store: Store, tmp_path: Path
) -> None:
    registry = start()
    images = [
        replace(IMAGE, platform=one)
        for one in (Platform("linux", "s390x"), Platform.host(), Platform("linux", "arm", "v7"))
    ]
    index = index_of(*(one.entry() for one in images))
    folder = layout(tmp_path / "layout", *images, index=index)
    name = f"{registry.host}/many:1"
    skopeo("copy", "--all", "--dest-tls-verify=false", f"oci:{folder}:x", f"docker://{name}")
    assert pull(Reference.parse(name), store, Quiet()).digest == digest_of(images[1].raw)
    wanted = RegistryOptions(platform=Platform.parse("linux/arm/v7"))
    pulled = pull(Reference.parse(name), store, Quiet(), wanted)
    assert pulled.digest == digest_of(images[2].raw)
    pinned = Reference.parse(f"{registry.host}/many@{digest_of(index)}")
    assert pull(pinned, store, Quiet()).digest == digest_of(images[1].raw)


def test_an_image_in_dockers_format(
    start: Callable[..., RealRegistry], store: Store, tmp_path: Path
) -> None:
    registry = start()
    folder = layout(tmp_path / "layout", IMAGE)
    name = f"{registry.host}/docker:1"
    skopeo(
        "copy", "--format=v2s2", "--dest-tls-verify=false", f"oci:{folder}:x", f"docker://{name}"
    )
    pulled = pull(Reference.parse(name), store, Quiet())
    assert pulled.manifest.media_type == "application/vnd.docker.distribution.manifest.v2+json"
    copy = f"{registry.host}/docker:2"
    digest = push(Reference.parse(copy), pulled, store, Quiet())
    assert digest == pulled.digest
    assert skopeo("inspect", "--tls-verify=false", "--raw", f"docker://{copy}").encode() == (
        pulled.manifest.raw
    )


# Logins


def guarded(start: Callable[..., RealRegistry], folder: Path) -> RealRegistry:
    path = folder / "htpasswd"
    path.write_text(run("htpasswd", "-Bin", "me", input=PASSWORD))
    return start(auth={"htpasswd": {"realm": "tests", "path": str(path)}})


def test_the_login_of_skopeo_is_ours(
    start: Callable[..., RealRegistry],
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = guarded(start, tmp_path)
    reference = Reference.parse(f"{registry.host}/private/app:1")
    with pytest.raises(ImageError, match="wants a login for private/app") as caught:
        push(reference, keep(store, IMAGE), store, Quiet())
    assert f"docker login {registry.host}" in caught.value.hint
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    login = ("--tls-verify=false", "--username=me", "--password-stdin", registry.host)
    run("skopeo", "login", *login, input=PASSWORD)
    assert push(reference, keep(store, IMAGE), store, Quiet()) == digest_of(IMAGE.raw)
    with Store.open(tmp_path / "other") as other:
        assert pull(reference, other, Quiet()).digest == digest_of(IMAGE.raw)


def test_a_wrong_password_is_told_and_not_shown(
    start: Callable[..., RealRegistry], store: Store, tmp_path: Path, home: Path
) -> None:
    registry = guarded(start, tmp_path)
    wrong = base64.b64encode(b"me:wr0ng-password").decode()
    (home / ".docker").mkdir()
    config = home / ".docker/config.json"
    config.write_text(json.dumps({"auths": {registry.host: {"auth": wrong}}}))
    with pytest.raises(ImageError, match="refuses the login") as caught:
        pull(Reference.parse(f"{registry.host}/private/app:1"), store, Quiet())
    assert "wr0ng" not in str(caught.value)
    assert wrong not in str(caught.value)


def test_a_helper_of_dockers_logs_in(
    start: Callable[..., RealRegistry],
    store: Store,
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = guarded(start, tmp_path)
    helper = tmp_path / "bin/docker-credential-tests"
    helper.parent.mkdir()
    answer = json.dumps({"ServerURL": "", "Username": "me", "Secret": PASSWORD})
    helper.write_text(f"#!/bin/sh\n[ \"$(cat)\" = {registry.host} ] && echo '{answer}'\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    (home / ".docker").mkdir()
    config = {"credHelpers": {registry.host: "tests"}}
    (home / ".docker/config.json").write_text(json.dumps(config))
    reference = Reference.parse(f"{registry.host}/private/app:1")
    assert push(reference, keep(store, IMAGE), store, Quiet()) == digest_of(IMAGE.raw)


# Tokens, and TLS


class Authority:
    """A key with a certificate for 127.0.0.1 that signed itself."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.key, self.certificate = folder / "key.pem", folder / "cert.pem"
        options = ("-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tests")
        name = ("-addext", "subjectAltName=IP:127.0.0.1")
        files = ("-keyout", self.key, "-out", self.certificate)
        run("openssl", "req", "-x509", *options, *name, *files)

    @property
    def chain(self) -> str:
        """The certificate in the form of a token's header."""
        lines = self.certificate.read_text().split("-----")[2]
        return "".join(lines.split())

    def sign(self, data: bytes) -> bytes:
        return subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self.key)],
            input=data,
            capture_output=True,
            check=True,
        ).stdout

    def tls(self) -> dict[str, str]:
        return {"certificate": str(self.certificate), "key": str(self.key)}


class TokenServer(http.server.ThreadingHTTPServer):
    """A token server for docker-registry; the user is `me`."""

    daemon_threads = True

    def __init__(self, authority: Authority) -> None:
        super().__init__(("127.0.0.1", 0), TokenHandler)
        self.authority = authority
        self.expired = 0
        """How many tokens are out of date when they are given."""
        self.asked: list[dict[str, list[str]]] = []
        self.realm = f"http://127.0.0.1:{self.server_port}/token"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join(10)
        self.server_close()

    def token(self, scopes: list[str]) -> str:
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        header = {"typ": "JWT", "alg": "RS256", "x5c": [self.authority.chain]}
        until = 1 if self.expired else 4_000_000_000
        self.expired = max(0, self.expired - 1)
        claims = {"iss": "tests", "aud": "registry", "sub": "me", "nbf": 0, "iat": 0}
        parts = [header, {**claims, "exp": until, "jti": "1", "access": access}]
        text = ".".join(_base64url(json.dumps(part).encode()) for part in parts)
        return f"{text}.{_base64url(self.authority.sign(text.encode()))}"


class TokenHandler(http.server.BaseHTTPRequestHandler):
    server: TokenServer

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        query = urllib.parse.parse_qs(self.path.partition("?")[2])
        self.server.asked.append(query)
        expected = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        known = self.headers.get("Authorization") == f"Basic {expected}"
        self.send_response(200 if known else 401)
        self.end_headers()
        if known:
            token = self.server.token(query["scope"])
            self.wfile.write(json.dumps({"token": token}).encode())


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "keys")


@pytest.fixture
def tokens(authority: Authority) -> Iterator[TokenServer]:
    server = TokenServer(authority)
    yield server
    server.close()


def with_tokens(
    start: Callable[..., RealRegistry], tokens: TokenServer, home: Path
) -> RealRegistry:
    registry = start(
        auth={
            "token": {
                "realm": tokens.realm,
                "service": "registry",
                "issuer": "tests",
                "rootcertbundle": str(tokens.authority.certificate),
            }
        }
    )
    (home / ".docker").mkdir()
    login = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    config = home / ".docker/config.json"
    config.write_text(json.dumps({"auths": {registry.host: {"auth": login}}}))
    return registry


def test_tokens(
    start: Callable[..., RealRegistry],
    store: Store,
    tokens: TokenServer,
    home: Path,
    tmp_path: Path,
) -> None:
    registry = with_tokens(start, tokens, home)
    reference = Reference.parse(f"{registry.host}/private/app:1")
    assert find_credentials(registry.host) is not None
    push(reference, keep(store, IMAGE), store, Quiet())
    assert [one["scope"] for one in tokens.asked] == [["repository:private/app:pull,push"]]
    assert tokens.asked[0]["service"] == ["registry"]
    with Store.open(tmp_path / "other") as other:
        assert pull(reference, other, Quiet()).digest == digest_of(IMAGE.raw)
    assert [one["scope"] for one in tokens.asked[1:]] == [["repository:private/app:pull"]]


def test_a_token_that_is_out_of_date_is_renewed(
    start: Callable[..., RealRegistry], store: Store, tokens: TokenServer, home: Path
) -> None:
    registry = with_tokens(start, tokens, home)
    tokens.expired = 1
    reference = Reference.parse(f"{registry.host}/private/app:1")
    assert push(reference, keep(store, IMAGE), store, Quiet()) == digest_of(IMAGE.raw)
    assert len(tokens.asked) == 2


def test_a_mount_needs_the_scope_of_both(
    start: Callable[..., RealRegistry], store: Store, tokens: TokenServer, home: Path
) -> None:
    registry = with_tokens(start, tokens, home)
    first = Reference.parse(f"{registry.host}/private/app:1")
    push(first, keep(store, IMAGE), store, Quiet())
    image = pull(first, store, Quiet())
    progress = Quiet()
    push(Reference.parse(f"{registry.host}/private/copy:1"), image, store, progress)
    assert set(progress.notes.values()) == {"mounted"}


def test_tls_with_an_authority_of_ones_own(
    start: Callable[..., RealRegistry],
    store: Store,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = start(http={"tls": authority.tls()})
    reference = Reference.parse(f"{registry.host}/app:1")
    with pytest.raises(ImageError, match=r"certificate of .* is not trusted: self") as caught:
        push(reference, keep(store, IMAGE), store, Quiet())
    assert "SSL_CERT_FILE" in caught.value.hint
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    assert push(reference, keep(store, IMAGE), store, Quiet()) == digest_of(IMAGE.raw)


def test_what_the_registry_deleted_is_named(
    start: Callable[..., RealRegistry], store: Store, tmp_path: Path
) -> None:
    registry = start()
    reference = Reference.parse(f"{registry.host}/app:1")
    push(reference, keep(store, IMAGE), store, Quiet())
    digest = digest_of(IMAGE.packed[1])
    hexed = digest.partition(":")[2]
    data = tmp_path / f"registry0/data/docker/registry/v2/blobs/sha256/{hexed[:2]}/{hexed}/data"
    data.unlink()
    with Store.open(tmp_path / "other") as other:
        with pytest.raises(ImageError, match=f"blob {digest}: .* answers 404"):
            pull(reference, other, Quiet())
        assert other.images() == ()


def test_what_the_disk_of_the_registry_changed_is_refused(
    start: Callable[..., RealRegistry], store: Store, tmp_path: Path
) -> None:
    registry = start()
    reference = Reference.parse(f"{registry.host}/app:1")
    push(reference, keep(store, IMAGE), store, Quiet())
    packed = IMAGE.packed[1]
    hexed = hashlib.sha256(packed).hexdigest()
    data = tmp_path / f"registry0/data/docker/registry/v2/blobs/sha256/{hexed[:2]}/{hexed}/data"
    data.write_bytes(packed[:-1] + b"\xff")
    with Store.open(tmp_path / "other") as other:
        with pytest.raises(ImageError, match="the digest does not match"):
            pull(reference, other, Quiet())
        assert not other.has_blob(f"sha256:{hexed}")
