"""ADD of a URL: fetched to a file, bounded, and checked against what the Dockerfile promises."""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import httpx

from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.registry_http import (
    CONNECT_TIMEOUT_S,
    MAX_REDIRECTS,
    READ_TIMEOUT_S,
    is_off_limits,
)
from sandbox_kernel.units import format_size

MAX_BYTES = 16 << 30
UNNAMED = "__unnamed__"
"""What Docker calls a file whose URL names none."""

_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}
_CHECKSUM = re.compile(r"(sha256|sha384|sha512):([0-9a-f]+)")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A URL, the name that its file gets, and `algorithm:hex` or nothing."""

    url: str
    name: str
    checksum: str = ""


def remote(url: str, checksum: str = "") -> Remote:
    """Read the arguments of an ADD; raises BuildError."""
    match = _CHECKSUM.fullmatch(checksum)
    if checksum and (match is None or len(match[2]) != _LENGTHS[match[1]]):
        raise BuildError(
            f"--checksum={checksum}", hint="write sha256: and 64 hexadecimal digits, lower case"
        )
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise BuildError(f"{url} is no URL: {error}", hint="write https://HOST/PATH") from error
    name = posixpath.basename(unquote(parsed.path))
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        name = UNNAMED
    return Remote(url, name, checksum)


def download(source: Remote, folder: Path, *, limit_bytes: int = MAX_BYTES) -> Path:
    """Fetch a file into a folder and give its path; raises BuildError.

    Nothing is left in the folder unless the whole file came, and is the one that was promised.
    """
    path = folder / source.name
    algorithm = source.checksum.partition(":")[0] or "sha256"
    digest = hashlib.new(algorithm)
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        with (
            httpx.Client(timeout=timeout, follow_redirects=False) as client,
            path.open("xb") as file,
        ):
            os.fchmod(file.fileno(), 0o600)
            size_bytes = 0
            with contextlib.closing(_answer(client, source)) as answer:
                for chunk in answer.iter_raw(_CHUNK_BYTES):
                    size_bytes += len(chunk)
                    if size_bytes > limit_bytes:
                        raise BuildError(
                            f"{source.url} has more than {format_size(limit_bytes)}",
                            hint="fetch it yourself and COPY it",
                        )
                    digest.update(chunk)
                    file.write(chunk)
        found = f"{algorithm}:{digest.hexdigest()}"
        if source.checksum and found != source.checksum:
            raise BuildError(
                f"{source.url} is {found}, not {source.checksum}",
                hint="the file has changed; look at it, then write the new --checksum",
            )
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, httpx.HTTPError):
            raise BuildError(
                f"{source.url} cannot be fetched: {str(error) or type(error).__name__}",
                hint="check the network and the URL, or COPY the file",
            ) from error
        raise
    return path


def _answer(client: httpx.Client, source: Remote) -> httpx.Response:
    """Give the answer behind all redirects, not read yet."""
    url = httpx.URL(source.url)
    asked_for = url
    for _ in range(MAX_REDIRECTS + 1):
        # As it is: what a server compresses on its way has another digest.
        request = client.build_request("GET", url, headers={"Accept-Encoding": "identity"})
        answer = client.send(request, stream=True)
        if not answer.has_redirect_location:
            break
        answer.close()
        url = url.join(answer.headers["location"])
        # A server may not send us to a service of this machine, nor take TLS away.
        if url.scheme not in ("http", "https") or (
            (asked_for.scheme, url.scheme) == ("https", "http")
            or (is_off_limits(url.host) and url.host != asked_for.host)
        ):
            raise BuildError(
                f"{source.url} redirects to {url}, which is not allowed",
                hint="write the URL of the file itself",
            )
    else:
        raise BuildError(f"{source.url} redirects too often", hint="write the file's own URL")
    if answer.status_code != httpx.codes.OK:
        answer.close()
        raise BuildError(
            f"{source.url}: {answer.status_code} {answer.reason_phrase}", hint="check the URL"
        )
    return answer
