"""How far a run reaches: which wanted chunks are fetched together."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from index.tables import CHUNK_SIZE
from snapshotter.fetch.decoding import expected_end
from snapshotter.fetch.run import LONGEST_RUN, Run
from snapshotter.fetch.wants import Priority

if TYPE_CHECKING:
    from collections.abc import Mapping

    from index.tables import LayerTable
    from snapshotter.fetch.decoding import SuspendedDecodings
    from snapshotter.fetch.wants import LayerWants, Want, WantTable

MAX_CHUNKS: Mapping[Priority, int] = {
    Priority.FILL: LONGEST_RUN,
    Priority.STARTUP: (4 << 20) // CHUNK_SIZE,
    Priority.READAHEAD: (4 << 20) // CHUNK_SIZE,
    Priority.BLOCKED: (4 << 20) // CHUNK_SIZE,
}
"""Chunks that a run is planned for."""

MAX_GAP = 4
"""Chunks that nobody wants between two that are merged, if more would be decoded twice else."""

MAX_WASTE = 1 << 20
"""Raw bytes that a run may leave to be decoded twice, if others follow, rather than go on to the
next seek point. It ends, in its second half, where that is least: right after a seek point at
best."""


def plan_run(wants: WantTable, want: Want, suspended: SuspendedDecodings) -> Run:
    """Take a queued want, and the queued ones around it that are best fetched with it. The run goes
    on with a decoding of an earlier one, if that is sooner there than from any seek point.

    Raises FormatError if the layer's table is at odds with itself.
    """
    layer, origin = want.layer, want.origin
    assert want.priority is not None
    first = last = want.chunk
    limit = MAX_CHUNKS[want.priority]
    while last - first + 1 < limit and _queued(layer, first - 1, want.priority):
        first -= 1
    while last - first + 1 < limit:
        following = _following(layer, origin.table, last, suspended)
        if following is None:
            break
        last = following
    others_follow = _queued(layer, last + 1, Priority.FILL)
    if others_follow:
        earliest = max((first + last) // 2 + 1, want.chunk)
        last = min(range(last, earliest - 1, -1), key=partial(_waste, origin.table))
    run = Run(origin, layer, first, last, suspended)
    leaves_rest = want.priority is Priority.FILL or others_follow
    stops = leaves_rest and last < run.last_chunk and _waste(origin.table, last) <= MAX_WASTE
    if stops:
        run.stop_before(last + 1)
    for chunk in range(run.next_chunk, run.last_chunk + 1):
        if _queued(layer, chunk, Priority.FILL) and run.covers(chunk):
            wants.take(layer.wants[chunk], run)
    straddling = run.last_chunk + 1  # a seek point
    if not stops and _queued(layer, straddling, Priority.FILL) and run.covers(straddling):
        run.reach(straddling)
        wants.take(layer.wants[straddling], run)
    return run


def _following(
    layer: LayerWants, table: LayerTable, last: int, suspended: SuspendedDecodings
) -> int | None:
    """The next queued chunk, if it comes right after the last, or after a gap that is less than
    what would have to be decoded twice otherwise."""
    if _queued(layer, last + 1, Priority.FILL):
        return last + 1
    for chunk in range(last + 2, last + 2 + MAX_GAP):
        if _queued(layer, chunk, Priority.FILL):
            end = expected_end(table, last)
            start, _ = suspended.nearest(table, chunk)
            return chunk if end - start > expected_end(table, chunk - 1) - end else None
    return None


def _waste(table: LayerTable, last: int) -> int:
    """Raw bytes that are decoded twice if one run ends with a chunk and another goes on there."""
    following = last + 1
    return following * CHUNK_SIZE - table.span(following, following).raw_start


def _queued(layer: LayerWants, chunk: int, at_least: Priority) -> bool:
    """Whether a chunk is wanted, not in flight, and urgent enough."""
    want = layer.wants.get(chunk)
    if want is None or want.run is not None or want.priority is None:
        return False
    return want.priority >= at_least
