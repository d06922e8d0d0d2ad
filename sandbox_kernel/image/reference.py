"""Names of images as Docker's users write them: `debian`, `ghcr.io/a/b:1`, `localhost:5000/x`.

Source: the grammar of distribution/reference, and Docker's defaults: a first part without a dot,
a colon or `localhost` is no registry but belongs to docker.io, and `latest` is the tag.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from dataclasses import dataclass

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.media import check_digest

DOCKER_HUB = "docker.io"
DEFAULT_TAG = "latest"
MAX_NAME_LENGTH = 255
"""Of registry and repository together."""

_HUB_ALIASES = frozenset({"index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"})
_HUB_FOLDER = "library/"
_PART = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HOST = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
_PORT = re.compile(r":([0-9]{1,5})")
_HEX_ID = re.compile(r"[0-9a-f]{64}")
_EXAMPLE = "write [REGISTRY/]NAME[:TAG][@DIGEST], for example debian:12 or ghcr.io/me/tools:1.0"


@dataclass(frozen=True)
class Reference:
    """Where an image is, or shall be: a registry, a repository in it, a tag or a digest or both.

    Without a digest there is always a tag.
    """

    registry: str
    """Host and port; `docker.io` for Docker's."""
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference; raises ImageError, which says what is wrong with it."""
        if not text.isascii() or not text.isprintable() or len(text) > 4 * MAX_NAME_LENGTH:
            raise ImageError(f"{text[:100]!r} is not an image reference", hint=_EXAMPLE)
        if "://" in text:
            raise ImageError(
                f"{text!r} is a URL, not an image reference",
                hint=f"leave out {text.partition('://')[0]}://",
            )
        name, at, digest = text.partition("@")
        if at:
            check_digest(digest)
        name, tag = _split_tag(name)
        if _HEX_ID.fullmatch(name) and not tag:
            raise ImageError(
                f"{name} is the ID of an image, not a reference",
                hint=f"for a digest write NAME@sha256:{name}",
            )
        registry, repository = _split_registry(name)
        _check_repository(registry, repository, text)
        if tag is not None and not _TAG.fullmatch(tag):
            raise ImageError(
                f"{tag!r} in {text!r} is not a tag",
                hint="a tag has letters, digits, '_', '.' and '-', at most 128 of them",
            )
        return cls(registry, repository, tag or ("" if at else DEFAULT_TAG), digest)

    def __str__(self) -> str:
        """Give the short form that people know: `debian:12` for `docker.io/library/debian:12`."""
        name = self.name
        if self.registry == DOCKER_HUB:
            name = self.repository.removeprefix(_HUB_FOLDER)
            # A first part that looks like a registry needs the real one before it.
            if "/" in name and _is_registry(name.partition("/")[0]):
                name = self.name
        return name + self._suffix()

    @property
    def name(self) -> str:
        """Registry and repository."""
        return f"{self.registry}/{self.repository}"

    @property
    def full(self) -> str:
        """Every part written out: the form by which a store knows an image."""
        return self.name + self._suffix()

    @property
    def version(self) -> str:
        """What a registry is asked for: the digest if there is one, else the tag."""
        return self.digest or self.tag

    def at(self, digest: str) -> Reference:
        """Give the reference to exactly this digest."""
        return dataclasses.replace(self, digest=check_digest(digest))

    def _suffix(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{tag}@{self.digest}" if self.digest else tag


def _split_tag(name: str) -> tuple[str, str | None]:
    """Take the tag off, which is behind the last colon unless that one is a port's."""
    head, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        return name, None
    return head, tag


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if slash and _is_registry(first):
        registry = check_registry(first)
        if registry != DOCKER_HUB:
            return registry, rest
        name = rest
    return DOCKER_HUB, name if "/" in name else _HUB_FOLDER + name


def _is_registry(part: str) -> bool:
    return "." in part or ":" in part or part == "localhost" or part.lower() != part


def check_registry(text: str) -> str:
    """Give a registry's host and port in the form that references use; raises ImageError."""
    host, port = text, ""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        good = _is_ipv6(host)
    else:
        host, colon, number = text.partition(":")
        port = colon + number
        good = _HOST.fullmatch(host) is not None
    matched = _PORT.fullmatch(port)
    if not good or (port and (matched is None or not 0 < int(matched[1]) < 65536)):
        raise ImageError(f"{text!r} is not a registry", hint="it is HOST or HOST:PORT")
    found = text.lower()
    return DOCKER_HUB if found in _HUB_ALIASES else found


def _is_ipv6(text: str) -> bool:
    try:
        return not ipaddress.IPv6Address(text).scope_id
    except ValueError:
        return False


def _check_repository(registry: str, repository: str, text: str) -> None:
    if len(registry) + 1 + len(repository) > MAX_NAME_LENGTH:
        raise ImageError(f"{text[:100]!r}... is too long", hint=f"at most {MAX_NAME_LENGTH}")
    for part in repository.split("/"):
        if _PART.fullmatch(part):
            continue
        if part.lower() != part:
            hint = "names of images are in lower case"
        else:
            hint = _EXAMPLE
        raise ImageError(f"{part!r} in {text!r} cannot be a part of an image's name", hint=hint)
