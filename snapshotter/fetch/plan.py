"""How far a run reaches: which wanted chunks are fetched together."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from index.tables import CHUNK_SIZE
from snapshotter.fetch.run import Run
from snapshotter.fetch.wants import Priority

if TYPE_CHECKING:
    from collections.abc import Mapping

    from index.tables import LayerTable
    from snapshotter.fetch.wants import LayerWants, Want, WantTable

MAX_CHUNKS: Mapping[Priority, int] = {
    Priority.FILL: (16 << 20) // CHUNK_SIZE,
    Priority.STARTUP: (4 << 20) // CHUNK_SIZE,
    Priority.READAHEAD: (4 << 20) // CHUNK_SIZE,
    Priority.BLOCKED: (4 << 20) // CHUNK_SIZE,
}
"""Chunks that a run is planned for. Long enough to fill a link, short enough that several
connections share the work."""

MAX_GAP = 4
"""Chunks that nobody wants between two that are merged, if they would be decoded twice else."""

MAX_WASTE = 1 << 20
"""Raw bytes that a fill run may leave to be decoded twice rather than go on to the next seek
point. Runs that others follow end, in their second half, where that is least: right after a seek
point at best."""


def plan_run(wants: WantTable, want: Want) -> Run:
    """Take a queued want, and the queued ones around it that are best fetched with it.

    Raises FormatError if the layer's table is at odds with itself.
    """
    layer, origin = want.layer, want.origin
    assert want.priority is not None
    first = last = want.chunk
    limit = MAX_CHUNKS[want.priority]
    while last - first + 1 < limit and _queued(layer, first - 1, want.priority):
        first -= 1
    while last - first + 1 < limit:
        following = _following(layer, origin.table, first, last)
        if following is None:
            break
        last = following
    fill = want.priority is Priority.FILL
    if _queued(layer, last + 1, Priority.FILL):
        earliest = max((first + last) // 2 + 1, want.chunk)
        last = min(range(last, earliest - 1, -1), key=partial(_waste, origin.table))
    run = Run(origin, layer, first, last)
    if fill and last < run.last_chunk and _waste(origin.table, last) <= MAX_WASTE:
        run.stop_before(last + 1)
    for chunk in range(run.next_chunk, run.last_chunk + 1):
        if _queued(layer, chunk, Priority.FILL):
            wants.take(layer.wants[chunk], run)
    return run


def _following(layer: LayerWants, table: LayerTable, first: int, last: int) -> int | None:
    """The next queued chunk, if it comes right after the last, or after a gap that would have to
    be decoded twice otherwise."""
    if _queued(layer, last + 1, Priority.FILL):
        return last + 1
    for chunk in range(last + 2, last + 2 + MAX_GAP):
        if _queued(layer, chunk, Priority.FILL):
            overlap = table.span(first, last).raw_end > table.span(chunk, chunk).raw_start
            return chunk if overlap else None
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
