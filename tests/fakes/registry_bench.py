"""What tests of pull and push share: a registry that lies, a store, waits that are not waited."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.credentials import Credentials
from sandbox_kernel.image.documents import digest_of, render_json
from sandbox_kernel.image.registry import RegistryOptions
from sandbox_kernel.image.registry_calls import Patience
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage
from sandbox_kernel.image.transfer import pull, push
from tests.fakes.registry import FakeImage, FakeRegistry, Handler, layer

SECRET = "s3cr3t-password"
BIG = bytes(range(256)) * 1024
"""What gzip does not make small enough for one packet."""
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


class Log:
    """Progress as a list, by blob."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.notes: dict[str, str] = {}
        self.threads: set[int] = set()

    def started(self, digest: str, total_bytes: int) -> None:
        self.totals[digest] = total_bytes
        self.threads.add(threading.get_ident())

    def advanced(self, digest: str, count_bytes: int) -> None:
        assert count_bytes > 0
        self.bytes[digest] = self.bytes.get(digest, 0) + count_bytes

    def finished(self, digest: str, note: str) -> None:
        self.notes[digest] = note


class Bench:
    """A registry, a store, and a patience whose waits are noted and not waited."""

    def __init__(self, registry: FakeRegistry, store: Store) -> None:
        self.registry = registry
        self.store = store
        self.waits: list[float] = []
        self.log = Log()
        patience = Patience(now_s=lambda: 1_000_000.0, wait=self._wait)
        self.options = RegistryOptions(
            patience=patience, credentials=lambda registry, repository: self.login
        )
        self.login: Credentials | None = None

    def _wait(self, delay_s: float) -> bool:
        self.waits.append(delay_s)
        return False

    def pull(self, version: str = ":1", **options: object) -> StoredImage:
        self.log = Log()
        reference = self.registry.reference(version=version)
        return pull(reference, self.store, self.log, replace(self.options, **options))  # type: ignore[arg-type]

    def push(self, image: StoredImage, name: str = "team/copy", **options: object) -> str:
        self.log = Log()
        reference = self.registry.reference(name)
        return push(reference, image, self.store, self.log, replace(self.options, **options))  # type: ignore[arg-type]

    def refuses(self, says: str, version: str = ":1", **options: object) -> ImageError:
        """Pull, and check the error, and that nothing of the image has a name afterwards."""
        with pytest.raises(ImageError) as caught:
            self.pull(version, **options)
        assert says in str(caught.value)
        assert SECRET not in str(caught.value)
        assert self.store.images() == ()
        return caught.value

    def kept(self, image: FakeImage) -> set[str]:
        return {digest for digest in image.blobs if self.store.has_blob(digest)}


@contextlib.contextmanager
def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Give a bench, in an environment without settings of the network."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    registry = FakeRegistry()
    try:
        with Store.open(folder / "store") as store:
            yield Bench(registry, store)
    finally:
        registry.close()


def two_layers(bench: Bench) -> FakeImage:
    """Let the registry have an image with a small and a larger layer."""
    made = FakeImage((layer(("a", b"a" * 5000)), layer(("b", BIG), ("c", b""))))
    bench.registry.put(made)
    return made


def answers(status: int, body: bytes = b"", **headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.body()
        handler.answer(status, body, **headers)

    return answer


def cut(data: bytes, after: int, **headers: str) -> Callable[[Handler], None]:
    """Announce all of some data, send a part, and hang up."""

    def answer(handler: Handler) -> None:
        handler.begin(206 if headers else 200, len(data), **headers)
        handler.wfile.write(data[:after])
        handler.hang_up()

    return answer


def blobs_of(image: FakeImage) -> tuple[str, ...]:
    return tuple(digest_of(one) for one in image.packed)


def document(image: FakeImage, **changes: object) -> bytes:
    """Give the image's manifest with other fields."""
    return render_json({**image.document, **changes})
