"""Two runs that meet inside a chunk: the first ends at the seek point there, and waits for the
rest, which the second one brings anyway."""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from index.codecs import points
from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch import plan, run
from snapshotter.fetch.scheduler import Patience
from snapshotter.fetch.wants import Priority
from tests.support.blobs import make_layer, sample_bytes
from tests.support.fetching import open_node
from tests.support.sources import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from snapshotter.fetch.layer import LazyLayer
    from tests.support.fetching import Node
    from tests.support.sources import MemorySource

COUNT = 20
RAW = sample_bytes(COUNT * CHUNK_SIZE)
with patch.multiple(points, APPROACH=200_000, MOST_SPACING=1 << 20, WINDOW_SHARE=0):
    GZIP = make_layer(RAW, Codec.GZIP)
POINTS = GZIP.table.raw_offsets
INSIDE = [offset // CHUNK_SIZE for offset in POINTS if offset % CHUNK_SIZE]
BEFORE = INSIDE[0]  # the chunk that has the second seek point inside
JOINT = GZIP.table.bit_offsets[1] // 8


def test_the_layer_has_what_is_tested_here() -> None:
    assert len(INSIDE) >= 4
    assert BEFORE >= 2
    assert INSIDE[1] > BEFORE + 1


@contextmanager
def runs_of(chunks: int) -> Iterator[None]:
    """Runs are planned for so many chunks, and go on for no more."""
    longest = patch.dict(plan.MAX_CHUNKS, dict.fromkeys(Priority, chunks))
    with longest, patch.object(run, "LONGEST_RUN", chunks):
        yield


async def read(layer: LazyLayer, chunk: int) -> None:
    assert await layer.read(chunk * CHUNK_SIZE, 9) == RAW[chunk * CHUNK_SIZE :][:9]


def twice(source: MemorySource) -> int:
    """Bytes that were asked for although another request had them."""
    spans = sorted(source.requests)
    return sum(max(0, end - start) for (_, end), (start, _) in pairwise(spans))


async def both_sides(node: Node, *faults: Fault | None) -> tuple[LazyLayer, MemorySource]:
    """A layer of which what is behind a seek point is being fetched, and has not come."""
    lazy, source = node.mount(GZIP, *faults)
    source.gate = trio.Event()
    node.scheduler.advise(lazy.origin, [BEFORE + 1], Priority.STARTUP)
    await wait_all_tasks_blocked()
    assert [start for start, _ in source.requests] == [JOINT]
    return lazy, source


async def test_a_run_ends_where_another_one_has_begun(node: Node) -> None:
    lazy, source = await both_sides(node)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, lazy, BEFORE)
        await wait_all_tasks_blocked()
        assert source.requests[1][1] == JOINT
        assert source.gate is not None
        source.gate.set()
    assert len(source.requests) == 2


@pytest.mark.parametrize("chunks", [4, 5, 6])
async def test_a_layer_that_is_fetched_by_many_runs_at_once_comes_once(
    node: Node, chunks: int
) -> None:
    lazy, source = node.mount(GZIP)
    source.delay = 0.001
    with runs_of(chunks):
        await node.scheduler.fill(lazy.origin, range(COUNT))
    assert source.most_open > 1
    assert twice(source) == 0
    assert source.served <= len(GZIP.blob)
    assert lazy.stored.complete


@settings(max_examples=30)
@given(
    chunks=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=8),
    pauses=st.lists(st.sampled_from((0, 0.001, 0.01)), min_size=8, max_size=8),
    limit=st.integers(2, 8),
)
async def test_whoever_reads_beside_it_gets_what_is_right(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[int], pauses: list[float], limit: int
) -> None:
    with runs_of(limit):
        async with open_node(tmp_path_factory.mktemp("store")) as node:
            lazy, source = node.mount(GZIP)
            source.delay = 0.0005
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(node.scheduler.fill, lazy.origin, range(COUNT))
                    for chunk, pause in zip(chunks, pauses, strict=False):
                        nursery.start_soon(read, lazy, chunk)
                        await trio.sleep(pause)
            assert lazy.stored.complete
            lazy.close()


# --- when the other one does not bring it ---


async def test_who_waits_goes_on_alone_when_the_other_run_fails(node: Node) -> None:
    broken = [Fault(good=0)] * 5  # as often as it is tried in the background
    lazy, source = await both_sides(node, broken[0], None, *broken[1:])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, lazy, BEFORE)
        await wait_all_tasks_blocked()
        assert source.gate is not None
        source.gate.set()
    assert source.requests[-1][0] == JOINT


async def test_who_waits_goes_on_alone_when_the_other_run_hangs(tmp_path: Path) -> None:
    async with open_node(tmp_path, Patience(read=60, source=60, give_way=0.05)) as node:
        lazy, source = await both_sides(node, Fault(good=0, hangs=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, lazy, BEFORE)
            await wait_all_tasks_blocked()
            assert source.gate is not None
            source.gate.set()
        assert len(source.requests) == 3


async def test_who_waits_goes_on_alone_when_the_other_image_goes_away(node: Node) -> None:
    other, _ = await both_sides(node, Fault(good=0, hangs=True))
    lazy, source = node.mount(GZIP)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, lazy, BEFORE)
        await wait_all_tasks_blocked(cushion=0.05)
        assert [end for _, end in source.requests] == [JOINT]
        other.close()
    assert len(source.requests) == 2


async def test_damage_behind_the_seek_point_is_mended_on_both_sides(node: Node) -> None:
    lazy, source = await both_sides(node, Fault(change=lambda at, data: bytes(len(data))))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, lazy, BEFORE)
        nursery.start_soon(read, lazy, BEFORE + 1)
        await wait_all_tasks_blocked()
        assert source.gate is not None
        source.gate.set()
    assert source.doubts >= 1


# --- how urgent the other one is ---


async def test_fill_does_not_give_way_to_who_waits_for_it(tmp_path: Path) -> None:
    """Or the reader would wait as long as fill is held back: here for ever."""
    async with open_node(tmp_path, Patience(give_way=3600)) as node:
        lazy, source = node.mount(GZIP)
        node.scheduler._transfer.hold.until = math.inf
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.scheduler.fill, lazy.origin, [BEFORE + 1])
            await wait_all_tasks_blocked()
            assert source.requests == []
            await read(lazy, BEFORE)
            assert twice(source) == 0
            node.scheduler.release_fill()
