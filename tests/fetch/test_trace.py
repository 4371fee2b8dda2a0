"""A start is recorded: who waited, and what was on the wire. What is here leaves no trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch import trace as trace_module
from snapshotter.fetch.stats import BOUNDS, Durations
from snapshotter.fetch.trace import StartTrace, covered
from snapshotter.fetch.wants import Priority
from tests.support.blobs import make_layer, sample_bytes
from tests.support.sources import MemorySource

if TYPE_CHECKING:
    from tests.support.fetching import Node

LAYER = make_layer(sample_bytes(8 * CHUNK_SIZE), Codec.ZSTD)


async def test_a_read_that_waits_is_recorded_and_one_that_does_not_is_counted(node: Node) -> None:
    trace = StartTrace()
    source = MemorySource(LAYER, delay=0.05)
    lazy = node.attach(LAYER, source, trace)
    await lazy.read(2 * CHUNK_SIZE + 5, 100)
    (stall,) = trace.stalls
    assert (stall.layer, stall.offset, stall.length) == (0, 2 * CHUNK_SIZE + 5, 100)
    assert stall.seconds >= 0.05
    (exchange,) = trace.exchanges
    assert exchange.kind is Priority.BLOCKED
    assert exchange.size == source.served
    assert stall.at <= exchange.at <= exchange.answered <= exchange.ended
    assert trace.arrived[0, 2] is Priority.BLOCKED
    stats = node.scheduler.stats
    assert (stats.hits, sum(stats.stalls.counts), sum(stats.latencies.counts)) == (0, 1, 1)
    await lazy.read(2 * CHUNK_SIZE, 100)
    assert lazy.read_now(2 * CHUNK_SIZE, 10) is not None
    assert (len(trace.stalls), stats.hits) == (1, 2)
    await node.quiet()


async def test_fill_is_recorded_as_fill(node: Node) -> None:
    trace = StartTrace()
    lazy = node.attach(LAYER, MemorySource(LAYER), trace)
    await node.scheduler.fill(lazy.origin, range(8))
    assert {exchange.kind for exchange in trace.exchanges} == {Priority.FILL}
    assert {*trace.arrived.values()} == {Priority.FILL}
    assert len(trace.arrived) == 8


async def test_the_record_is_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MOST", 2)
    monkeypatch.setattr(trace_module, "MOST_CHUNKS", 2)
    trace = StartTrace()
    lazy = node.attach(LAYER, MemorySource(LAYER), trace)
    for chunk in range(0, 8, 2):
        await lazy.read(chunk * CHUNK_SIZE, 1)
    await node.quiet()
    assert (len(trace.stalls), len(trace.exchanges), len(trace.arrived)) == (2, 2, 2)
    monkeypatch.setattr(trace_module, "MOST", 100)
    monkeypatch.setattr(trace_module, "WINDOW", 0)
    await lazy.read(CHUNK_SIZE, 1)
    await node.quiet()
    assert len(trace.stalls) == 2


async def test_steps_follow_each_other() -> None:
    trace, began = StartTrace(), trio.current_time()
    began = trace.step("resolve", began)
    trace.step("open", began)
    first, second = trace.steps
    assert first.at + first.seconds == pytest.approx(second.at)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted)))
def test_time_that_several_waited_counts_once(spans: list[list[int]]) -> None:
    covers = {moment for begin, end in spans for moment in range(begin, end)}
    assert covered([(begin, end) for begin, end in spans]) == len(covers)


@given(st.lists(st.floats(0, 100)))
def test_every_duration_is_in_one_bucket(seconds: list[float]) -> None:
    durations = Durations()
    for one in seconds:
        durations.add(one)
    assert sum(durations.counts) == len(seconds)
    assert durations.total == pytest.approx(sum(seconds))
    for number, bound in enumerate(BOUNDS):
        assert sum(durations.counts[: number + 1]) == sum(one <= bound for one in seconds)
