"""A registry on loopback in this process, which tests make lie, break and refuse.

It keeps to the distribution protocol as far as a client can tell. `rule` puts an answer before
the usual one; `requests` is what was asked. Beside it images to move.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import re
import socket
import tarfile
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sandbox_kernel.image.documents import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    Platform,
    digest_of,
    render_json,
)
from sandbox_kernel.image.reference import Reference


@dataclass(frozen=True)
class Request:
    """What was asked, without the body."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def authorization(self) -> str:
        return self.headers.get("authorization", "")


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def handle_one_request(self) -> None:
        # A client that closes early is no error of this server's.
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle_one_request()

    def do(self) -> None:
        self.server.registry.serve(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Answer in full; `content_type` is the header Content-Type."""
        self.begin(status, len(body), **headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response_only(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if length is not None and "content-length" not in {name.lower() for name in named}:
            self.send_header("Content-Length", str(length))
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()

    def hang_up(self) -> None:
        """Close the connection in the middle of an answer."""
        self.wfile.flush()
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    registry: FakeRegistry


@dataclass
class Rule:
    method: str
    pattern: re.Pattern[str]
    answer: Callable[[Handler], None]
    times: int


class FakeRegistry:
    """The registry; close it."""

    def __init__(self) -> None:
        self.manifests: dict[str, tuple[bytes, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.password = ""
        """`name:password` of the one user; everybody may enter if it is empty."""
        self.scheme = "Bearer"
        self.tokens: set[str] = set()
        self.token_requests = 0
        self.uses_per_token = 0
        """A token is refused after so many uses; never if it is 0."""
        self.repositories: dict[str, set[str]] = {}
        self.elsewhere = ""
        """Another host to which blobs are redirected, and uploads sent."""
        self._uses: dict[str, int] = {}
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.registry = self
        self.host = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    def rule(
        self, method: str, pattern: str, answer: Callable[[Handler], None], times: int = 1
    ) -> None:
        """Answer the next requests of this kind otherwise; `times` of 0 is for ever."""
        self._rules.append(Rule(method, re.compile(pattern), answer, times or 1 << 30))

    def asked(self, method: str, pattern: str) -> list[Request]:
        return [
            one for one in self.requests if one.method == method and re.search(pattern, one.path)
        ]

    def reference(self, name: str = "team/app", version: str = ":1") -> Reference:
        return Reference.parse(f"{self.host}/{name}{version}")

    def put(self, image: FakeImage, name: str = "team/app", tag: str = "1") -> None:
        """Have an image, as if it had been pushed."""
        self.blobs.update(image.blobs)
        self.put_document(image.raw, OCI_MANIFEST, name, tag)
        self.repositories.setdefault(name, set()).update(image.blobs)

    def put_document(
        self, raw: bytes, media_type: str, name: str = "team/app", tag: str = "1"
    ) -> None:
        self.manifests[f"{name}:{tag}"] = raw, media_type
        self.manifests[f"{name}:{digest_of(raw)}"] = raw, media_type

    def serve(self, handler: Handler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request(handler.command, handler.path, headers)
        with self._lock:
            self.requests.append(request)
            rule = self._matching(request)
        if rule is not None:
            rule.answer(handler)
            return
        path, _, query = handler.path.partition("?")
        if path == "/token":
            self._give_token(handler, request, query)
        elif not self._may_enter(request):
            handler.body()
            challenge = 'Basic realm="x"'
            if self.scheme == "Bearer":
                challenge = f'Bearer realm="http://{self.host}/token",service="fake"'
            handler.answer(401, www_authenticate=challenge)
        else:
            self._serve(handler, path, dict(urllib.parse.parse_qsl(query)))

    def _matching(self, request: Request) -> Rule | None:
        for rule in self._rules:
            if rule.times and rule.method == request.method and rule.pattern.search(request.path):
                rule.times -= 1
                return rule
        return None

    def _may_enter(self, request: Request) -> bool:
        if not self.password:
            return True
        kind, _, value = request.authorization.partition(" ")
        if self.scheme == "Basic":
            return kind == "Basic" and base64.b64decode(value).decode() == self.password
        with self._lock:
            self._uses[value] = self._uses.get(value, 0) + 1
            is_fresh = not self.uses_per_token or self._uses[value] <= self.uses_per_token
            return kind == "Bearer" and value in self.tokens and is_fresh

    def _give_token(self, handler: Handler, request: Request, query: str) -> None:
        form = dict(urllib.parse.parse_qsl(handler.body().decode()))
        kind, _, value = request.authorization.partition(" ")
        known = kind == "Basic" and base64.b64decode(value).decode() == self.password
        if not known and form.get("refresh_token") != self.password:
            handler.answer(401, b'{"errors":[{"code":"UNAUTHORIZED"}]}')
            return
        with self._lock:
            self.token_requests += 1
            token = f"token-{self.token_requests}"
            self.tokens.add(token)
        handler.answer(200, json.dumps({"token": token}).encode())

    def _serve(self, handler: Handler, path: str, query: dict[str, str]) -> None:
        if path == "/v2/":
            handler.answer(200, b"{}")
        elif match := re.fullmatch(r"/v2/(.+)/manifests/(.+)", path):
            self._manifest(handler, f"{match[1]}:{match[2]}")
        elif match := re.fullmatch(r"/v2/(.+)/blobs/uploads/(.*)", path):
            self._upload(handler, match[1], match[2], query)
        elif match := re.fullmatch(r"/v2/(.+)/blobs/(.+)", path):
            self._blob(handler, match[2])
        else:
            handler.answer(404)

    def _manifest(self, handler: Handler, key: str) -> None:
        if handler.command == "PUT":
            raw = handler.body()
            name = key.partition(":")[0]
            self.put_document(raw, handler.headers["Content-Type"], name, key.partition(":")[2])
            handler.answer(201, docker_content_digest=digest_of(raw))
        elif key in self.manifests:
            raw, media_type = self.manifests[key]
            handler.answer(200, raw, content_type=media_type, docker_content_digest=digest_of(raw))
        else:
            errors = [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]
            handler.answer(404, json.dumps({"errors": errors}).encode())

    def _blob(self, handler: Handler, digest: str) -> None:
        if digest not in self.blobs:
            handler.answer(404)
            return
        if self.elsewhere:
            location = f"http://{self.elsewhere}/cdn/{digest}?signature=a%2Fb"
            handler.answer(307, location=location)
            return
        data = self.blobs[digest]
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if match is None:
            handler.answer(200, data)
            return
        start = int(match[1])
        told = f"bytes {start}-{len(data) - 1}/{len(data)}"
        handler.answer(206, data[start:], content_range=told)

    def _upload(self, handler: Handler, name: str, upload: str, query: dict[str, str]) -> None:
        here = f"/v2/{name}/blobs/uploads/"
        data = handler.body()
        if handler.command == "POST":
            held = self.repositories.get(query.get("from", ""), set())
            if query.get("mount") in held:
                handler.answer(201, location=f"/v2/{name}/blobs/{query['mount']}")
                return
            if self.elsewhere:
                handler.answer(202, location=f"http://{self.elsewhere}/up?signature=a%2Fb")
                return
            with self._lock:
                upload = f"u{len(self.requests)}"
                self.uploads[upload] = b""
            handler.answer(202, location=f"{here}{upload}?state=a%2Fb")
        elif upload not in self.uploads:
            handler.answer(404)
        elif handler.command == "GET":
            held_bytes = max(0, len(self.uploads[upload]) - 1)
            handler.answer(204, location=here + upload, range=f"0-{held_bytes}")
        elif handler.command == "PATCH":
            start = int(handler.headers["Content-Range"].partition("-")[0])
            if start != len(self.uploads[upload]):
                handler.answer(416)
                return
            self.uploads[upload] += data
            handler.answer(202, location=here + upload)
        else:
            whole = self.uploads.pop(upload) + data
            if digest_of(whole) != query.get("digest"):
                handler.answer(400, b'{"errors":[{"code":"DIGEST_INVALID"}]}')
                return
            self.blobs[digest_of(whole)] = whole
            handler.answer(201)


def layer(*files: tuple[str, bytes]) -> bytes:
    """Make a layer's tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@dataclass(frozen=True)
class FakeImage:
    """An image with a config and gzipped layers, for one platform."""

    layers: tuple[bytes, ...]
    platform: Platform = field(default_factory=Platform.host)
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def packed(self) -> tuple[bytes, ...]:
        return tuple(gzip.compress(one, mtime=0) for one in self.layers)

    @property
    def config(self) -> bytes:
        diff_ids = [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in self.layers]
        rootfs = {"type": "layers", "diff_ids": diff_ids}
        value = {**self.platform.as_json(), "rootfs": rootfs}
        return render_json({**value, "config": {"Labels": dict(self.labels)}})

    @property
    def document(self) -> dict[str, Any]:
        config = Descriptor(OCI_CONFIG, digest_of(self.config), len(self.config))
        layers = [Descriptor(OCI_LAYER_GZIP, digest_of(one), len(one)) for one in self.packed]
        return {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config.as_json(),
            "layers": [one.as_json() for one in layers],
        }

    @property
    def raw(self) -> bytes:
        return render_json(self.document)

    @property
    def manifest(self) -> Manifest:
        return Manifest.parse(self.raw)

    @property
    def blobs(self) -> dict[str, bytes]:
        return {digest_of(one): one for one in (self.config, *self.packed)}

    def entry(self) -> Descriptor:
        """Give how an index points here."""
        return Descriptor(OCI_MANIFEST, digest_of(self.raw), len(self.raw), self.platform)


def index_of(*entries: Descriptor) -> bytes:
    """Make an index."""
    listed = [entry.as_json() for entry in entries]
    return render_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed})
