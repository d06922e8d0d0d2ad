"""Push to a registry on loopback that breaks, lies and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.credentials import Credentials
from sandbox_kernel.image.documents import (
    OCI_MANIFEST,
    digest_of,
)
from sandbox_kernel.image.stored_image import StoredImage
from sandbox_kernel.image.transfer import push
from tests.fakes.registry import FakeImage, FakeRegistry, Handler
from tests.fakes.registry_bench import SECRET, Bench, answers, blobs_of, opened, two_layers


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with opened(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def image(bench: Bench) -> FakeImage:
    return two_layers(bench)


@pytest.fixture(params=["Bearer", "Basic"])
def guarded(bench: Bench, image: FakeImage, request: pytest.FixtureRequest) -> Bench:
    bench.registry.scheme = request.param
    bench.registry.password = f"me:{SECRET}"
    bench.login = Credentials("me", SECRET)
    return bench


@pytest.fixture
def stored(bench: Bench, image: FakeImage) -> StoredImage:
    found = bench.pull()
    bench.registry.requests.clear()
    return found


def forget(bench: Bench) -> None:
    """Let the registry have nothing."""
    bench.registry.blobs.clear()
    bench.registry.repositories.clear()


def test_push_sends_what_is_missing(bench: Bench, stored: StoredImage, image: FakeImage) -> None:
    present = blobs_of(image)[0]
    forget(bench)
    bench.registry.blobs[present] = image.blobs[present]
    assert bench.push(stored) == digest_of(image.raw)
    assert bench.registry.blobs == image.blobs
    assert bench.registry.manifests["team/copy:1"] == (image.raw, OCI_MANIFEST)
    notes = dict.fromkeys(image.blobs, "pushed") | {present: "exists"}
    assert bench.log.notes == notes
    for digest in image.blobs.keys() - {present}:
        assert bench.log.bytes[digest] == len(image.blobs[digest])


def test_push_mounts_from_where_it_was_pulled(
    bench: Bench, stored: StoredImage, image: FakeImage
) -> None:
    bench.registry.blobs.clear()
    bench.push(stored)
    assert set(bench.log.notes.values()) == {"mounted"}
    assert bench.registry.asked("PUT", "blobs") == bench.registry.asked("PATCH", "blobs") == []


def test_push_logs_in(guarded: Bench, image: FakeImage) -> None:
    stored = guarded.pull()
    forget(guarded)
    guarded.registry.requests.clear()
    guarded.registry.tokens.clear()
    guarded.push(stored)
    if guarded.registry.scheme == "Bearer":
        params = httpx.URL(guarded.registry.asked("GET", "^/token")[0].path).params
        assert params.get_list("scope") == [
            "repository:team/copy:pull,push",
            "repository:team/app:pull",
        ]


def test_a_token_that_ends_while_a_blob_goes_up(
    bench: Bench, stored: StoredImage, image: FakeImage
) -> None:
    bench.registry.password = f"me:{SECRET}"
    bench.registry.uses_per_token = 1
    bench.login = Credentials("me", SECRET)
    forget(bench)
    assert bench.push(stored, parallel=1, chunk_bytes=400) == digest_of(image.raw)
    assert bench.registry.blobs == image.blobs


def test_a_large_blob_goes_up_in_chunks(
    bench: Bench, stored: StoredImage, image: FakeImage
) -> None:
    forget(bench)
    bench.push(stored, chunk_bytes=400)
    big = blobs_of(image)[1]
    assert bench.registry.blobs[big] == image.blobs[big]
    assert bench.log.bytes[big] == len(image.blobs[big])
    ranges = [one.headers["content-range"] for one in bench.registry.asked("PATCH", "")]
    assert "0-399" in ranges
    assert "400-799" in ranges


def test_a_chunk_that_broke_is_sent_from_where_it_was(
    bench: Bench, stored: StoredImage, image: FakeImage
) -> None:
    forget(bench)
    big = blobs_of(image)[1]

    def half(handler: Handler) -> None:
        upload = handler.path.rpartition("/")[2].partition("?")[0]
        bench.registry.uploads[upload] += handler.rfile.read(150)
        handler.hang_up()

    bench.registry.rule("PATCH", "uploads", half)
    bench.push(stored, chunk_bytes=400, parallel=1)
    assert bench.registry.blobs[big] == image.blobs[big]
    assert bench.log.bytes[big] == len(image.blobs[big]), "no byte is told twice"
    ranges = [one.headers["content-range"] for one in bench.registry.asked("PATCH", "")]
    assert ranges[:2] == ["0-399", "150-549"]


def test_an_upload_that_was_forgotten_is_begun_anew(
    bench: Bench, stored: StoredImage, image: FakeImage
) -> None:
    forget(bench)

    def lose(handler: Handler) -> None:
        handler.body()
        bench.registry.uploads.clear()
        handler.answer(500)

    bench.registry.rule("PATCH", "uploads", lose)
    bench.push(stored, chunk_bytes=400, parallel=1)
    assert bench.registry.blobs == image.blobs


def test_a_registry_without_chunks_gets_the_whole_blob(
    bench: Bench, stored: StoredImage, image: FakeImage
) -> None:
    forget(bench)
    bench.registry.rule("PATCH", "uploads", answers(405), times=0)
    bench.push(stored, chunk_bytes=400)
    assert bench.registry.blobs == image.blobs


def test_a_whole_blob_that_broke_is_sent_again(
    bench: Bench, stored: StoredImage, image: FakeImage
) -> None:
    forget(bench)
    bench.registry.rule("PUT", "uploads", answers(503), times=2)
    bench.push(stored)
    assert bench.registry.blobs == image.blobs
    assert len(bench.waits) == 2


def test_a_manifest_that_the_registry_changed(
    bench: Bench, stored: StoredImage, image: FakeImage
) -> None:
    lie = "sha256:" + "2" * 64
    bench.registry.rule("PUT", "manifests", answers(201, docker_content_digest=lie))
    with pytest.raises(ImageError, match=f"took {lie}"):
        bench.push(stored)


def test_a_push_that_is_not_allowed(bench: Bench, stored: StoredImage) -> None:
    forget(bench)
    said = b'{"errors":[{"code":"DENIED","message":"requested access is denied"}]}'
    bench.registry.rule("POST", "uploads", answers(403, said), times=0)
    with pytest.raises(ImageError, match="DENIED requested access is denied"):
        bench.push(stored)
    assert bench.registry.asked("PUT", "manifests") == []


@pytest.mark.parametrize(
    "location", ["http://cdn.example.com/u", "https://169.254.169.254/u", "", "https://["]
)
def test_an_upload_is_not_sent_just_anywhere(
    bench: Bench, stored: StoredImage, location: str
) -> None:
    forget(bench)
    bench.registry.rule("POST", "uploads", answers(202, location=location), times=0)
    with pytest.raises(ImageError, match=r"leads to|Location"):
        bench.push(stored)
    assert bench.registry.asked("PUT", "") == []


def test_an_upload_to_another_host_goes_without_the_login(guarded: Bench, image: FakeImage) -> None:
    stored = guarded.pull()
    forget(guarded)
    storage = FakeRegistry()
    try:
        storage.rule("PUT", "/up", answers(201), times=0)
        guarded.registry.elsewhere = storage.host
        guarded.push(stored)
        assert len(storage.requests) == 3
        for request in storage.requests:
            assert request.authorization == ""
            assert request.path.startswith("/up?signature=a%2Fb&digest=sha256:")
    finally:
        storage.close()


def test_a_digest_that_the_image_has_not(bench: Bench, stored: StoredImage) -> None:
    reference = bench.registry.reference(version="@sha256:" + "3" * 64)
    with pytest.raises(ImageError, match="name a tag instead"):
        push(reference, stored, bench.store, bench.log, bench.options)
