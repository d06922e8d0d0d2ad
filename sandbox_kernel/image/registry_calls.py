"""Calls to a registry until they work: logins answered, passing failures waited out.

A failure is passing if the connection broke, or the server says so: 408, 429 and most of 5xx.
Everything that is read into memory is bounded.
"""

from __future__ import annotations

import email.utils
import errno
import json
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import httpx

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.parallel import Stopped
from sandbox_kernel.image.registry_auth import MAX_ANSWER_BYTES, Login
from sandbox_kernel.image.registry_http import Call, Transport

T = TypeVar("T")

MAX_ERROR_BYTES = 64 << 10
MAX_RENEWALS = 2
"""A token that just came may be refused once: clocks differ, and caches lag behind."""

_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_jitter = random.SystemRandom()


@dataclass(frozen=True)
class Patience:
    """How often and how long to try again; seconds."""

    attempts: int = 5
    """In a row, without a byte of progress."""
    attempts_in_all: int = 100
    first_delay_s: float = 0.5
    longest_delay_s: float = 20.0
    longest_asked_s: float = 120.0
    """The longest that a server may ask for; above this the user is told."""
    now_s: Callable[[], float] = time.time
    wait: Callable[[float], bool] | None = None
    """Waits, and tells whether to stop; by default on the event that ends the transfer."""


class Passing(Exception):  # noqa: N818 - what happened; nobody outside of a transfer sees it
    """A failure that may be gone the next time."""

    def __init__(self, reason: str, asked_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.asked_s = asked_s


class Attempts:
    """The count of failures of one thing."""

    def __init__(self, what: str, patience: Patience, stop: threading.Event) -> None:
        self._what = what
        self._patience = patience
        self._wait = patience.wait or stop.wait
        self._in_row = 0
        self._in_all = 0

    def progress(self) -> None:
        """Forget the failures in a row."""
        self._in_row = 0

    def failed(self, failure: Passing) -> None:
        """Wait before the next attempt; raises ImageError if there is none."""
        limits = self._patience
        self._in_row += 1
        self._in_all += 1
        if self._in_row >= limits.attempts or self._in_all >= limits.attempts_in_all:
            raise ImageError(
                f"{self._what}: {failure.reason}; tried {self._in_all} times",
                hint="try again later; what is there already is not fetched again",
            ) from failure
        delay_s = min(limits.first_delay_s * 2 ** (self._in_row - 1), limits.longest_delay_s)
        # Spread, so that a class that failed together does not come back together.
        delay_s *= 0.5 + _jitter.random() / 2
        if failure.asked_s is not None:
            delay_s = failure.asked_s
            if delay_s > limits.longest_asked_s:
                raise ImageError(
                    f"{self._what}: {failure.reason}, and asks to wait for {delay_s:.0f} s",
                    hint="log in, where that gives a higher limit, or try again later",
                ) from failure
        if self._wait(delay_s):
            raise Stopped


class Calls:
    """Sends calls to one registry for one transfer; threads share it."""

    def __init__(
        self, transport: Transport, login: Login, patience: Patience, stop: threading.Event
    ) -> None:
        self._transport = transport
        self._login = login
        self._patience = patience
        self._has_answered = False
        self.stop = stop

    def attempts(self, what: str) -> Attempts:
        """Give a new count for something that may be tried again."""
        return Attempts(what, self._patience, self.stop)

    def run(
        self, make: Callable[[], Call], use: Callable[[httpx.Response, Attempts], T], *good: int
    ) -> T:
        """Make a call and use its answer until that works; raises ImageError.

        `use` gets an answer with one of the statuses `good`, and may raise Passing too.
        """
        call = make()
        attempts = self.attempts(call.what)
        while True:
            try:
                return self.once(call, lambda response: use(response, attempts), *good)
            except Passing as failure:
                attempts.failed(failure)
            call = make()

    def once(self, call: Call, use: Callable[[httpx.Response], T], *good: int) -> T:
        """Make a call once, logging in where the registry asks; raises Passing and ImageError."""
        for _ in range(MAX_RENEWALS + 1):
            header = self._login.header if self._transport.is_own(call.url) else ""
            values: list[str] = []
            with self._guarded(call, header) as response:
                if response.status_code in good:
                    return use(response)
                if response.status_code != 401 or not self._transport.is_own(response.url):
                    raise self._failure(call, response)
                values = response.headers.get_list("WWW-Authenticate")
            self._login.renew(header, values, self._fetch)
        raise self._login.refused()

    def document(self, call: Call, limit_bytes: int, *good: int) -> tuple[httpx.Response, bytes]:
        """Make a call whose answer is read into memory; raises ImageError."""

        def use(response: httpx.Response, _: Attempts) -> tuple[httpx.Response, bytes]:
            return response, read_bounded(response, limit_bytes, call.what)

        return self.run(lambda: call, use, *good)

    def _guarded(self, call: Call, header: str) -> _Guard:
        if self.stop.is_set():
            raise Stopped
        return _Guard(self, self._transport, call, header)

    def _fetch(self, call: Call, authorization: str) -> tuple[int, bytes]:
        """Make a call to a token server."""
        attempts = self.attempts(call.what)
        while True:
            try:
                with self._guarded(call, authorization) as response:
                    if response.status_code in _PASSING:
                        raise self._failure(call, response)
                    return response.status_code, read_bounded(response, MAX_ANSWER_BYTES, call.what)
            except Passing as failure:
                attempts.failed(failure)

    def answered(self) -> None:
        """Remember that the registry is there."""
        self._has_answered = True

    def broken(self, call: Call, error: httpx.TransportError) -> Exception:
        """Give what a failure of a connection means: Passing, or an error at once."""
        if self.stop.is_set():
            return Stopped()
        host = call.url.netloc.decode("ascii", "replace")
        cause = _root_of(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ImageError(
                f"{call.what}: the certificate of {host} is not trusted: {cause.verify_message}",
                hint="name your own authority's certificate in SSL_CERT_FILE",
            )
        if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
            return ImageError(f"{call.what}: the request to {host} cannot be sent")
        if not self._has_answered and _is_hopeless(cause):
            return ImageError(
                f"{call.what}: {host} cannot be reached: {self._login.redact(_words(cause))}",
                hint="is the name right, and is the network up? Behind a proxy set HTTPS_PROXY",
            )
        return Passing(f"the connection to {host} broke: {self._login.redact(_words(cause))}")

    def _failure(self, call: Call, response: httpx.Response) -> Exception:
        """Give what a status means that is none of the good ones."""
        status, host = response.status_code, response.url.netloc.decode("ascii", "replace")
        said = self._login.redact(_said(response))
        reason = f"{host} answers {status}" + (f": {said}" if said else "")
        if status in _PASSING:
            return Passing(reason, self._asked_s(response.headers.get("Retry-After", "")))
        hints = {
            403: "the login that is used may not do this",
            404: "is the name right? Some registries answer so to who is not logged in, too",
        }
        return ImageError(f"{call.what}: {reason}", hint=hints.get(status, ""))

    def _asked_s(self, text: str) -> float | None:
        """Read a Retry-After header: seconds, or a date (RFC 9110, 10.2.3)."""
        if text.isascii() and text.isdigit():
            return float(text[:9])
        try:
            when_s = email.utils.parsedate_to_datetime(text).timestamp()
        except (ValueError, OverflowError):
            return None
        return max(0.0, when_s - self._patience.now_s())


class _Guard:
    """An open answer, whose failures are those of `Calls.broken`, also while it is read."""

    def __init__(self, calls: Calls, transport: Transport, call: Call, header: str) -> None:
        self._calls = calls
        self._call = call
        self._opened = transport.open(call, header)

    def __enter__(self) -> httpx.Response:
        try:
            response = self._opened.__enter__()
        except httpx.TransportError as error:
            raise self._calls.broken(self._call, error) from error
        self._calls.answered()
        return response

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, trace)
        if isinstance(error, httpx.TransportError):
            raise self._calls.broken(self._call, error) from error


def read_bounded(response: httpx.Response, limit_bytes: int, what: str) -> bytes:
    """Read a body as it was sent; raises ImageError if it is longer than the limit."""
    found = bytearray()
    for data in response.iter_raw():
        found += data
        if len(found) > limit_bytes:
            raise ImageError(
                f"{what}: {response.url.host} sends more than {limit_bytes} bytes",
                hint="nothing of this kind is as long",
            )
    return bytes(found)


def _said(response: httpx.Response) -> str:
    """Give the error code and message of a registry's answer, made fit to be shown."""
    raw = bytearray()
    try:
        for data in response.iter_raw():
            raw += data
            if len(raw) > MAX_ERROR_BYTES:
                return ""
        first = json.loads(raw)["errors"][0]
        text = f"{first.get('code', '')} {first.get('message', '')}"
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return "".join(c if c.isprintable() else " " for c in text)[:300].strip()


def _root_of(error: BaseException) -> BaseException:
    """Give the exception of the system below those of httpx and httpcore."""
    seen = error
    for _ in range(8):
        below = seen.__cause__ or seen.__context__
        if below is None or isinstance(seen, OSError):
            break
        seen = below
    return seen


def _is_hopeless(cause: BaseException) -> bool:
    if isinstance(cause, socket.gaierror):
        return cause.errno != socket.EAI_AGAIN
    return isinstance(cause, OSError) and cause.errno in {
        errno.ECONNREFUSED,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
    }


def _words(cause: BaseException) -> str:
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return "".join(c if c.isprintable() else " " for c in str(text))[:200]
