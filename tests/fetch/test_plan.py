"""Fill runs end where the next one has little to decode twice."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from index.tables import CHUNK_SIZE, Codec, LayerTable
from snapshotter.fetch.decoding import SuspendedDecodings
from snapshotter.fetch.plan import MAX_CHUNKS, MAX_WASTE, plan_run
from snapshotter.fetch.source import Origin
from snapshotter.fetch.wants import Priority, Waiter, WantTable

if TYPE_CHECKING:
    from snapshotter.fetch.run import Run

KIB = 1 << 10


def table(raw_size: int, points: list[int]) -> LayerTable:
    """A layer that compresses to a half, with seek points at these raw offsets."""
    chunks = -(-raw_size // CHUNK_SIZE)
    return LayerTable(
        digest=bytes(32),
        diff_id=bytes(32),
        codec=Codec.GZIP,
        blob_size=raw_size // 2 + 1,
        raw_size=raw_size,
        raw_offsets=points,
        bit_offsets=[8 * (point // 2) for point in points],
        window_flags=bytes(len(points)),
        digests=bytes(32 * chunks),
    )


class Nowhere:
    """A store that has nothing, and a source that is not asked."""

    key = b"layer"

    def has(self, chunk: int) -> bool:
        return False

    def window(self, point: int) -> bytes | None:
        raise AssertionError


def planned(layer: LayerTable, chunks: set[int]) -> list[Run]:
    """All runs for chunks that fill wants, in order."""
    wants = WantTable()
    nowhere: object = Nowhere()
    origin = Origin(layer, nowhere, nowhere)  # type: ignore[arg-type]
    waiter = Waiter(origin, Priority.FILL)
    for chunk in sorted(chunks):
        wants.want(waiter, chunk)
    runs = []
    queue = wants.queues[Priority.FILL]
    while queue:
        runs.append(plan_run(wants, next(iter(queue)), SuspendedDecodings()))
    return runs


@given(
    chunks=st.integers(1, 300),
    gaps=st.lists(st.integers(300 * KIB, 4000 * KIB), max_size=60),
    wanted=st.data(),
)
async def test_runs_bring_every_wanted_chunk_once(
    chunks: int, gaps: list[int], wanted: st.DataObject
) -> None:
    raw_size = chunks * CHUNK_SIZE - 77
    points = [0]
    for gap in gaps:
        if points[-1] + gap < raw_size:
            points.append(points[-1] + gap)
    some = wanted.draw(st.sets(st.integers(0, chunks - 1), min_size=1))
    runs = planned(table(raw_size, points), some)
    brought = [chunk for run in runs for chunk in run.wants]
    assert sorted(brought) == sorted(some)
    for run in runs:
        assert all(run.covers(chunk) for chunk in run.wants)
        assert run.span.raw_start <= min(run.wants) * CHUNK_SIZE


async def test_little_is_decoded_twice_between_fill_runs() -> None:
    layer = table(120_000_000, list(range(0, 120_000_000, 2_100_000)))
    runs = planned(layer, set(range(layer.chunk_count)))
    assert len(runs) >= layer.chunk_count // MAX_CHUNKS[Priority.FILL]
    for run, following in pairwise(runs):
        last = max(run.wants)
        assert min(following.wants) == last + 1
        assert (last + 1) * CHUNK_SIZE - following.span.raw_start <= 300 * KIB <= MAX_WASTE


async def test_a_stream_with_one_seek_point_is_one_run() -> None:
    layer = table(500 * CHUNK_SIZE, [0])
    (run,) = planned(layer, set(range(500)))
    assert len(run.wants) == 500
