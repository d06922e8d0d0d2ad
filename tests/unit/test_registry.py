"""Pull from a registry on loopback: what comes, what is chosen, what is a lie."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import (
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Platform,
    digest_of,
)
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.transfer import pull
from tests.fakes.registry import FakeImage, Handler, index_of, layer
from tests.fakes.registry_bench import Bench, Log, answers, blobs_of, document, opened, two_layers


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with opened(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def image(bench: Bench) -> FakeImage:
    return two_layers(bench)


def test_pull_brings_documents_and_layers_as_they_are(bench: Bench, image: FakeImage) -> None:
    pulled = bench.pull()
    assert pulled.reference == bench.registry.reference()
    assert pulled.digest == digest_of(image.raw)
    assert bench.store.resolve(f"{bench.registry.host}/team/app:1").manifest == image.manifest
    for digest, data in image.blobs.items():
        assert bench.store.read_blob(digest) == data
        assert bench.log.totals[digest] == bench.log.bytes[digest] == len(data)
        assert bench.log.notes[digest] == "pulled"
    accepted = bench.registry.asked("GET", "manifests")[0].headers["accept"]
    assert accepted.split(", ") == [OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST]
    assert bench.waits == []


def test_what_is_there_is_not_fetched_again(bench: Bench, image: FakeImage) -> None:
    bench.pull()
    bench.registry.requests.clear()
    assert bench.pull().digest == digest_of(image.raw)
    assert set(bench.log.notes.values()) == {"exists"}
    assert [one.method for one in bench.registry.requests if "team" in one.path] == ["HEAD"]


def test_a_digest_that_is_there_needs_no_registry(bench: Bench, image: FakeImage) -> None:
    bench.pull()
    bench.registry.requests.clear()
    pinned = bench.pull(f"@{digest_of(image.raw)}")
    assert pinned.digest == digest_of(image.raw)
    assert bench.registry.requests == []


def test_only_the_layer_that_changed_is_fetched(bench: Bench, image: FakeImage) -> None:
    bench.pull()
    changed = FakeImage((*image.layers, layer(("d", b"d"))))
    bench.registry.put(changed)
    bench.pull()
    pulled = {digest for digest, note in bench.log.notes.items() if note == "pulled"}
    assert pulled == {blobs_of(changed)[2], digest_of(changed.config)}


def test_a_layer_that_is_there_twice_comes_once(bench: Bench) -> None:
    twice = layer(("x", b"x"))
    bench.registry.put(FakeImage((twice, twice)))
    assert len(bench.pull().manifest.layers) == 2
    assert len(bench.registry.asked("GET", "/blobs/")) == 2


def test_layers_come_four_at_once(bench: Bench) -> None:
    image = FakeImage(tuple(layer((str(number), b"x")) for number in range(4)))
    bench.registry.put(image)
    meeting = threading.Barrier(4, timeout=20)
    for digest in blobs_of(image):

        def answer(handler: Handler, digest: str = digest) -> None:
            # Passed only if all four are asked for before one is answered.
            meeting.wait()
            handler.answer(200, image.blobs[digest])

        bench.registry.rule("GET", digest, answer)
    bench.pull()
    assert not meeting.broken


def test_two_pullers_wait_for_one(bench: Bench, image: FakeImage, tmp_path: Path) -> None:
    first, asked = blobs_of(image)[1], threading.Event()
    go_on = threading.Event()

    def slowly(handler: Handler) -> None:
        asked.set()
        assert go_on.wait(20)
        handler.answer(200, image.blobs[first])

    bench.registry.rule("GET", first, slowly, times=0)
    waiting = threading.Event()

    class Second(Store):
        def locked(self, name, on_wait=None):  # type: ignore[no-untyped-def]
            return super().locked(name, on_wait=waiting.set)

    second_log, failures = Log(), []

    def run(store: Store, log: Log) -> None:
        try:
            pull(bench.registry.reference(), store, log, bench.options)
        except BaseException as error:
            failures.append(error)

    second = Second(tmp_path / "store")
    threads = [threading.Thread(target=run, args=(bench.store, bench.log))]
    threads[0].start()
    assert asked.wait(20)
    threads.append(threading.Thread(target=run, args=(second, second_log)))
    threads[1].start()
    assert waiting.wait(20)
    go_on.set()
    for thread in threads:
        thread.join(20)
    second.close()
    assert failures == []
    assert (bench.log.notes[first], second_log.notes[first]) == ("pulled", "exists")
    assert len(bench.registry.asked("GET", first)) == 1


def test_a_damaged_document_is_fetched_again(bench: Bench, image: FakeImage) -> None:
    bench.pull()
    for digest in (digest_of(image.raw), digest_of(image.config)):
        path = bench.store.folder / "blobs/sha256" / digest.partition(":")[2]
        path.chmod(0o600)
        path.write_bytes(b"{}")
    again = bench.pull(f"@{digest_of(image.raw)}")
    assert again.config.diff_ids == tuple(digest_of(one) for one in image.layers)
    assert bench.store.read_blob(digest_of(image.raw)) == image.raw


def test_an_index_gives_the_wanted_platform(bench: Bench) -> None:
    images = [
        FakeImage((layer((name, b"x")),), Platform.parse(name))
        for name in ("linux/amd64", "linux/arm/v6", "linux/arm/v7", "windows/amd64")
    ]
    attestation = replace(images[0].entry(), platform=Platform("unknown", "unknown"))
    for one in images:
        bench.registry.put(one, tag=digest_of(one.raw))
    raw = index_of(attestation, *(one.entry() for one in images))
    bench.registry.put_document(raw, OCI_INDEX)
    wanted = Platform.parse("linux/arm/v7")
    assert bench.pull(platform=wanted).digest == digest_of(images[2].raw)
    bench.registry.requests.clear()
    # The index was kept: its digest tells that nothing is new.
    assert bench.pull(platform=wanted).digest == digest_of(images[2].raw)
    assert bench.registry.asked("GET", "manifests") == []


def test_an_index_without_the_platform_says_what_it_has(bench: Bench) -> None:
    raw = index_of(FakeImage((), Platform.parse("linux/s390x")).entry())
    bench.registry.put_document(raw, OCI_INDEX)
    error = bench.refuses("no image for plan9/mips", platform=Platform("plan9", "mips"))
    assert "linux/s390x" in error.hint
    assert str(bench.registry.reference()) in error.message


def test_an_index_in_an_index_is_followed_and_bounded(bench: Bench, image: FakeImage) -> None:
    entry = image.entry()
    for depth in range(1, 5):
        raw = index_of(entry)
        bench.registry.put_document(raw, OCI_INDEX, tag=f"deep{depth}")
        entry = Descriptor(OCI_INDEX, digest_of(raw), len(raw), Platform.host())
    assert bench.pull(":deep3").digest == digest_of(image.raw)
    with pytest.raises(ImageError, match="more than 3 indexes lie in each other"):
        bench.pull(":deep4")


def test_an_index_that_leads_to_itself_ends_at_its_digest(bench: Bench) -> None:
    entry = Descriptor(OCI_INDEX, "sha256:" + "0" * 64, 500, Platform.host())
    raw = index_of(entry)
    bench.registry.rule("GET", "manifests", answers(200, raw, content_type=OCI_INDEX), times=0)
    bench.refuses(f"has the digest {digest_of(raw)}, not {entry.digest}")


def test_an_image_of_another_machine_is_refused(bench: Bench) -> None:
    bench.registry.put(FakeImage((layer(),), Platform("linux", "s390x")))
    bench.refuses("was made for linux/s390x")
    assert bench.pull(platform=Platform("linux", "s390x")).config.platform.architecture == "s390x"


def test_a_manifest_that_is_not_what_was_asked_for(bench: Bench, image: FakeImage) -> None:
    wanted = digest_of(image.raw)
    other = document(image, annotations={"a": "b"})
    bench.registry.rule("GET", "manifests", answers(200, other, content_type=OCI_MANIFEST))
    bench.refuses(f"has the digest {digest_of(other)}, not {wanted}", f"@{wanted}")


def test_a_manifest_that_is_not_what_the_header_says(bench: Bench, image: FakeImage) -> None:
    lie = "sha256:" + "1" * 64
    headers = {"content_type": OCI_MANIFEST, "docker_content_digest": lie}
    bench.registry.rule("GET", "manifests", answers(200, image.raw, **headers))
    bench.refuses(f"not {lie}")


def test_a_layer_with_another_content(bench: Bench, image: FakeImage) -> None:
    digest = blobs_of(image)[0]
    other = bytes(len(image.blobs[digest]))
    bench.registry.rule("GET", digest, answers(200, other), times=0)
    error = bench.refuses("the digest does not match")
    assert digest in str(error)
    assert len(bench.registry.asked("GET", digest)) == 1, "a lie is not asked for again"
    assert not bench.store.has_blob(digest)


def test_a_layer_that_is_announced_longer(bench: Bench, image: FakeImage) -> None:
    digest = blobs_of(image)[0]
    bench.registry.rule("GET", digest, answers(200, image.blobs[digest] + b"x"))
    bench.refuses(f"{digest} is announced with {len(image.blobs[digest]) + 1} bytes")


def test_a_layer_that_goes_on_and_on(bench: Bench, image: FakeImage) -> None:
    digest = blobs_of(image)[0]
    sent = 0

    def flood(handler: Handler) -> None:
        nonlocal sent
        handler.begin(200, None, transfer_encoding="chunked")
        try:
            while sent < 64 << 20:
                handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                sent += 0x10000
        except OSError:
            handler.close_connection = True

    bench.registry.rule("GET", digest, flood)
    bench.refuses(f"longer than the {len(image.blobs[digest])} bytes")
    assert sent < 64 << 20, "it was read to the end"


def test_a_manifest_that_goes_on_and_on(bench: Bench) -> None:
    long = b'{"x":"' + b"x" * (5 << 20)
    bench.registry.rule("GET", "manifests", answers(200, long, content_type=OCI_MANIFEST))
    bench.refuses("sends more than 4194304 bytes")


@pytest.mark.parametrize(
    ("media_type", "says"),
    [
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1"),
        ("application/vnd.oci.image.index.v1+json", "ambiguous"),
        ("text/html", "ambiguous"),
    ],
)
def test_a_manifest_of_another_type(
    bench: Bench, image: FakeImage, media_type: str, says: str
) -> None:
    bench.registry.rule("GET", "manifests", answers(200, image.raw, content_type=media_type))
    bench.refuses(says)


def test_a_manifest_that_is_an_index_too(bench: Bench, image: FakeImage) -> None:
    raw = document(image, manifests=[image.entry().as_json()])
    bench.registry.put_document(raw, OCI_MANIFEST)
    bench.refuses("ambiguous")


def test_a_foreign_layer_is_not_fetched_from_its_url(bench: Bench, image: FakeImage) -> None:
    foreign = {
        **image.document["layers"][0],
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "urls": [f"http://{bench.registry.host}/elsewhere"],
    }
    raw = document(image, layers=[foreign, image.document["layers"][1]])
    bench.registry.put_document(raw, OCI_MANIFEST)
    bench.refuses("foreign layer")
    assert bench.registry.asked("GET", "elsewhere") == []


def test_urls_of_a_layer_are_not_used(bench: Bench, image: FakeImage) -> None:
    url = {**image.document["layers"][0], "urls": [f"http://{bench.registry.host}/elsewhere"]}
    raw = document(image, layers=[url, image.document["layers"][1]])
    bench.registry.put_document(raw, OCI_MANIFEST)
    bench.pull()
    assert bench.registry.asked("GET", "elsewhere") == []


def test_too_many_layers(bench: Bench, image: FakeImage) -> None:
    raw = document(image, layers=[image.document["layers"][0]] * 1001)
    bench.registry.put_document(raw, OCI_MANIFEST)
    bench.refuses("has 1001 layers")
    assert bench.registry.asked("GET", "/blobs/") == []


def test_a_config_that_does_not_fit_its_layers(bench: Bench, image: FakeImage) -> None:
    raw = document(image, layers=image.document["layers"][:1])
    bench.registry.put_document(raw, OCI_MANIFEST)
    bench.refuses("has 1 layers, its config names 2")


def test_one_blob_with_two_sizes(bench: Bench, image: FakeImage) -> None:
    first = image.document["layers"][0]
    raw = document(image, layers=[first, {**first, "size": first["size"] + 1}])
    bench.registry.put_document(raw, OCI_MANIFEST)
    bench.refuses("ambiguous")


def test_an_image_that_is_not_there(bench: Bench) -> None:
    error = bench.refuses("answers 404: MANIFEST_UNKNOWN manifest unknown")
    assert "is the name right?" in error.hint
    assert str(bench.registry.reference()) in error.message


def test_what_a_registry_says_is_made_fit_to_be_shown(bench: Bench) -> None:
    said = json.dumps({"errors": [{"code": "DENIED", "message": "\x1b[2Jgone\n" + "x" * 9999}]})
    bench.registry.rule("GET", "manifests", answers(403, said.encode()))
    error = bench.refuses("DENIED  [2Jgone")
    assert "\x1b" not in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize("body", [b"\xff", b"[]", b'{"errors":[1]}', b"[" * 30_000, b"x" * 99_999])
def test_an_error_that_says_nothing(bench: Bench, body: bytes) -> None:
    bench.registry.rule("GET", "manifests", answers(403, body))
    bench.refuses(f"{bench.registry.host} answers 403 (")
