"""Pull from a registry on loopback whose connections and answers break."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import (
    digest_of,
)
from sandbox_kernel.image.parallel import each
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.transfer import pull
from tests.fakes.registry import FakeImage, Handler, layer
from tests.fakes.registry_bench import BIG, Bench, Log, answers, blobs_of, cut, opened, two_layers


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with opened(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def image(bench: Bench) -> FakeImage:
    return two_layers(bench)


def test_a_broken_stream_is_resumed(bench: Bench, image: FakeImage) -> None:
    digest = blobs_of(image)[1]
    data = image.blobs[digest]
    bench.registry.rule("GET", digest, cut(data, 100))
    bench.pull()
    assert bench.store.read_blob(digest) == data
    again = bench.registry.asked("GET", digest)[1].headers["range"]
    assert again == "bytes=100-"
    assert bench.log.bytes[digest] == len(data), "no byte is told twice"
    assert len(bench.waits) == 1


def test_a_registry_that_knows_no_ranges_sends_all_again(bench: Bench, image: FakeImage) -> None:
    digest = blobs_of(image)[1]
    data = image.blobs[digest]
    bench.registry.rule("GET", digest, cut(data, 100))
    bench.registry.rule("GET", digest, answers(200, data))
    bench.pull()
    assert bench.store.read_blob(digest) == data
    assert bench.log.bytes[digest] == len(data)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("bytes 0-{last}/{size}", "a range not asked for"),
        ("bytes 99-{last}/{size}", "a range not asked for"),
        ("bytes 100-{last}/9999999", "announced with 9999999 bytes"),
        ("nonsense", "a range not asked for"),
        ("", "a range not asked for"),
    ],
)
def test_a_range_that_lies(bench: Bench, image: FakeImage, told: str, says: str) -> None:
    digest = blobs_of(image)[1]
    data = image.blobs[digest]
    content_range = told.format(last=len(data) - 1, size=len(data))
    bench.registry.rule("GET", digest, cut(data, 100))
    bench.registry.rule("GET", digest, answers(206, data[100:], content_range=content_range))
    bench.refuses(says)


def test_a_part_that_nobody_asked_for(bench: Bench, image: FakeImage) -> None:
    digest = blobs_of(image)[1]
    answer = answers(206, image.blobs[digest], content_range="bytes 0-9/10")
    bench.registry.rule("GET", digest, answer)
    bench.refuses("a range not asked for")


def test_a_stream_that_ends_early_without_saying_so(bench: Bench, image: FakeImage) -> None:
    digest = blobs_of(image)[1]
    data = image.blobs[digest]

    def short(handler: Handler) -> None:
        handler.begin(200, None, connection="close")
        handler.wfile.write(data[:200])
        handler.hang_up()

    bench.registry.rule("GET", digest, short)
    bench.pull()
    assert bench.registry.asked("GET", digest)[1].headers["range"] == "bytes=200-"


def test_a_stream_that_always_breaks_is_given_up(bench: Bench, image: FakeImage) -> None:
    digest = blobs_of(image)[1]
    bench.registry.rule("GET", digest, cut(image.blobs[digest], 0), times=0)
    error = bench.refuses("tried 5 times")
    assert digest in str(error)
    assert len(bench.waits) == 4
    for delay_s, least_s in zip(bench.waits, (0.25, 0.5, 1.0, 2.0), strict=True):
        assert least_s <= delay_s <= 2 * least_s


def test_a_stream_that_drips_is_given_up_in_the_end(bench: Bench, image: FakeImage) -> None:
    digest = blobs_of(image)[1]
    data = image.blobs[digest]

    def drip(handler: Handler) -> None:
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        told = {"content_range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        cut(data[start:], 1, **told)(handler)

    bench.registry.rule("GET", digest, drip, times=0)
    patience = replace(bench.options.patience, attempts_in_all=12)
    bench.refuses("tried 12 times", patience=patience)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_status_is_tried_again(bench: Bench, image: FakeImage, status: int) -> None:
    bench.registry.rule("GET", "manifests", answers(status), times=2)
    assert bench.pull().digest == digest_of(image.raw)
    assert len(bench.waits) == 2


@pytest.mark.parametrize(
    ("header", "delay_s"),
    [("7", 7.0), (formatdate(1_000_030, usegmt=True), 30.0), (formatdate(9, usegmt=True), 0.0)],
)
def test_a_registry_may_say_how_long_to_wait(
    bench: Bench, image: FakeImage, header: str, delay_s: float
) -> None:
    bench.registry.rule("GET", "manifests", answers(429, retry_after=header))
    bench.pull()
    assert bench.waits == [delay_s]


def test_a_wait_that_makes_no_sense_is_not_kept(bench: Bench, image: FakeImage) -> None:
    bench.registry.rule("GET", "manifests", answers(429, retry_after="-3 years"))
    bench.pull()
    assert len(bench.waits) == 1
    assert bench.waits[0] <= 0.5


def test_a_wait_that_is_too_long_is_told(bench: Bench, image: FakeImage) -> None:
    body = b'{"errors":[{"code":"TOOMANYREQUESTS","message":"pull rate limit"}]}'
    bench.registry.rule("GET", "manifests", answers(429, body, retry_after="21600"))
    error = bench.refuses("asks to wait for 21600 s")
    assert "TOOMANYREQUESTS pull rate limit" in error.message
    assert bench.waits == []


def test_nobody_listens(bench: Bench) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        reference = Reference.parse(f"127.0.0.1:{port}/x")
        with pytest.raises(ImageError, match=f"127.0.0.1:{port} cannot be reached") as caught:
            pull(reference, bench.store, bench.log, bench.options)
    assert "Connection refused" in str(caught.value)
    assert bench.waits == []


def test_the_first_failure_ends_the_other_transfers(bench: Bench) -> None:
    image = FakeImage(tuple(layer((str(number), BIG)) for number in range(4)))
    bench.registry.put(image)
    first, *others = blobs_of(image)
    all_there, ended = threading.Barrier(4, timeout=20), threading.Event()

    def refuse(handler: Handler) -> None:
        all_there.wait()
        handler.answer(403)

    def stall(handler: Handler) -> None:
        all_there.wait()
        handler.begin(200, len(image.blobs[handler.path.rpartition("/")[2]]))
        handler.wfile.write(b"x")
        assert ended.wait(20)

    bench.registry.rule("GET", first, refuse)
    for digest in others:
        bench.registry.rule("GET", digest, stall)
    try:
        bench.refuses("answers 403")
        assert bench.kept(image) == {digest_of(image.config)}
    finally:
        ended.set()


def test_a_failure_to_write_is_raised_as_it_is(bench: Bench, image: FakeImage) -> None:
    class Full(Log):
        def advanced(self, digest: str, count_bytes: int) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        pull(bench.registry.reference(), bench.store, Full(), bench.options)
    assert bench.kept(image) == set()


def test_an_interrupt_ends_the_threads(bench: Bench) -> None:
    stop, woken = threading.Event(), threading.Event()

    def work(item: int) -> None:
        if item == 0:
            raise KeyboardInterrupt
        assert woken.wait(20)

    with pytest.raises(KeyboardInterrupt):
        each([0, 1, 2], work, 3, stop, woken.set)
    assert stop.is_set()
