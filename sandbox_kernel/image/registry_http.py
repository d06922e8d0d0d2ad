"""HTTP to registries: who may be spoken to and how, and redirects under that policy.

A registry answers with URLs: where to get a token, a blob, where to send one. They are hostile
input. They may not lead from TLS to plain HTTP, nor from elsewhere to this machine's own
services or those of a cloud for its machines, and an Authorization header never follows them
to another origin.
"""

from __future__ import annotations

import contextlib
import http.cookiejar
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import httpx

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.reference import DOCKER_HUB

MAX_REDIRECTS = 5
MAX_URL_LENGTH = 16 << 10
CONNECT_TIMEOUT_S = 15.0
READ_TIMEOUT_S = 60.0
"""The longest silence; a stream that goes on may take as long as it likes."""

_HUB_HOST = "registry-1.docker.io"
_METADATA = frozenset(
    {
        "metadata.google.internal",
        "metadata",
        "100.100.100.200",
        "fd00:ec2::254",
    }
)
"""Where clouds tell a machine its secrets; the usual address is link-local."""
_HOST = re.compile(rb"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_KEEPS_METHOD = frozenset({307, 308})


@dataclass(frozen=True)
class Call:
    """One request, of which the body can be sent again."""

    method: str
    url: httpx.URL
    what: str
    """What it is about, in the words of an error."""
    headers: tuple[tuple[str, str], ...] = ()
    body: Callable[[], Iterable[bytes]] | None = None
    length_bytes: int = 0
    """The length of the body."""


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine by its very name; nothing is looked up."""
    name = host.lower().rstrip(".").strip("[]")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and address.is_loopback


def is_off_limits(host: str) -> bool:
    """Tell whether a registry may not send us to this host: loopback, link-local, metadata."""
    name = host.lower().rstrip(".").strip("[]")
    address = _address(name)
    if address is None:
        return is_loopback(name) or name in _METADATA
    return (
        address.is_loopback
        or address.is_link_local
        or address.is_unspecified
        or address.is_multicast
        or str(address) in _METADATA
    )


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        try:
            # What the resolver takes too: 127.1, 0x7f000001, 2130706433.
            address = ipaddress.IPv4Address(socket.inet_aton(name))
        except (OSError, ValueError):
            return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def origin_of(url: httpx.URL) -> tuple[str, str, int]:
    """Give scheme, host and port of a URL."""
    return url.scheme, url.host.lower(), url.port or {"http": 80, "https": 443}.get(url.scheme, 0)


class Transport:
    """A pool of connections to one registry and to where it sends us."""

    def __init__(self, registry: str, *, insecure: bool = False) -> None:
        """Connect to nothing yet; `insecure` asks for plain HTTP."""
        host = _HUB_HOST if registry == DOCKER_HUB else registry
        self._registry = registry
        self._insecure = insecure
        self._is_local = is_loopback(httpx.URL(f"https://{host}").host)
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._aborted = False
        self._client = _client(trust_env=not self._is_local)
        try:
            self.base = httpx.URL(f"{self._scheme(host)}://{host}/v2/")
        except BaseException:  # whatever it is, nobody else closes it
            self._client.close()
            raise

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def abort(self) -> None:
        """Wake every thread that waits for an answer; it gets an error of the connection."""
        with self._lock:
            self._aborted = True
            for one in self._sockets:
                _shut(one)

    def join(self, url: httpx.URL, location: str, what: str) -> httpx.URL:
        """Give the URL that an answer from `url` points to; raises ImageError if it may not."""
        if not location or len(location) > MAX_URL_LENGTH:
            raise ImageError(f"{what}: {url.host} answers without a usable Location")
        try:
            found = url.join(location)
        except (httpx.InvalidURL, ValueError):
            raise ImageError(f"{what}: {url.host} answers with a broken Location") from None
        self.check(found, what)
        return found

    def check(self, url: httpx.URL, what: str) -> None:
        """Refuse a URL of the registry's that is against the policy; raises ImageError."""
        shown = f"{url.scheme}://{url.netloc.decode('ascii', 'replace').rpartition('@')[2]}"
        # httpx makes a name of whatever stands there, `%5B` of a bracket.
        if not _HOST.fullmatch(url.raw_host) or not 0 < (url.port or 443) < 65536:
            raise ImageError(f"{what}: {self._registry} leads to a URL with a broken host")
        if url.scheme not in {"http", "https"}:
            raise ImageError(
                f"{what}: {self._registry} leads to {shown[:200]}, which is neither https nor http"
            )
        if url.userinfo:
            raise ImageError(f"{what}: {self._registry} leads to a URL with a login in it")
        if is_off_limits(url.host) and not (self._is_local and is_loopback(url.host)):
            raise ImageError(
                f"{what}: {self._registry} leads to {shown}, an address inside of this machine "
                "or its cloud",
                hint="if it is a registry of yours, fix the address that it announces",
            )
        if url.scheme == "http" and not self.may_be_plain(url):
            raise ImageError(
                f"{what}: {self._registry} leads to {shown}, which is plain HTTP",
                hint="if it is a registry of yours, fix the address that it announces",
            )

    def may_be_plain(self, url: httpx.URL) -> bool:
        """Tell whether plain HTTP may be spoken to a URL."""
        return self._insecure or (self._is_local and is_loopback(url.host))

    def is_own(self, url: httpx.URL) -> bool:
        """Tell whether a URL is at the registry itself, which may see its login."""
        return origin_of(url) == origin_of(self.base)

    @contextlib.contextmanager
    def open(self, call: Call, authorization: str = "") -> Iterator[httpx.Response]:
        """Send a call, follow its redirects, and give the answer, its body still to be read.

        Raises httpx.TransportError if a connection fails, and ImageError for a redirect that is
        against the policy.
        """
        start = call.url
        for _ in range(MAX_REDIRECTS + 1):
            same = origin_of(call.url) == origin_of(start)
            response = self._send(call, authorization if same else "")
            own = self._note(response)
            try:
                if response.status_code not in _REDIRECTS:
                    yield response
                    return
                call = self._redirected(call, response)
            finally:
                response.close()
                self._forget(own)
        raise ImageError(f"{call.what}: {start.host} redirects more than {MAX_REDIRECTS} times")

    def _send(self, call: Call, authorization: str) -> httpx.Response:
        headers = list(call.headers)
        if authorization:
            headers.append(("Authorization", authorization))
        if call.body is not None:
            headers.append(("Content-Length", str(call.length_bytes)))
        request = self._client.build_request(
            call.method,
            call.url,
            headers=headers,
            content=call.body() if call.body is not None else None,
        )
        return self._client.send(request, stream=True)

    def _redirected(self, call: Call, response: httpx.Response) -> Call:
        status = response.status_code
        if call.method not in {"GET", "HEAD"} and status not in _KEEPS_METHOD:
            raise ImageError(f"{call.what}: {call.url.host} answers {status} to {call.method}")
        url = self.join(call.url, response.headers.get("Location", ""), call.what)
        return Call(call.method, url, call.what, call.headers, call.body, call.length_bytes)

    def _note(self, response: httpx.Response) -> socket.socket | None:
        stream = response.extensions.get("network_stream")
        found = stream.get_extra_info("socket") if stream is not None else None
        if found is not None:
            with self._lock:
                self._sockets.add(found)
                # Its answer came while the others were woken.
                if self._aborted:
                    _shut(found)
        return found

    def _forget(self, own: socket.socket | None) -> None:
        if own is not None:
            with self._lock:
                self._sockets.discard(own)

    def _scheme(self, host: str) -> str:
        """Say what the registry speaks: TLS, unless asked otherwise, or on loopback as it is."""
        if self._insecure:
            return "http"
        if not self._is_local:
            return "https"
        call = Call("GET", httpx.URL(f"http://{host}/v2/"), f"registry {self._registry}")
        try:
            # A server of TLS answers 400, or closes the connection.
            return "https" if self._send_closed(call) == 400 else "http"
        except httpx.RemoteProtocolError:
            return "https"
        except httpx.TransportError:
            # Nobody is there, which the first true request will say.
            return "http"

    def _send_closed(self, call: Call) -> int:
        response = self._send(call, "")
        response.close()
        return response.status_code


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


def _client(*, trust_env: bool) -> httpx.Client:
    # No cookie is kept: one server's must not reach another, and none is needed.
    cookies = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    try:
        verify = httpx.create_ssl_context()
        # What the system trusts beside httpx's own list; OpenSSL reads SSL_CERT_FILE too.
        verify.load_default_certs()
        return httpx.Client(
            verify=verify,
            trust_env=trust_env,
            cookies=cookies,
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=None),
            headers={
                "User-Agent": "sandbox-kernel",
                # A blob is verified as it comes: nobody on the way shall pack it again.
                "Accept-Encoding": "identity",
            },
        )
    except (OSError, ImportError, ValueError, httpx.InvalidURL) as error:
        raise ImageError(
            f"the network settings of the environment cannot be used: {error}",
            hint="see SSL_CERT_FILE, SSL_CERT_DIR, HTTPS_PROXY, HTTP_PROXY and ALL_PROXY",
        ) from error
