"""One repository of a registry: its manifests and blobs, down and up.

Source: OCI distribution-spec 1.1. Whatever comes is verified by the caller's descriptor: sizes
here while they stream, digests by who writes the blob.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import httpx

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.credentials import Credentials, find_credentials
from sandbox_kernel.image.documents import (
    ACCEPTED,
    MAX_DOCUMENT_BYTES,
    Descriptor,
    Platform,
    check_digest,
    digest_of,
)
from sandbox_kernel.image.parallel import Stopped
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.registry_auth import Login
from sandbox_kernel.image.registry_calls import Attempts, Calls, Passing, Patience
from sandbox_kernel.image.registry_http import Call, Transport

PIECE_BYTES = 256 << 10
"""What is read of a file, or told to the progress, at once."""
MAX_CHUNK_BYTES = 1 << 30

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
_HELD = re.compile(r"(?:bytes=)?0-(\d{1,18})", re.ASCII)
_NO_CHUNKS = frozenset({400, 404, 405, 415, 501})
"""How registries refuse an upload in chunks."""


@dataclass(frozen=True)
class RegistryOptions:
    """How to speak to a registry."""

    insecure: bool = False
    """Plain HTTP."""
    platform: Platform | None = None
    """What to take of an index; by default this machine's."""
    parallel: int = 4
    chunk_bytes: int = 32 << 20
    """A larger blob is sent in chunks, so that a broken connection costs no more than one."""
    patience: Patience = field(default_factory=Patience)
    credentials: Callable[[str, str], Credentials | None] = find_credentials
    """Gives the user's for registry and repository, when the registry asks."""


class Registry:
    """The repository that a reference names, and a pool of connections to it.

    Threads may share one. Every method raises ImageError, and Stopped once `stop` is set.
    """

    def __init__(
        self,
        reference: Reference,
        options: RegistryOptions,
        stop: threading.Event,
        *,
        push: bool = False,
        mount_from: str = "",
    ) -> None:
        """Open nothing yet; `mount_from` is another repository there that may have blobs."""
        scopes = [f"repository:{reference.repository}:{'pull,push' if push else 'pull'}"]
        if mount_from:
            scopes.append(f"repository:{mount_from}:pull")
        self._reference = reference
        self._options = options
        self._mount_from = mount_from
        self._transport = Transport(reference.registry, insecure=options.insecure)
        login = Login(
            reference.registry,
            tuple(scopes),
            self._transport,
            lambda: options.credentials(reference.registry, reference.repository),
        )
        self._calls = Calls(self._transport, login, options.patience, stop)
        self._base = self._transport.base.join(f"{reference.repository}/")

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def abort(self) -> None:
        """Wake the threads that wait for the network; set `stop` before."""
        self._transport.abort()

    def manifest(self, version: str) -> tuple[bytes, str]:
        """Give the bytes and the media type of a manifest or index, by tag or by digest."""
        call = self._manifest_call("GET", version)
        response, raw = self._calls.document(call, MAX_DOCUMENT_BYTES, 200)
        digest = digest_of(raw)
        told = response.headers.get("Docker-Content-Digest", "")
        wanted = version if ":" in version else told if told.startswith("sha256:") else digest
        if digest != wanted:
            raise ImageError(
                f"{call.what} has the digest {digest}, not {wanted[:80]}",
                hint="the registry, or who stands between, changed it",
            )
        return raw, response.headers.get("Content-Type", "")

    def manifest_digest(self, version: str) -> str:
        """Give the digest of a manifest or index without its bytes; empty if it is not told."""
        call = self._manifest_call("HEAD", version)
        response, _ = self._calls.document(call, 0, 200, 404, 405)
        told = response.headers.get("Docker-Content-Digest", "")
        try:
            return check_digest(told) if response.status_code == 200 else ""
        except ImageError:
            return ""

    def has_blob(self, digest: str) -> bool:
        """Tell whether the repository has a blob."""
        call = Call("HEAD", self._base.join(f"blobs/{digest}"), f"blob {digest}")
        return self._calls.document(call, 0, 200, 404)[0].status_code == 200

    def download(self, blob: Descriptor, write: Callable[[bytes], object]) -> None:
        """Give a blob's bytes to `write`, in order and exactly its size; resumes what breaks."""
        url = self._base.join(f"blobs/{blob.digest}")
        done = 0

        def make() -> Call:
            headers = (("Range", f"bytes={done}-"),) if done else ()
            return Call("GET", url, f"blob {blob.digest}", headers)

        def use(response: httpx.Response, attempts: Attempts) -> None:
            nonlocal done
            skip = _check_start(response, blob, done)
            for data in response.iter_raw():
                if self._calls.stop.is_set():
                    raise Stopped
                piece, skip = data[skip:], max(0, skip - len(data))
                if done + len(piece) > blob.size_bytes:
                    raise ImageError(
                        f"blob {blob.digest} is longer than the {blob.size_bytes} bytes that "
                        "the manifest says"
                    )
                if piece:
                    write(piece)
                    done += len(piece)
                    attempts.progress()
            if done < blob.size_bytes:
                raise Passing(f"the stream ended after {done} of {blob.size_bytes} bytes")

        self._calls.run(make, use, 200, 206)

    def upload(
        self, blob: Descriptor, open_blob: Callable[[], BinaryIO], advanced: Callable[[int], None]
    ) -> str:
        """Send a blob unless the repository has it; give `exists`, `mounted` or `pushed`."""
        if self.has_blob(blob.digest):
            return "exists"
        upload = _Upload(self._calls, self._transport, blob, open_blob, advanced)
        upload.chunk_bytes = self._options.chunk_bytes
        attempts = self._calls.attempts(f"blob {blob.digest}")
        query = f"?mount={blob.digest}&from={self._mount_from}" if self._mount_from else ""
        while True:
            try:
                if not upload.begun and upload.begin(self._base.join(f"blobs/uploads/{query}")):
                    return "mounted"
                upload.send(attempts)
            except Passing as failure:
                attempts.failed(failure)
                upload.find_out()
            else:
                return "pushed"
            # A mount that led nowhere once is not asked for again.
            query = ""

    def put_manifest(self, version: str, raw: bytes, media_type: str) -> str:
        """Send a manifest, whose blobs must be there; give its digest."""
        call = Call(
            "PUT",
            self._base.join(f"manifests/{version}"),
            f"manifest of {self._reference}",
            (("Content-Type", media_type),),
            lambda: [raw],
            len(raw),
        )
        response, _ = self._calls.document(call, MAX_DOCUMENT_BYTES, 200, 201, 202)
        digest = digest_of(raw)
        told = response.headers.get("Docker-Content-Digest", digest)
        if told != digest:
            raise ImageError(f"{call.what}: the registry took {told[:80]}, not {digest}")
        return digest

    def _manifest_call(self, method: str, version: str) -> Call:
        url = self._base.join(f"manifests/{version}")
        name = self._reference if ":" not in version else f"{self._reference.name}@{version}"
        return Call(method, url, f"image {name}", (("Accept", ", ".join(ACCEPTED)),))


def _check_start(response: httpx.Response, blob: Descriptor, done: int) -> int:
    """Check what an answer announces; give how many of its first bytes are known already."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        if length and length != str(blob.size_bytes):
            raise ImageError(
                f"blob {blob.digest} is announced with {length[:20]} bytes, the manifest says "
                f"{blob.size_bytes}"
            )
        return done
    matched = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if not done or matched is None or int(matched[1]) != done:
        raise ImageError(f"blob {blob.digest}: {response.url.host} sends a range not asked for")
    if matched[3] not in {"*", str(blob.size_bytes)}:
        raise ImageError(
            f"blob {blob.digest} is announced with {matched[3]} bytes, the manifest says "
            f"{blob.size_bytes}"
        )
    return 0


class _Upload:
    """One blob on its way up."""

    def __init__(
        self,
        calls: Calls,
        transport: Transport,
        blob: Descriptor,
        open_blob: Callable[[], BinaryIO],
        advanced: Callable[[int], None],
    ) -> None:
        self._calls = calls
        self._transport = transport
        self._blob = blob
        self._open_blob = open_blob
        self._advanced = advanced
        self._what = f"blob {blob.digest}"
        self._url: httpx.URL | None = None
        self._offset = 0
        self._told = 0
        self._in_chunks = True
        self.chunk_bytes = MAX_CHUNK_BYTES

    @property
    def begun(self) -> bool:
        """Tell whether the registry waits for bytes."""
        return self._url is not None

    def begin(self, url: httpx.URL) -> bool:
        """Ask for an upload; tells whether that was enough, since another repository has it."""
        self._offset = 0
        response = self._calls.once(Call("POST", url, self._what), lambda found: found, 201, 202)
        if response.status_code == 201:
            return True
        self._go_on(response)
        least = response.headers.get("OCI-Chunk-Min-Length", "")
        if least.isascii() and least.isdigit():
            self.chunk_bytes = min(max(self.chunk_bytes, int(least[:12])), MAX_CHUNK_BYTES)
        return False

    def send(self, attempts: Attempts) -> None:
        """Send what is left; raises Passing."""
        size = self._blob.size_bytes
        if not self._in_chunks or size <= self.chunk_bytes:
            self._finish(size)
            return
        while self._offset < size:
            until = min(self._offset + self.chunk_bytes, size)
            call = self._patch(until)
            response = self._calls.once(call, lambda found: found, 202, 416, *_NO_CHUNKS)
            if response.status_code in _NO_CHUNKS:
                if self._offset:
                    raise ImageError(f"{call.what}: a chunk got the answer {response.status_code}")
                self._in_chunks, self._url = False, None
                raise Passing("the registry takes no chunks")
            if response.status_code == 416:
                raise Passing("the registry has lost count")
            self._go_on(response)
            self._offset = until
            attempts.progress()
        self._finish(0)

    def find_out(self) -> None:
        """Ask after a failure how much has arrived; begin anew where that is not told."""
        url, self._url = self._url, None
        if url is None or not self._in_chunks or self._blob.size_bytes <= self.chunk_bytes:
            return
        call = Call("GET", url, self._what)
        try:
            response = self._calls.once(call, lambda found: found, 204, 404)
        except (Passing, ImageError):
            # Whatever it says: a new upload is the other way.
            return
        held = _HELD.fullmatch(response.headers.get("Range", ""))
        if response.status_code == 204 and held is not None:
            # Nothing yet is told as 0-0, as is one byte: then all is sent again.
            count = int(held[1]) + 1
            if 1 < count <= self._blob.size_bytes:
                self._offset = count
                self._go_on(response, url)

    def _patch(self, until: int) -> Call:
        start = self._offset
        headers = (
            ("Content-Type", "application/octet-stream"),
            ("Content-Range", f"{start}-{until - 1}"),
        )
        body = lambda: self._read(start, until)  # noqa: E731 - one line says it
        return Call("PATCH", self._here(), self._what, headers, body, until - start)

    def _finish(self, count: int) -> None:
        """Close the upload with its digest, and `count` bytes in the same call."""
        # Behind what is there, unchanged: it may be signed.
        query = self._here().query + b"&digest=" + self._blob.digest.encode()
        url = self._here().copy_with(query=query.lstrip(b"&"))
        headers = (("Content-Type", "application/octet-stream"),)
        body = lambda: self._read(0, count)  # noqa: E731 - one line says it
        call = Call("PUT", url, self._what, headers, body, count)
        self._calls.once(call, lambda found: found, 201, 204)

    def _here(self) -> httpx.URL:
        assert self._url is not None  # noqa: S101 - begin() came before
        return self._url

    def _go_on(self, response: httpx.Response, url: httpx.URL | None = None) -> None:
        location = response.headers.get("Location", "")
        if url is not None and not location:
            self._url = url
        else:
            self._url = self._transport.join(response.url, location, self._what)

    def _read(self, start: int, until: int) -> Iterator[bytes]:
        with self._open_blob() as file:
            file.seek(start)
            while start < until:
                if self._calls.stop.is_set():
                    raise Stopped
                data = file.read(min(PIECE_BYTES, until - start))
                if not data:
                    raise ImageError(f"{self._what} ends before its size, in the store")
                yield data
                start += len(data)
                # Bytes that are sent a second time are no progress.
                if start > self._told:
                    self._advanced(start - self._told)
                    self._told = start
