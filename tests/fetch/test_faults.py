"""Sources fail in every way; readers get right bytes or an error, and no error is remembered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from index.errors import CodecError, IntegrityError
from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch import transfer
from snapshotter.fetch.errors import FetchError
from snapshotter.fetch.scheduler import Patience
from snapshotter.registry.errors import (
    NetworkError,
    NotFoundError,
    RateLimitedError,
    ServerError,
)
from snapshotter.registry.retry import RetryPolicy
from tests.support.blobs import make_layer, sample_bytes
from tests.support.fetching import open_node
from tests.support.sources import Fault, MemorySource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from snapshotter.fetch.layer import LazyLayer
    from tests.support.fetching import Node

RAW = sample_bytes(12 * CHUNK_SIZE + 99)
PLAIN = make_layer(RAW, Codec.PLAIN)
FRAMED = make_layer(RAW, Codec.ZSTD, frame=4 * CHUNK_SIZE)
GZIPPED = make_layer(RAW, Codec.GZIP)


def flip(at: int) -> Callable[[int, bytes], bytes]:
    """Flip a bit of the blob's byte `at` on its way."""

    def change(position: int, data: bytes) -> bytes:
        if not position <= at < position + len(data):
            return data
        changed = bytearray(data)
        changed[at - position] ^= 0x10
        return bytes(changed)

    return change


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(good=0, error=NetworkError("no route")), id="no connection"),
        pytest.param(Fault(good=100_000, error=NetworkError("reset")), id="reset on the way"),
        pytest.param(Fault(good=100_000, ends=True), id="body ends early"),
        pytest.param(Fault(good=0, ends=True), id="empty body"),
        pytest.param(Fault(good=0, error=ServerError("503")), id="server error"),
        pytest.param(
            Fault(good=0, error=RateLimitedError("429", retry_after=0.01)), id="rate limit"
        ),
    ],
)
async def test_a_passing_failure_is_invisible_to_the_reader(node: Node, fault: Fault) -> None:
    lazy, source = node.mount(FRAMED, *[fault] * 7)
    assert await lazy.read(2 * CHUNK_SIZE, 9) == RAW[2 * CHUNK_SIZE :][:9]
    assert node.scheduler.stats.retries >= 1
    assert len(source.requests) == node.scheduler.stats.retries + 1


async def test_after_a_failure_the_rest_is_fetched_not_all(node: Node) -> None:
    lazy, source = node.mount(GZIPPED, Fault(good=100_000), Fault(good=1), Fault(good=100_000))
    await lazy.read(8 * CHUNK_SIZE, 1)
    starts = [start for start, _ in source.requests]
    first = starts[0]
    assert starts == [first, first + 100_000, first + 100_001, first + 200_001]


async def test_a_source_that_hangs_is_asked_again(tmp_path: Path) -> None:
    async with open_node(tmp_path, Patience(source=0.2)) as node:
        lazy, source = node.mount(PLAIN, Fault(good=0, hangs=True), Fault(good=70_000, hangs=True))
        assert await lazy.read(0, 9) == RAW[:9]
        assert len(source.requests) >= 3


@pytest.mark.parametrize(
    "error", [NotFoundError("no such blob"), RateLimitedError("429", retry_after=86400)]
)
async def test_a_lasting_failure_reaches_the_reader_and_is_not_remembered(
    node: Node, error: Exception
) -> None:
    lazy, source = node.mount(PLAIN, Fault(good=0, error=error))  # type: ignore[arg-type]
    with pytest.raises(FetchError, match=str(error)) as caught:
        await lazy.read(0, 9)
    assert caught.value.__cause__ is error
    assert len(source.requests) == 1
    assert await lazy.read(0, 9) == RAW[:9]


async def test_a_read_without_any_progress_fails_in_time_and_the_next_starts_afresh(
    tmp_path: Path,
) -> None:
    async with open_node(tmp_path, Patience(read=0.3, source=1000)) as node:
        lazy, source = node.mount(PLAIN, Fault(good=0, hangs=True))
        with pytest.raises(FetchError, match=r"no byte has come for 0\.3 seconds"):
            await lazy.read(0, 9)
        await wait_all_tasks_blocked()
        assert source.open == 0
        assert await lazy.read(0, 9) == RAW[:9]


async def test_slow_progress_is_progress(tmp_path: Path) -> None:
    """A stream with one seek point may take longer to pass a chunk than a read may stall."""
    async with open_node(tmp_path, Patience(read=0.5)) as node:
        source = MemorySource(make_layer(RAW, Codec.ZSTD, frame=0), delay=0.05)
        lazy = node.attach(source.layer, source)
        assert await lazy.read(12 * CHUNK_SIZE, 9) == RAW[12 * CHUNK_SIZE :][:9]
        assert source.served / source.piece * source.delay > 0.5  # so long it was on its way


async def test_an_unforeseen_exception_is_an_error_of_this_read_only(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    bug = ZeroDivisionError()
    lazy, _ = node.mount(PLAIN, Fault(good=0, error=bug))  # type: ignore[arg-type]
    with pytest.raises(FetchError, match="unforeseen"):
        await lazy.read(0, 9)
    assert "ZeroDivisionError" in caplog.text
    assert await lazy.read(0, 9) == RAW[:9]


async def test_a_source_that_sends_too_much_is_not_believed(node: Node) -> None:
    lazy, _ = node.mount(PLAIN, Fault(change=lambda _, data: data + b"x"))
    with pytest.raises(FetchError, match=r"more of layer .* than was asked for"):
        await lazy.read(0, 9)
    assert await lazy.read(0, 9) == RAW[:9]


# --- wrong bytes ---


@pytest.mark.parametrize(
    ("layer", "at"),
    [
        pytest.param(PLAIN, 5 * CHUNK_SIZE + 7, id="plain"),
        pytest.param(FRAMED, FRAMED.table.bit_offsets[1] // 8 + 200_000, id="zstd"),
        pytest.param(FRAMED, FRAMED.table.bit_offsets[1] // 8 + 1, id="zstd header"),
        pytest.param(GZIPPED, len(GZIPPED.blob) * 11 // 24, id="gzip"),
    ],
)
async def test_wrong_bytes_are_fetched_anew_once_and_never_served(
    node: Node, caplog: pytest.LogCaptureFixture, layer: object, at: int
) -> None:
    assert isinstance(layer, type(PLAIN))
    bad = Fault(change=flip(at))
    lazy, source = node.mount(layer, bad)
    assert await lazy.read(5 * CHUNK_SIZE, 1000) == RAW[5 * CHUNK_SIZE :][:1000]
    assert len(source.requests) == 2
    assert source.doubts == 1, "a mirror is not asked again for what it had wrong"
    assert f"sha256:{layer.table.digest.hex()}" in caplog.text

    lazy.close()
    lazy.stored.drop(5, "is dropped by a test")
    node.store._cache._chunks.clear()
    other, source = node.mount(layer, bad, bad)
    with pytest.raises(FetchError) as caught:
        await other.read(5 * CHUNK_SIZE, 1000)
    assert isinstance(caught.value.__cause__, IntegrityError | CodecError)
    assert len(source.requests) == 2
    assert await other.read(5 * CHUNK_SIZE, 1000) == RAW[5 * CHUNK_SIZE :][:1000]
    assert node.scheduler.stats.damaged >= 3


async def test_one_bad_chunk_does_not_fail_its_neighbours(node: Node) -> None:
    bad = Fault(change=flip(5 * CHUNK_SIZE + 7))
    lazy, _ = node.mount(PLAIN, bad, bad)
    outcome: dict[int, object] = {}

    async def reader(chunk: int) -> None:
        try:
            outcome[chunk] = await lazy.read(chunk * CHUNK_SIZE, 4)
        except FetchError as error:
            outcome[chunk] = type(error.__cause__)

    async with trio.open_nursery() as nursery:
        for chunk in range(3, 9):
            nursery.start_soon(reader, chunk)
    assert outcome == {
        chunk: IntegrityError if chunk == 5 else RAW[chunk * CHUNK_SIZE :][:4]
        for chunk in range(3, 9)
    }


async def test_a_broken_frame_does_not_fail_chunks_of_the_next(node: Node) -> None:
    bad = Fault(change=flip(FRAMED.table.bit_offsets[1] // 8 + 1))
    lazy, _ = node.mount(FRAMED, bad, bad)
    outcome: dict[int, object] = {}

    async def reader(chunk: int) -> None:
        try:
            outcome[chunk] = await lazy.read(chunk * CHUNK_SIZE, 4)
        except FetchError:
            outcome[chunk] = None

    async with trio.open_nursery() as nursery:
        for chunk in range(2, 11):
            nursery.start_soon(reader, chunk)
    assert outcome == {
        chunk: None if chunk // 4 == 1 else RAW[chunk * CHUNK_SIZE :][:4] for chunk in range(2, 11)
    }


async def test_a_table_that_lies_about_lengths_is_an_error_not_a_hang(node: Node) -> None:
    """The blob of another layer: shorter frames than the table promises."""
    other = make_layer(sample_bytes(len(RAW) - 5000, seed=5), Codec.ZSTD, frame=0)
    one = make_layer(RAW, Codec.ZSTD, frame=0)
    blob = other.blob.ljust(len(one.blob), b"\0")[: len(one.blob)]
    source = MemorySource(type(one)(one.raw, blob, one.table, {}))
    lazy = node.attach(source.layer, source)
    for _ in range(2):
        with pytest.raises(FetchError):
            await lazy.read(12 * CHUNK_SIZE, 1)
    assert source.open == 0


async def test_fill_gives_up_on_a_run_after_some_attempts(node: Node) -> None:
    lazy, source = node.mount(PLAIN, *[Fault(good=0)] * 50)
    with pytest.raises(FetchError, match="the connection was reset"):
        await node.scheduler.fill(lazy.origin, range(13))
    assert len(source.requests) == 5


async def test_a_reader_does_not_wait_for_the_back_off_of_a_fill_run(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "IN_BACKGROUND", RetryPolicy(base=1000, longest=1000))
    lazy, _ = node.mount(PLAIN, Fault(good=0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.scheduler.fill, lazy.origin, range(13))
        await wait_all_tasks_blocked()
        assert await lazy.read(0, 9) == RAW[:9]


@pytest.mark.parametrize("error", [NotFoundError("404"), NetworkError("down"), None])
async def test_an_image_with_a_bad_source_does_not_hurt_others_that_share_the_layer(
    node: Node, error: Exception | None
) -> None:
    """`error` None: its source sends wrong bytes."""
    at = 5 * CHUNK_SIZE + 7
    fault = Fault(change=flip(at)) if error is None else Fault(good=0, error=error)  # type: ignore[arg-type]
    bad, bad_source = node.mount(PLAIN, *[fault] * 1000)
    good, good_source = node.mount(PLAIN)
    bad_source.gate = trio.Event()
    outcome: dict[str, object] = {}

    async def reader(name: str, layer: LazyLayer) -> None:
        try:
            outcome[name] = await layer.read(5 * CHUNK_SIZE, 9)
        except FetchError:
            outcome[name] = None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader, "bad", bad)
        await wait_all_tasks_blocked()
        nursery.start_soon(reader, "good", good)
        await wait_all_tasks_blocked()
        assert good_source.requests == []
        bad_source.gate.set()
    right = RAW[5 * CHUNK_SIZE :][:9]
    assert outcome["good"] == right
    assert outcome["bad"] == (right if isinstance(error, NetworkError) else None)
