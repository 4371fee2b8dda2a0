"""What was decoded on the way to a chunk need not be decoded again for the next one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from index.codecs import points
from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch.decoding import (
    MOST_HEADS,
    MOST_SUSPENDED,
    WEIGHT,
    Decoding,
    Head,
    SuspendedDecodings,
)
from snapshotter.fetch.errors import FetchError
from snapshotter.fetch.run import GUESS_MARGIN, Run
from snapshotter.fetch.wants import LayerWants, Priority
from tests.support.blobs import make_layer, sample_bytes
from tests.support.fetching import open_node
from tests.support.sources import Fault

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.fetch.layer import LazyLayer
    from snapshotter.fetch.source import Origin
    from tests.support.blobs import MadeLayer
    from tests.support.fetching import Node
    from tests.support.sources import MemorySource

RAW = sample_bytes(20 * CHUNK_SIZE + 4321)
with patch.multiple(points, APPROACH=0, MOST_SPACING=2 << 20, WINDOW_SHARE=0):  # few, not at chunks
    GZIP = make_layer(RAW, Codec.GZIP)
ONE_FRAME = make_layer(RAW, Codec.ZSTD, frame=0)
FRAMES = {size: make_layer(RAW, Codec.ZSTD, frame=size) for size in (60_000, 100_000, 300_000)}
POINTS = [offset / CHUNK_SIZE for offset in GZIP.table.raw_offsets]
STRADDLING = int(POINTS[1])  # the chunk that lies on both sides of the second seek point


def test_the_layer_has_what_is_tested_here() -> None:
    assert len(POINTS) > 2
    assert not POINTS[1].is_integer()
    assert 3 < STRADDLING < POINTS[2] - 2


async def read(layer: LazyLayer, chunk: int) -> None:
    assert await layer.read(chunk * CHUNK_SIZE, 9) == RAW[chunk * CHUNK_SIZE :][:9]


# --- from one run to the next ---


async def test_the_next_read_goes_on_where_the_last_one_ended(node: Node) -> None:
    lazy, source = node.mount(GZIP)
    source.piece = 16 << 10
    await read(lazy, 1)
    await node.quiet()
    await read(lazy, 4)
    (_, first_end), (start, end) = source.requests
    assert 0 < start <= first_end
    assert source.served <= end


async def test_so_does_another_image_of_the_same_blob(node: Node) -> None:
    lazy, source = node.mount(GZIP)
    other, other_source = node.mount(GZIP)
    await read(lazy, 1)
    await node.quiet()
    await read(other, 4)
    assert len(source.requests) == 1
    assert other_source.requests[0][0] > 0


async def test_a_seek_point_is_taken_where_that_is_nearer(node: Node) -> None:
    lazy, source = node.mount(GZIP)
    await read(lazy, 1)
    await node.quiet()
    await read(lazy, STRADDLING + 1)
    assert source.requests[-1][0] == GZIP.table.bit_offsets[1] // 8


async def test_nobody_goes_back_for_what_comes_before(node: Node) -> None:
    lazy, source = node.mount(GZIP)
    await read(lazy, 5)
    await node.quiet()
    node.store._cache._chunks.clear()
    lazy.stored.drop(2, "is dropped by a test")
    await read(lazy, 2)
    assert [start for start, _ in source.requests] == [GZIP.table.bit_offsets[0] // 8] * 2


async def test_what_had_come_when_a_reader_went_away_is_of_use(node: Node) -> None:
    lazy, source = node.mount(GZIP, Fault(good=400_000, hangs=True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, lazy, STRADDLING - 1)
        await wait_all_tasks_blocked(cushion=0.05)
        nursery.cancel_scope.cancel()
    await node.quiet()
    await read(lazy, STRADDLING - 1)
    assert source.requests[-1][0] == source.requests[0][0] + 400_000


async def test_what_came_damaged_is_not_gone_on_with(node: Node) -> None:
    lazy, source = node.mount(
        GZIP, Fault(change=lambda at, data: data if at < 200_000 else b"?" * len(data))
    )
    await read(lazy, 0)
    await node.quiet()
    await read(lazy, 5)
    assert lazy.stored.missing(0, 5) == []
    assert source.doubts <= 1


# --- one run for all that it passes ---


async def test_a_run_goes_on_to_the_chunk_that_straddles_its_end(node: Node) -> None:
    lazy, source = node.mount(GZIP)
    source.gate = trio.Event()
    source.delay = 0.001
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, lazy, 3)
        await wait_all_tasks_blocked()
        source.gate.set()
        await trio.sleep(0.005)
        assert source.open == 1
        await node.scheduler.fill(lazy.origin, range(3, STRADDLING + 1))
    starts = [start for start, _ in source.requests]
    assert sorted(set(starts)) == starts, "nothing is asked for twice"
    assert source.served <= GZIP.table.span(STRADDLING, STRADDLING).end


async def test_a_run_does_not_turn_back(node: Node) -> None:
    lazy, _ = node.mount(GZIP)
    run = Run(lazy.origin, LayerWants(b""), 0, 3, SuspendedDecodings())
    run.receive(GZIP.blob[run.position : 400_000])
    run.advance(remember=False)
    run.passed()
    run.stop_before(1)  # others bring all after it
    assert run.next_chunk > 1
    covered = [chunk for chunk in range(21) if run.covers(chunk)]
    assert covered == list(range(run.next_chunk, STRADDLING + 1))


def in_flight(node: Node, lazy: LazyLayer) -> list[set[int]]:
    """Which chunks each run brings, oldest run first."""
    return [set(run.wants) for run in node.scheduler.wants.layer(lazy.origin).runs]


async def test_a_new_run_takes_over_what_lies_on_its_way(node: Node) -> None:
    """Whoever began before a seek point leaves to it what comes after."""
    lazy, source = node.mount(GZIP)
    source.gate = trio.Event()
    beyond = int(POINTS[2])  # needs all from the seek point between
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, lazy, STRADDLING)
        await wait_all_tasks_blocked()
        node.scheduler.advise(lazy.origin, [14], Priority.READAHEAD)
        assert in_flight(node, lazy) == [{STRADDLING, 14}]
        nursery.start_soon(read, lazy, beyond)
        await wait_all_tasks_blocked()
        assert in_flight(node, lazy) == [{STRADDLING}, {14, beyond}]
        source.gate.set()


async def test_of_two_runs_the_nearer_one_goes_on(node: Node) -> None:
    lazy, source = node.mount(GZIP)
    source.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for chunk in (STRADDLING, STRADDLING + 2):
            nursery.start_soon(read, lazy, chunk)
            await wait_all_tasks_blocked()
        node.scheduler.advise(lazy.origin, [14], Priority.READAHEAD)
        assert in_flight(node, lazy) == [{STRADDLING}, {STRADDLING + 2, 14}]
        source.gate.set()


async def test_a_run_does_not_go_to_where_another_one_can_be_resumed(node: Node) -> None:
    """It would fetch once more what that has received."""
    lazy, _ = node.mount(GZIP)
    kept = SuspendedDecodings()
    run = Run(lazy.origin, LayerWants(b""), 0, STRADDLING, kept)
    assert all(run.covers(chunk) for chunk in range(run.last_chunk + 1))
    kept.keep(lazy.table, advanced(lazy.origin, STRADDLING + 1, 500_000))
    _, resumed = kept.nearest(lazy.table, run.last_chunk)
    assert STRADDLING + 1 < resumed <= run.last_chunk
    assert [run.covers(chunk) for chunk in range(21)] == [chunk < resumed for chunk in range(21)]


@settings(max_examples=40)
@given(
    chunks=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    fill=st.booleans(),
    seed=st.integers(0, 99),
)
async def test_whoever_wants_what_little_is_fetched_twice(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[int], fill: bool, seed: int
) -> None:
    """Only those chunks that lie on both sides of a seek point: the run that brings the one before
    it goes on into what another run brings, and a little further than it must."""
    source_of_pauses = random.Random(seed)
    async with open_node(tmp_path_factory.mktemp("store")) as node:
        lazy, source = node.mount(GZIP)
        async with trio.open_nursery() as nursery:
            if fill:
                nursery.start_soon(node.scheduler.fill, lazy.origin, range(lazy.table.chunk_count))
            for chunk in chunks:
                nursery.start_soon(read, lazy, chunk)
                await trio.sleep(source_of_pauses.choice((0, 0.001, 0.01)))
        await node.quiet()
        await node.scheduler.fill(lazy.origin, range(lazy.table.chunk_count))
        assert lazy.stored.complete
        lazy.close()
        straddling = len(POINTS) - 1
        again = straddling * (CHUNK_SIZE + GUESS_MARGIN)
        assert source.served <= len(GZIP.blob) + again


# --- chunks on both sides of a seek point ---


async def test_what_comes_before_a_seek_point_is_joined_with_what_came_after_it(
    node: Node,
) -> None:
    lazy, source = node.mount(GZIP)
    await read(lazy, STRADDLING + 1)
    await node.quiet()
    await read(lazy, STRADDLING)
    (begun, _), (_, ended) = source.requests
    assert ended == begun
    assert GZIP.table.bit_offsets[1] % 8, "it is inside a byte, which both need"
    await node.quiet()
    assert node.scheduler._suspended.head(lazy.table, STRADDLING) is None


async def test_a_head_that_is_wrong_costs_a_request(node: Node) -> None:
    lazy, source = node.mount(GZIP)
    span = lazy.table.span(STRADDLING + 1, STRADDLING + 1)
    wrong = bytes((STRADDLING + 1) * CHUNK_SIZE - span.raw_start)
    head = Head(span.raw_start, span.start, b"?", wrong)
    node.scheduler._suspended.keep_head(lazy.table, STRADDLING, head)
    await read(lazy, STRADDLING)
    assert len(source.requests) > 1


async def test_only_the_latest_heads_are_kept(node: Node) -> None:
    lazy, _ = node.mount(GZIP)
    kept = SuspendedDecodings()
    for chunk in range(MOST_HEADS + 3):
        kept.keep_head(lazy.table, chunk, Head(0, 0, b"", b""))
    found = [kept.head(lazy.table, chunk) is not None for chunk in range(MOST_HEADS + 3)]
    assert found == [False] * 3 + [True] * MOST_HEADS


async def read_all(root: Path, layer: MadeLayer, order: list[int]) -> MemorySource:
    """Read a layer's chunks one after the other."""
    async with open_node(root) as node:
        lazy, source = node.mount(layer)
        for chunk in order:
            await read(lazy, chunk)
            await node.quiet()
        assert lazy.stored.complete
        lazy.close()
    return source


@settings(max_examples=20)
@given(order=st.permutations(range(21)))
async def test_whoever_reads_one_after_the_other_has_nothing_fetched_twice(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    source = await read_all(tmp_path_factory.mktemp("store"), GZIP, order)
    assert source.served <= len(GZIP.blob)


@settings(max_examples=20)
@given(order=st.permutations(range(21)), frame=st.sampled_from(sorted(FRAMES)))
async def test_chunks_are_joined_wherever_seek_points_are(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], frame: int
) -> None:
    await read_all(tmp_path_factory.mktemp("store"), FRAMES[frame], order)


# --- what is kept ---


def advanced(origin: Origin, first: int, size: int) -> Decoding:
    """A decoding from the seek point before a chunk on that has come `size` bytes far."""
    decoding = Decoding(origin.table, first)
    decoding.receive(GZIP.blob[decoding.position : decoding.position + size])
    whole = origin.table.span(first, origin.table.chunk_count - 1)
    for _ in decoding.chunks(origin, whole):
        pass
    return decoding


async def test_the_one_that_has_come_farthest_is_resumed_once(node: Node) -> None:
    lazy, _ = node.mount(GZIP)
    kept = SuspendedDecodings()
    short, long = (advanced(lazy.origin, 0, size) for size in (300_000, 600_000))
    for decoding in (long, short):
        kept.keep(lazy.table, decoding)
    assert kept.nearest(lazy.table, STRADDLING - 1) == (long.position, long.next_chunk)
    assert kept.start(lazy.table, STRADDLING - 1) is long
    assert kept.start(lazy.table, STRADDLING - 1) is short
    assert kept.start(lazy.table, STRADDLING - 1).next_chunk == 0


async def test_what_saves_nothing_is_not_kept(node: Node) -> None:
    lazy, _ = node.mount(GZIP)
    kept = SuspendedDecodings()
    kept.keep(lazy.table, advanced(lazy.origin, 0, 1000))
    kept.keep(lazy.table, advanced(lazy.origin, 0, len(GZIP.blob)))
    broken = advanced(lazy.origin, 0, 300_000)
    broken.broken = True
    kept.keep(lazy.table, broken)
    for chunk in range(lazy.table.chunk_count):
        assert kept.nearest(lazy.table, chunk)[0] == lazy.table.span(chunk, chunk).start


async def test_only_the_latest_are_kept(node: Node) -> None:
    lazy, _ = node.mount(GZIP)
    kept = SuspendedDecodings()
    made = [advanced(lazy.origin, 0, 300_000) for _ in range(MOST_SUSPENDED + 3)]
    for decoding in made:
        kept.keep(lazy.table, decoding)
    started = [kept.start(lazy.table, 5) for _ in made]
    assert started[:MOST_SUSPENDED] == made[3:]
    assert not set(started[MOST_SUSPENDED:]) & set(made)


async def test_of_those_with_large_windows_fewer_are_kept(node: Node) -> None:
    lazy, _ = node.mount(ONE_FRAME)
    kept = SuspendedDecodings()
    made = [Decoding(lazy.table, 0) for _ in range(MOST_SUSPENDED)]
    for decoding in made:
        decoding.receive(ONE_FRAME.blob[:100_000])
        kept.keep(lazy.table, decoding)
    started = [kept.start(lazy.table, 5) for _ in made]
    assert [one in made for one in started].count(True) == MOST_SUSPENDED // WEIGHT


async def test_nothing_is_kept_of_a_layer_that_is_complete_or_goes_away(node: Node) -> None:
    kept = node.scheduler._suspended
    lazy, _ = node.mount(GZIP)
    await read(lazy, 1)
    await node.quiet()
    assert kept._kept != []
    await node.scheduler.fill(lazy.origin, range(lazy.table.chunk_count))
    assert kept._kept == []
    lazy.close()

    other, _ = node.mount(ONE_FRAME)
    await read(other, 1)
    await node.quiet()
    other.close()
    assert kept._kept == []


async def test_nor_of_one_that_goes_away_while_it_is_on_its_way(node: Node) -> None:
    lazy, _ = node.mount(GZIP, Fault(good=400_000, hangs=True))
    lazy.stored.retain()  # the reader may not have noticed yet, and others may use the layer
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_must_fail, lazy)
        await wait_all_tasks_blocked(cushion=0.05)
        lazy.close()
    await node.quiet()
    lazy.stored.close()
    assert node.scheduler._suspended._kept == []


async def _must_fail(layer: LazyLayer) -> None:
    with pytest.raises(FetchError):
        await layer.read((STRADDLING - 1) * CHUNK_SIZE, 9)
