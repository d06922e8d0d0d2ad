"""Logging in to a registry: its challenge, and the token or the password that answers it.

Source: distribution's token authentication (auth/token, auth/oauth), RFC 9110 section 11. The
challenge comes from the network before anything is proved: it is bounded and checked.
"""

from __future__ import annotations

import re
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.credentials import Credentials
from sandbox_kernel.image.fields import Fields, parse_object
from sandbox_kernel.image.registry_http import Call, Transport, is_loopback

MAX_CHALLENGE_LENGTH = 8 << 10
MAX_PARAMETERS = 32
MAX_ANSWER_BYTES = 1 << 20
MAX_TOKEN_LENGTH = 64 << 10

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"({_WORD})(?:\s+|\s*,\s*|$)")
_PARAMETER = re.compile(rf'({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))\s*(?:,\s*|$)')
_SENDABLE = re.compile(r"[\x21-\x7e]+")
_CLIENT = "sandbox-kernel"


@dataclass(frozen=True)
class Challenge:
    """One way to log in that a server offers."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(values: Sequence[str]) -> tuple[Challenge, ...]:
    """Read `WWW-Authenticate` headers; raises ImageError for what is none."""
    found: list[tuple[str, dict[str, str]]] = []
    for value in values:
        if len(value) > MAX_CHALLENGE_LENGTH:
            raise ImageError(f"a challenge has {len(value)} characters")
        position = 0
        text = value.strip()
        while position < len(text):
            # A parameter first: `realm="x"` is no scheme.
            if found and (match := _PARAMETER.match(text, position)):
                quoted = match[2]
                plain = match[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                found[-1][1].setdefault(match[1].lower(), plain)
            elif match := _SCHEME.match(text, position):
                found.append((match[1].lower(), {}))
            else:
                raise ImageError("a challenge cannot be understood")
            position = match.end()
            if len(found) + sum(len(one) for _, one in found) > MAX_PARAMETERS:
                raise ImageError(f"a challenge has more than {MAX_PARAMETERS} parts")
    return tuple(Challenge(scheme, parameters) for scheme, parameters in found)


Fetch = Callable[[Call, str], tuple[int, bytes]]
"""Sends a call with an Authorization header, tries again, and gives status and bounded body."""


class Login:
    """The Authorization header for one registry and some scopes; threads share it."""

    def __init__(
        self,
        registry: str,
        scopes: tuple[str, ...],
        transport: Transport,
        find: Callable[[], Credentials | None],
    ) -> None:
        """Know nothing yet: `find` gives the user's credentials when a server asks."""
        self._registry = registry
        self._scopes = scopes
        self._transport = transport
        self._find = find
        self._found: Credentials | None = None
        self._has_looked = False
        self._header = ""
        self._past: set[str] = set()
        self._lock = threading.Lock()

    @property
    def header(self) -> str:
        """The value to send with the next request; empty before anybody asked."""
        return self._header

    def redact(self, text: str) -> str:
        """Take out of a text of the server's whatever must not be shown."""
        secrets = set(self._found.secrets if self._found else ()) | self._past
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def renew(self, used: str, values: Sequence[str], fetch: Fetch) -> None:
        """Answer a 401 to a request that was sent with the header `used`; raises ImageError.

        Where another thread has done so in the meantime, its header is the answer.
        """
        with self._lock:
            if used != self._header:
                return
            try:
                challenges = parse_challenges(values)
            except ImageError as error:
                raise ImageError(f"registry {self._registry}: {error.message}") from None
            if not self._has_looked:
                self._found = self._find()
                self._has_looked = True
            header = self._answer(challenges, fetch)
            self._past.add(header.partition(" ")[2])
            self._header = header

    def refused(self) -> ImageError:
        """Give the error for a server that asks again after all was tried."""
        if self._found is None:
            return self._needs_login()
        return ImageError(
            f"registry {self._registry} refuses the login that is kept for it",
            hint=f"log in anew: docker login {self._registry}",
        )

    def _needs_login(self) -> ImageError:
        return ImageError(
            f"registry {self._registry} wants a login for {self._named()}",
            hint=f"is the name right? Then log in: docker login {self._registry}, or podman or "
            "skopeo login",
        )

    def _named(self) -> str:
        return ", ".join(scope.split(":")[1] for scope in self._scopes)

    def _answer(self, challenges: tuple[Challenge, ...], fetch: Fetch) -> str:
        if self._found is not None and self._found.registry_token:
            return f"Bearer {self._sendable(self._found.registry_token)}"
        by_scheme = {one.scheme: one.parameters for one in reversed(challenges)}
        if "bearer" in by_scheme and by_scheme["bearer"].get("realm"):
            return f"Bearer {self._token(by_scheme['bearer'], fetch)}"
        if "basic" in by_scheme:
            if self._found is None or not self._found.basic:
                raise self._needs_login()
            return self._found.basic
        offered = ", ".join(sorted(by_scheme))[:200] or "none"
        raise ImageError(
            f"registry {self._registry} wants a login of a kind that is not known here",
            hint=f"it offers {offered}; known are Bearer and Basic",
        )

    def _token(self, parameters: Mapping[str, str], fetch: Fetch) -> str:
        url = self._realm(parameters["realm"])
        what = f"token for {self._named()}"
        if self._found is not None and self._found.identity_token:
            call, authorization = self._exchange(url, parameters, what), ""
        else:
            call = Call("GET", self._asked(url, parameters), what)
            authorization = self._found.basic if self._found else ""
        status, body = fetch(call, authorization)
        if status in {400, 401, 403}:
            raise self.refused()
        if status != 200:
            raise ImageError(f"{what}: the token server {url.host} answers {status}")
        return self._read(body, url.host)

    def _realm(self, text: str) -> httpx.URL:
        what = f"registry {self._registry}: the token server"
        try:
            url = httpx.URL(text)
        except (httpx.InvalidURL, ValueError):
            raise ImageError(f"{what} has a broken URL") from None
        self._transport.check(url, what)
        # Where plain HTTP was asked for, it was for the registry, not for whom it names.
        is_plain = url.scheme == "http"
        if is_plain and not is_loopback(url.host) and url.host != self._transport.base.host:
            raise ImageError(
                f"{what} is at http://{url.host}: a login would cross the net in the open",
                hint="the registry must name a token server that speaks TLS",
            )
        return url

    def _asked(self, url: httpx.URL, parameters: Mapping[str, str]) -> httpx.URL:
        pairs = [("scope", scope) for scope in self._scopes]
        if service := parameters.get("service"):
            pairs.insert(0, ("service", service))
        query = url.query.decode("ascii", "replace")
        asked = urllib.parse.urlencode(pairs)
        return url.copy_with(query=f"{query}&{asked}".lstrip("&").encode())

    def _exchange(self, url: httpx.URL, parameters: Mapping[str, str], what: str) -> Call:
        assert self._found is not None  # noqa: S101 - the caller looked
        form = {
            "grant_type": "refresh_token",
            "service": parameters.get("service", ""),
            "client_id": _CLIENT,
            "scope": " ".join(self._scopes),
            "refresh_token": self._found.identity_token,
        }
        body = urllib.parse.urlencode(form).encode()
        headers = (("Content-Type", "application/x-www-form-urlencoded"),)
        return Call("POST", url, what, headers, lambda: [body], len(body))

    def _read(self, body: bytes, host: str) -> str:
        what = f"the answer of the token server {host}"
        try:
            fields = Fields(parse_object(body, what), what)
            token = fields.text("token") or fields.text("access_token")
        except ImageError:
            # The cause might quote the token.
            raise ImageError(f"{what} is not what it should be") from None
        if not token:
            raise ImageError(f"{what} has no token")
        return self._sendable(token)

    def _sendable(self, token: str) -> str:
        if len(token) > MAX_TOKEN_LENGTH or not _SENDABLE.fullmatch(token):
            raise ImageError(f"the token for registry {self._registry} cannot be sent in a header")
        return token
