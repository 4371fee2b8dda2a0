"""A read of a lazy layer brings the right bytes, and asks the source for no more than it must."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from index.errors import FormatError
from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch.errors import FetchError
from snapshotter.fetch.pacing import FIRST_FAN
from snapshotter.fetch.readahead import FIRST_NEIGHBOURS
from snapshotter.fetch.scheduler import RESERVED
from snapshotter.fetch.startup import StartupRecorder
from snapshotter.fetch.wants import ChunkState, Priority
from tests.support.blobs import make_layer, sample_bytes
from tests.support.fetching import open_node

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.fetch.layer import LazyLayer
    from tests.support.fetching import Node

RAW = sample_bytes(20 * CHUNK_SIZE + 4321)
PLAIN = make_layer(RAW, Codec.PLAIN)
FRAMED = make_layer(RAW, Codec.ZSTD)


async def read_all(layer: LazyLayer) -> bytes:
    size = layer.table.raw_size
    parts = [await layer.read(at, min(100_000, size - at)) for at in range(0, size, 100_000)]
    return b"".join(parts)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(FRAMED, id="zstd"),
        pytest.param(make_layer(RAW, Codec.ZSTD, frame=3 * CHUNK_SIZE + 17), id="odd frames"),
        pytest.param(make_layer(RAW, Codec.ZSTD, frame=0), id="one frame"),
        pytest.param(make_layer(RAW, Codec.LZ4, frame=CHUNK_SIZE // 2), id="lz4"),
        pytest.param(make_layer(RAW, Codec.GZIP), id="gzip"),
        pytest.param(make_layer(bytes(1 << 24), Codec.GZIP), id="gzip zeros"),
        pytest.param(make_layer(bytes(48 << 20), Codec.ZSTD, frame=0), id="zstd zeros"),
    ],
)
async def test_every_byte_of_every_kind_of_layer(node: Node, layer: object) -> None:
    made = layer
    assert isinstance(made, type(PLAIN))
    lazy, _ = node.mount(made)
    size = len(made.raw)
    for offset, length in ((size - 1, 1), (size // 2 - 3, 7), (CHUNK_SIZE - 1, 2 * CHUNK_SIZE)):
        assert await lazy.read(offset, length) == made.raw[offset : offset + length]
    assert await read_all(lazy) == made.raw
    lazy.close()


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, 0), (0, len(RAW) + 1), (len(RAW), 1), (1 << 62, 1)]
)
async def test_a_range_outside_the_layer_is_refused(node: Node, offset: int, length: int) -> None:
    lazy, source = node.mount(PLAIN)
    with pytest.raises(FormatError, match="are not within"):
        await lazy.read(offset, length)
    assert source.requests == []


async def test_a_read_asks_for_its_own_chunk_only(node: Node) -> None:
    lazy, source = node.mount(PLAIN)
    await lazy.read(7 * CHUNK_SIZE + 5, 10)
    assert source.requests == [(7 * CHUNK_SIZE, 8 * CHUNK_SIZE)]


async def test_what_is_here_needs_no_source(node: Node) -> None:
    lazy, source = node.mount(FRAMED)
    assert lazy.read_now(0, 10) is None
    await lazy.read(0, 10)
    assert lazy.read_now(5, 10) == RAW[5:15]
    assert len(source.requests) == 1


async def test_what_came_before_the_chunk_is_kept_too(node: Node) -> None:
    lazy, source = node.mount(make_layer(RAW, Codec.ZSTD, frame=0))
    await lazy.read(9 * CHUNK_SIZE, 1)
    assert lazy.stored.missing(0, 9) == []
    await lazy.read(0, 10 * CHUNK_SIZE)
    assert len(source.requests) == 1


async def test_a_chunk_that_was_damaged_on_disk_is_fetched_again(node: Node) -> None:
    lazy, source = node.mount(PLAIN)
    await lazy.read(3 * CHUNK_SIZE, 1)
    node.store._cache._chunks.clear()
    with lazy.stored.raw_path.open("r+b") as file:
        file.seek(3 * CHUNK_SIZE)
        file.write(b"?")
    assert await lazy.read(3 * CHUNK_SIZE, 9) == RAW[3 * CHUNK_SIZE :][:9]
    assert len(source.requests) == 2


async def test_a_full_disk_does_not_stop_readers(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy, _ = node.mount(PLAIN)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lazy.stored, "_write_raw", full)
    assert await read_all(lazy) == RAW
    assert lazy.stored.present_bytes == 0
    with pytest.raises(FetchError, match="No space left"):
        await node.scheduler.fill(lazy.origin, range(5))


# --- single flight ---


async def test_many_readers_of_one_chunk_cause_one_request(node: Node) -> None:
    lazy, source = node.mount(FRAMED)
    other, other_source = node.mount(FRAMED)
    results: list[bytes | memoryview] = []

    async def reader(layer: LazyLayer) -> None:
        results.append(await layer.read(5 * CHUNK_SIZE + 1, 100))

    async with trio.open_nursery() as nursery:
        for _ in range(25):
            nursery.start_soon(reader, lazy)
            nursery.start_soon(reader, other)
    assert results == [RAW[5 * CHUNK_SIZE + 1 :][:100]] * 50
    assert len(source.requests) + len(other_source.requests) == 1


async def test_neighbouring_misses_become_one_request(node: Node) -> None:
    lazy, source = node.mount(PLAIN)
    async with trio.open_nursery() as nursery:
        for chunk in (6, 4, 5, 7):
            nursery.start_soon(node.scheduler.read, lazy.origin, [chunk])
    assert source.requests == [(4 * CHUNK_SIZE, 8 * CHUNK_SIZE)]


async def test_misses_that_need_the_same_frame_become_one_request(node: Node) -> None:
    lazy, source = node.mount(make_layer(RAW, Codec.ZSTD, frame=8 * CHUNK_SIZE))
    async with trio.open_nursery() as nursery:
        for chunk in (1, 4):
            nursery.start_soon(lazy.read, chunk * CHUNK_SIZE, 10)
    assert len(source.requests) == 1


async def test_distant_misses_do_not_wait_for_each_other(node: Node) -> None:
    lazy, source = node.mount(PLAIN)
    async with trio.open_nursery() as nursery:
        for chunk in (1, 18):
            nursery.start_soon(lazy.read, chunk * CHUNK_SIZE, 10)
    assert sorted(source.requests) == [
        (chunk * CHUNK_SIZE, (chunk + 1) * CHUNK_SIZE) for chunk in (1, 18)
    ]


async def test_a_read_is_done_when_its_own_chunk_is(node: Node) -> None:
    lazy, source = node.mount(PLAIN)
    done: list[int] = []

    async def reader(chunk: int) -> None:
        await lazy.read(chunk * CHUNK_SIZE, 1)
        done.append(chunk)
        if chunk == 2:
            source.gate = trio.Event()  # nothing more comes
            nursery.cancel_scope.cancel()

    source.delay = 0.001
    async with trio.open_nursery() as nursery:
        for chunk in range(2, 14):
            nursery.start_soon(reader, chunk)
    assert 2 in done
    assert 13 not in done


async def test_a_stream_that_will_pass_a_chunk_is_joined(node: Node) -> None:
    lazy, source = node.mount(make_layer(RAW, Codec.ZSTD, frame=0))
    source.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lazy.read, 2 * CHUNK_SIZE, 10)
        await wait_all_tasks_blocked()
        nursery.start_soon(lazy.read, 15 * CHUNK_SIZE, 10)
        await wait_all_tasks_blocked()
        source.gate.set()
    for (_, end), (start, _) in pairwise(source.requests):
        assert start == end, "the next request goes on where the decoder is"


# --- urgency ---


async def test_a_queued_chunk_is_raised_when_somebody_blocks_on_it(node: Node) -> None:
    lazy, source = node.mount(PLAIN)
    source.gate = trio.Event()
    scattered = range(0, 20, 2)
    node.scheduler.advise(lazy.origin, scattered, Priority.STARTUP)
    await wait_all_tasks_blocked()
    assert len(source.requests) == FIRST_FAN + RESERVED[Priority.STARTUP], (
        "startup leaves connections to others"
    )
    last = scattered[-1]
    assert node.scheduler.wants.state(lazy.origin, last) is ChunkState.WANTED
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lazy.read, last * CHUNK_SIZE, 1)
        await wait_all_tasks_blocked()
        assert node.scheduler.wants.state(lazy.origin, last) is ChunkState.IN_FLIGHT
        source.gate.set()


async def test_a_blocked_read_does_not_wait_for_a_distant_place_in_a_fill_run(node: Node) -> None:
    lazy, source = node.mount(PLAIN)
    source.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.scheduler.fill, lazy.origin, range(21))
        await wait_all_tasks_blocked()
        assert source.requests[0][0] == 0
        nursery.start_soon(lazy.read, 15 * CHUNK_SIZE, 1)
        await wait_all_tasks_blocked()
        assert (15 * CHUNK_SIZE, 16 * CHUNK_SIZE) in {
            (start, min(end, 16 * CHUNK_SIZE)) for start, end in source.requests[1:]
        }
        source.gate.set()
    assert lazy.stored.complete


async def test_fill_pauses_while_somebody_is_blocked(node: Node) -> None:
    filled, fill_source = node.mount(make_layer(sample_bytes(64 * CHUNK_SIZE, 7), Codec.PLAIN))
    lazy, source = node.mount(PLAIN)
    source.gate = trio.Event()
    fill_source.delay = 0.001
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.scheduler.fill, filled.origin, range(64))
        await wait_all_tasks_blocked()
        nursery.start_soon(lazy.read, 0, 1)
        await wait_all_tasks_blocked(cushion=0.05)
        served, requests = fill_source.served, len(fill_source.requests)
        await wait_all_tasks_blocked(cushion=0.05)
        assert (fill_source.served, len(fill_source.requests)) == (served, requests)
        assert not filled.stored.complete
        source.gate.set()
    assert filled.stored.complete


async def test_connections_are_bounded(node: Node) -> None:
    layer = make_layer(sample_bytes(64 * CHUNK_SIZE, 3), Codec.PLAIN)
    lazy, source = node.mount(layer)
    filled, fill_source = node.mount(make_layer(sample_bytes(300 * CHUNK_SIZE, 4), Codec.PLAIN))
    source.gate = fill_source.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.scheduler.fill, filled.origin, range(300))
        await wait_all_tasks_blocked()
        assert fill_source.open == FIRST_FAN
        for chunk in range(0, 64, 2):
            nursery.start_soon(node.scheduler.read, lazy.origin, [chunk])
        await wait_all_tasks_blocked()
        assert source.open == RESERVED[Priority.BLOCKED] - 1, "one run of fill waits for its turn"
        source.gate.set()
    assert source.most_open <= FIRST_FAN + RESERVED[Priority.BLOCKED]
    assert lazy.stored.missing(0, 63) == list(range(1, 64, 2))
    assert filled.stored.complete


async def test_a_sequential_reader_is_read_ahead_for(node: Node) -> None:
    lazy, source = node.mount(PLAIN)
    for chunk in (3, 4, 5):
        await lazy.read(chunk * CHUNK_SIZE, CHUNK_SIZE)
    await wait_all_tasks_blocked(cushion=0.05)
    assert lazy.stored.missing(3, 9) == []
    assert node.scheduler.stats.requests[Priority.READAHEAD] > 0
    assert lazy.stored.missing(0, 2) == [0, 1, 2]
    assert source.served == sum(end - start for start, end in source.requests)


# --- leaving ---


async def test_nothing_is_read_ahead_of_what_starts_are_known_to_read(node: Node) -> None:
    """What they go on with is known as well; who goes further is read ahead for."""
    lazy, _ = node.mount(PLAIN)
    lazy.stored.start_chunks.update((3, 4, 5))
    for chunk in (3, 4, 5):
        await lazy.read(chunk * CHUNK_SIZE, CHUNK_SIZE)
    await wait_all_tasks_blocked(cushion=0.05)
    assert node.scheduler.stats.requests[Priority.READAHEAD] == 0
    await lazy.read(6 * CHUNK_SIZE, CHUNK_SIZE)
    await wait_all_tasks_blocked(cushion=0.05)
    assert node.scheduler.stats.requests[Priority.READAHEAD] > 0


async def test_what_was_foreseen_makes_nobody_a_sequential_reader(node: Node) -> None:
    """A library that is read front to back ends somewhere: what is behind it is another file."""
    lazy, _ = node.mount(PLAIN)
    lazy.foresee(range(3, 6))
    for chunk in (3, 4, 5, 6):
        await lazy.read(chunk * CHUNK_SIZE, CHUNK_SIZE)
    await wait_all_tasks_blocked(cushion=0.05)
    assert lazy.stored.missing(3, 9) == [7, 8, 9]
    await lazy.read(7 * CHUNK_SIZE, CHUNK_SIZE)
    await wait_all_tasks_blocked(cushion=0.05)
    assert lazy.stored.missing(3, 9) == []


async def test_a_cancelled_read_leaves_nothing_behind(node: Node) -> None:
    lazy, source = node.mount(PLAIN)
    source.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lazy.read, 0, 1)
        await wait_all_tasks_blocked()
        assert source.open == 1
        nursery.cancel_scope.cancel()
    await wait_all_tasks_blocked()
    assert source.open == 0
    assert node.scheduler.wants.state(lazy.origin, 0) is ChunkState.ABSENT
    assert node.scheduler.wants.layers() == []
    source.gate.set()
    assert await lazy.read(0, 5) == RAW[:5]


async def test_the_other_reader_still_gets_its_chunk(node: Node) -> None:
    lazy, source = node.mount(PLAIN)
    source.gate = trio.Event()
    result = []

    async def stays() -> None:
        result.append(await lazy.read(0, 5))

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def leaves() -> None:
            with scope:
                await lazy.read(0, 5)

        nursery.start_soon(leaves)
        nursery.start_soon(stays)
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        source.gate.set()
    assert result == [RAW[:5]]
    assert len(source.requests) == 1


async def test_unmounting_fails_its_readers_and_hands_the_work_to_others(node: Node) -> None:
    lazy, source = node.mount(FRAMED)
    other, other_source = node.mount(FRAMED)
    source.gate = trio.Event()
    outcome: dict[str, object] = {}

    async def reader(name: str, layer: LazyLayer) -> None:
        try:
            outcome[name] = await layer.read(0, 5)
        except FetchError as error:
            outcome[name] = str(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader, "first", lazy)
        await wait_all_tasks_blocked()
        nursery.start_soon(reader, "second", other)
        await wait_all_tasks_blocked()
        assert other_source.requests == []
        lazy.close()
    assert "unmounted" in str(outcome["first"])
    assert outcome["second"] == RAW[:5]
    with pytest.raises(FetchError, match="unmounted"):
        await lazy.read(10 * CHUNK_SIZE, 1)


async def test_closing_the_scheduler_fails_who_waits(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        async with open_node(tmp_path) as node:
            lazy, source = node.mount(PLAIN)
            source.gate = trio.Event()

            async def reader() -> None:
                with pytest.raises(FetchError, match="shutting down"):
                    await lazy.read(0, 1)

            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
        with pytest.raises(FetchError, match="shutting down"):
            await lazy.read(0, 1)


# --- starts ---


async def test_first_touches_are_recorded_in_order_and_can_be_replayed(node: Node) -> None:
    recorder = StartupRecorder()
    lazy, source = node.mount(FRAMED)
    lazy._recorder, lazy._number = recorder, 4
    for chunk in (7, 2, 7, 12):
        await lazy.read(chunk * CHUNK_SIZE, 10)
        lazy.read_now(chunk * CHUNK_SIZE, 10)
    assert [(touch.layer, touch.chunk) for touch in recorder.touches] == [(4, 7), (4, 2), (4, 12)]
    assert [touch.after for touch in recorder.touches] == sorted(
        touch.after for touch in recorder.touches
    )
    await node.quiet()
    for chunk in (7, 2, 12):
        lazy.stored.drop(chunk, "is dropped by a test")
    node.store._cache._chunks.clear()
    source.requests.clear()
    node.scheduler.replay((lazy.origin, touch.chunk) for touch in recorder.touches)
    await wait_all_tasks_blocked(cushion=0.1)
    assert [lazy.stored.has(chunk) for chunk in (7, 2, 12)] == [True] * 3
    spans = [FRAMED.table.span(chunk, chunk) for chunk in (7, 2, 12)]
    assert source.requests == [(span.start, span.end) for span in spans]


@pytest.mark.parametrize("known", ["", "by an earlier start", "by foresight"])
async def test_a_start_gets_what_is_near_with_what_it_waits_for(node: Node, known: str) -> None:
    """In one request, and only while it is not known what it will read."""
    lazy, source = node.mount(PLAIN)
    recorder = lazy._recorder = StartupRecorder()
    # This one is just what the kernel has guessed.
    if known == "by an earlier start":
        lazy.stored.start_chunks.add(17)
    elif known:
        lazy.foreseen.add(1)
    assert await lazy.read(2 * CHUNK_SIZE, 9) == RAW[2 * CHUNK_SIZE :][:9]
    await node.quiet()
    last = 2 if known else 2 + FIRST_NEIGHBOURS
    assert lazy.stored.missing(0, 20) == [chunk for chunk in range(21) if not 2 <= chunk <= last]
    assert source.requests[0][0] == 2 * CHUNK_SIZE
    assert all(end == start for (_, end), (start, _) in pairwise(source.requests))

    recorder.stop()
    lazy.stored.start_chunks.clear()
    await lazy.read(19 * CHUNK_SIZE, 9)
    await node.quiet()
    assert not lazy.stored.has(20)
