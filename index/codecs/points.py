"""Where in a gzip blob decompression should be able to start: which borders become seek points.

Who reads a chunk fetches and decodes from the point before it on. A point costs a row in the table
and its window, which is most of a file index; and windows differ by three orders of magnitude from
one border of deflate blocks to the next. So points are where they are cheap, and near chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from index.codecs.inflate import WINDOW_SIZE
from index.codecs.window import NO_LIMIT, WindowProbe, keep
from index.tables import CHUNK_SIZE, SeekPoint

if TYPE_CHECKING:
    from collections.abc import Iterable

APPROACH = 96 << 10
"""Raw bytes before the start of a chunk. Only borders in there may become points, so that little
of what is fetched for that chunk is before it."""

LEAST_SPACING = CHUNK_SIZE
"""Raw bytes from one point to the next, at least: more would help nobody. The start of a member
needs no window and becomes a point from here on, wherever it is."""

MOST_SPACING = 3 << 20
"""Raw bytes after a point from which on the next border becomes one whatever it costs."""

WINDOW_SHARE = 0.008
POINT_COST = 40
"""A border becomes a point if no more bytes of its window are needed than this share of the blob
since the last point, less what a point costs anyway. So the index keeps its budget, whatever the
data is: a needed byte takes 0.7 bytes of it. docs/benchmarks.md, "Where seek points are", has what
other shares would give."""

MOST_FOLLOWING = 2 * WINDOW_SIZE
"""Bytes of input that are looked at after a border. The next WINDOW_SIZE raw bytes take fewer, but
for streams of nearly empty blocks, which nobody makes: such a border is no point."""


def next_look(raw_offset: int, noted: int) -> int:
    """The first raw offset, from `raw_offset` on, at which a border of blocks may become a point.

    `noted` is that of the last border that might, or of the start of a member.
    """
    earliest = max(raw_offset, noted + WINDOW_SIZE)  # one is followed at a time
    approach = earliest + max(0, -earliest % CHUNK_SIZE - APPROACH)
    return min(approach, max(earliest, noted + MOST_SPACING))


@dataclass(slots=True)
class Border:
    """A place between two deflate blocks, or at the start of a member, which has no `window`.

    Offsets are as in SeekPoint; `last_byte` is the one that holds the bits before. `following` is
    the input from there on, for the next WINDOW_SIZE bytes of raw space or all of the member, or
    MOST_FOLLOWING bytes of it.
    """

    raw_offset: int
    bit_offset: int
    last_byte: int = 0
    window: bytes | None = None
    following: bytes = b""


class PointChooser:
    """Goes through borders in ascending order; what it chooses depends on nothing else."""

    def __init__(self) -> None:
        self.points: list[SeekPoint] = []
        self.windows: list[bytes] = []
        self._probe = WindowProbe()

    def consider(self, borders: Iterable[Border]) -> None:
        """The next borders. The first of all, at raw 0, becomes a point always."""
        for border in borders:
            if not self.points or border.raw_offset - self.points[-1].raw_offset >= LEAST_SPACING:
                self._consider(border)

    def finish(self, raw_size: int) -> None:
        """Raw space ends here."""
        if len(self.points) > 1 and self.points[-1].raw_offset == raw_size:
            self.points.pop()  # nothing follows it, so it has got no window

    def _consider(self, border: Border) -> None:
        window = None
        if border.window is not None:
            needed = self._probe.needed(
                border.following,
                unused_bits=-border.bit_offset % 8,
                last_byte=border.last_byte,
                most=self._affordable(border),
            )
            if needed is None:
                return
            if needed:
                window = keep(border.window, needed)
                self.windows.append(window)
        self.points.append(SeekPoint(border.raw_offset, border.bit_offset, window is not None))

    def _affordable(self, border: Border) -> int:
        """Needed bytes that the window of a border may have."""
        last = self.points[-1]
        if border.raw_offset - last.raw_offset >= MOST_SPACING:
            return NO_LIMIT
        return int(WINDOW_SHARE * (border.bit_offset - last.bit_offset) / 8) - POINT_COST
