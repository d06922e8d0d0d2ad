"""What a user logged in with: the credentials that docker, podman and skopeo keep.

Read from Docker's config.json and from containers' auth.json (containers-auth.json(5)), or asked
from the credential helper that they name. Nothing of a secret enters an error, a log or an
argument; the files are only read.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.fields import Fields, parse_object
from sandbox_kernel.image.reference import DOCKER_HUB

HELPER_TIMEOUT_S = 60.0
"""A helper may ask the user for a passphrase."""
MAX_FILE_BYTES = 1 << 20

_HUB_SERVER = "https://index.docker.io/v1/"
"""By this name docker and its helpers know Docker's registry."""
_HUB_NAMES = frozenset({"index.docker.io", "registry-1.docker.io", DOCKER_HUB})
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_IDENTITY_USER = "<token>"
"""The user's name by which helpers say that the secret is an identity token."""
_NOT_FOUND = "credentials not found"


@dataclass(frozen=True)
class Credentials:
    """A name and a password, or a token that stands for both; never shown."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """To be changed for tokens at the token server (OAuth 2's refresh token)."""
    registry_token: str = field(default="", repr=False)
    """To be sent to the registry as it is."""

    @property
    def basic(self) -> str:
        """The value of an `Authorization` header; empty without a name."""
        if not self.username:
            return ""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """Whatever must not be shown."""
        found = (self.password, self.identity_token, self.registry_token, self.basic[6:])
        return tuple(secret for secret in found if secret)


def find_credentials(
    registry: str, repository: str = "", *, environ: Mapping[str, str] = os.environ
) -> Credentials | None:
    """Give the credentials for a repository of a registry, None where the user has none.

    The first file with some wins. Raises ImageError for a file or a helper that is broken: to go
    on as nobody would only lead to an error that tells less.
    """
    for path in _files(environ):
        config = _load(path)
        if config is None:
            continue
        found = _from_helpers(config, registry, path, environ) or _from_auths(
            config, registry, repository
        )
        if found is not None:
            return found
    return None


def _files(environ: Mapping[str, str]) -> Iterator[Path]:
    if named := environ.get("REGISTRY_AUTH_FILE"):
        yield Path(named)
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    docker = environ.get("DOCKER_CONFIG")
    yield (Path(docker) if docker else home / ".docker") / "config.json"
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers/auth.json"
    settings = environ.get("XDG_CONFIG_HOME")
    yield (Path(settings) if settings else home / ".config") / "containers/auth.json"


def _load(path: Path) -> Fields | None:
    try:
        # A FIFO in its place would block an open for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ImageError(
            f"the credentials in {path} cannot be read: {error.strerror}",
            hint="mend its mode and owner, or remove it",
        ) from error
    with open(descriptor, "rb") as file:
        try:
            raw = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ImageError(f"{path} is too large", hint=f"at most {MAX_FILE_BYTES} bytes")
    if not raw.strip():
        return None
    try:
        return Fields(parse_object(raw, str(path)), str(path))
    except ImageError:
        # The cause would quote what is in the file.
        raise ImageError(
            f"{path} is not a JSON object", hint="log in anew, or remove the file"
        ) from None


def _from_helpers(
    config: Fields, registry: str, path: Path, environ: Mapping[str, str]
) -> Credentials | None:
    helpers = dict(config.pairs("credHelpers"))
    names = [registry, _HUB_SERVER, *sorted(_HUB_NAMES)] if registry == DOCKER_HUB else [registry]
    chosen = [helpers[name] for name in names if helpers.get(name)]
    helper = chosen[0] if chosen else config.text("credsStore")
    if not helper:
        return None
    if not _HELPER_NAME.fullmatch(helper):
        raise ImageError(f"{path}: {helper[:100]!r} is not the name of a credential helper")
    server = _HUB_SERVER if registry == DOCKER_HUB else registry
    answer = _ask_helper(f"docker-credential-{helper}", server, path, environ)
    if answer is None:
        return None
    username, secret = answer.text("Username"), answer.text("Secret")
    if not secret:
        return None
    if username == _IDENTITY_USER:
        return Credentials(identity_token=secret)
    return Credentials(username, secret)


def _ask_helper(program: str, server: str, path: Path, environ: Mapping[str, str]) -> Fields | None:
    """Ask a helper for what it knows of a server: on its standard input, not as an argument."""
    try:
        done = subprocess.run(
            [program, "get"],
            input=server.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environ),
            timeout=HELPER_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise ImageError(
            f"the credential helper {program} is not installed",
            hint=f"install it, or take it out of {path}",
        ) from None
    except subprocess.TimeoutExpired:
        raise ImageError(
            f"the credential helper {program} does not answer within {HELPER_TIMEOUT_S:g} s"
        ) from None
    except OSError as error:
        raise ImageError(
            f"the credential helper {program} cannot be run: {error.strerror}"
        ) from None
    if done.returncode:
        # Docker's helpers say so on standard output, and fail.
        if _NOT_FOUND in done.stdout[:1000].decode("utf-8", "replace"):
            return None
        raise ImageError(
            f"the credential helper {program} failed with status {done.returncode}",
            hint=f"try it: echo {server} | {program} get",
        )
    try:
        return Fields(parse_object(done.stdout, program), f"the answer of {program}")
    except ImageError:
        raise ImageError(f"the credential helper {program} did not answer with JSON") from None


def _from_auths(config: Fields, registry: str, repository: str) -> Credentials | None:
    auths = config.object("auths")
    for key in _keys(auths, registry, repository):
        entry = auths.object(key)
        found = _read_entry(entry)
        if found is not None:
            return found
    return None


def _keys(auths: Fields, registry: str, repository: str) -> Iterator[str]:
    """Give the keys that mean this repository, the most exact first.

    Podman also has keys with the first parts of a repository; Docker's may be URLs.
    """
    parts = repository.split("/") if repository else []
    wanted = ["/".join([registry, *parts[:count]]) for count in range(len(parts), -1, -1)]
    for name in wanted:
        for key in auths.values:
            if _normalised(key) == name:
                yield key


def _normalised(key: str) -> str:
    scheme, is_url, rest = key.partition("://")
    if is_url and scheme in {"http", "https"}:
        # Docker's own keys end in the version of the interface.
        key = re.sub(r"/v[12]/?$", "", rest)
    host, slash, path = key.rstrip("/").partition("/")
    return (DOCKER_HUB if host in _HUB_NAMES else host.lower()) + slash + path


def _read_entry(entry: Fields) -> Credentials | None:
    username, password = entry.text("username"), entry.text("password")
    if encoded := entry.text("auth"):
        try:
            decoded = base64.b64decode(encoded, validate=True).decode().rstrip("\0")
        except ValueError:
            decoded = ""
        username, colon, password = decoded.partition(":")
        if not colon:
            # Without the value, which may be a password that somebody wrote as it is.
            raise ImageError(
                f"{entry.what}: auth is not NAME:PASSWORD in base64", hint="log in anew"
            )
    found = Credentials(
        username, password, entry.text("identitytoken"), entry.text("registrytoken")
    )
    return found if username or found.identity_token or found.registry_token else None
