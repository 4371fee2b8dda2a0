"""A blob on its way through a decoder, from a seek point on: received, decoded, cut into chunks.

A decoding outlives its run: whoever wants what comes next goes on where it is, instead of at the
seek point before. Layers that nobody made for lazy pulling have few of these (gzip: one for 1
or 2 MiB of raw space), and a start reads a little here and a little there.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from index.codecs import decoder
from index.errors import CodecError, FirstByteError
from index.tables import CHUNK_SIZE, Codec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from index.codecs.base import Decoder
    from index.tables import LayerTable, Span
    from snapshotter.fetch.source import Origin

SLICE_SPAN = 32 << 20
SLICE = 4 << 10
"""Spans of more raw bytes than SLICE_SPAN are decoded from slices of SLICE compressed bytes: a
decoder hands out all that its input holds, and zstd can put 128 KiB of zeros into 4 bytes."""

MOST_SUSPENDED = 40
"""Decodings of gzip that are kept. Each may hold a chunk, as much that was received but not
decoded, and its decoder's window: 0.6 MB. A start goes back and forth between as many places: with
8 that of scipy fetched 9 of 77 MB twice."""

WEIGHT = 5
"""Decodings of gzip that one of another codec counts for: zstd's window has up to 8 MiB."""

MOST_HEADS = 64
"""Heads that are kept, each of less than CHUNK_SIZE."""

FEED = 64 << 10
"""Compressed bytes that are decoded at once, so that what comes of them is copied once, into its
chunk. Between 16 and 256 KiB isal is as fast."""

WORTH_KEEPING = 32 << 10
"""Compressed bytes that a decoding must save whoever goes on with it."""


def expected_end(table: LayerTable, chunk: int) -> int:
    """About how much of the blob it takes to decode all of a chunk. Raises FormatError if the
    table has no such chunk."""
    span = table.span(chunk, chunk)
    raw_end = chunk * CHUNK_SIZE + table.chunk_length(chunk)
    share = (raw_end - span.raw_start) / (span.raw_end - span.raw_start)
    return span.start + math.ceil(share * (span.end - span.start))


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a chunk that begins before a seek point: raw space from there, `raw_start`, on.

    `position` is where in the blob the seek point is, `shared` the byte that it is inside of, or
    empty. Unverified, as it is no chunk.
    """

    raw_start: int
    position: int
    shared: bytes
    data: bytes


class Decoding:
    """Begins at the seek point before chunk `first`.

    `position` is the next byte of the blob to be received, `next_chunk` the next chunk to be cut;
    `buffered` bytes were received but not decoded. It is `broken` after an error, and when what
    came was not what it should have been. Its `weight` is how much memory it takes to keep it, in
    that of gzip.
    """

    def __init__(self, table: LayerTable, first: int) -> None:
        """Raises FormatError if the table has no such chunk."""
        span = table.span(first, first)
        self.point, self.start, self.raw_start = span.point, span.start, span.raw_start
        self.weight = 1 if table.codec is Codec.GZIP else WEIGHT
        self.position = span.start
        self.raw_position = span.raw_start
        self.next_chunk = -(-span.raw_start // CHUNK_SIZE)
        self.buffered = 0
        self.broken = False
        self._pieces: list[bytes] = []
        self._decoder: Decoder | None = None
        self._partial: list[memoryview] = []  # of the next chunk
        self._partial_size = 0
        self._first = b""
        self._head = bytearray()
        self._head_size = min(self.next_chunk * CHUNK_SIZE, table.raw_size) - span.raw_start

    def receive(self, piece: bytes) -> None:
        """Take what follows."""
        if not self._first:
            self._first = piece[:1]
        self._pieces.append(piece)
        self.buffered += len(piece)
        self.position += len(piece)

    def chunks(self, origin: Origin, span: Span) -> Iterator[tuple[int, bytes]]:
        """Decode what was received, as part of `span`, and yield the chunks that are complete.

        Raises CodecError; the decoding is of no more use then.
        """
        pieces, self._pieces = self._pieces, []
        begin = self.position - self.buffered
        self.buffered = 0
        try:
            yield from self._decode(origin, span, begin, pieces)
        except FirstByteError:
            self.broken = True
            raise

    @property
    def owes_head(self) -> bool:
        """Whether what comes before its first chunk is still to come, or to be taken."""
        return self._head_size > 0 and not self.broken

    def head(self, table: LayerTable) -> Head | None:
        """What came before its first chunk, when all of that is here, until it is dropped."""
        if not self._head_size or len(self._head) < self._head_size:
            return None
        shared = self._first if table.bit_offsets[self.point] % 8 else b""
        return Head(self.raw_start, self.start, shared, bytes(self._head))

    def drop_head(self) -> None:
        """It was taken."""
        self._head_size = 0
        self._head.clear()

    def reaches(self, head: Head) -> bool:
        """Whether decoding has come as far as the end of its next chunk, which is a `head`."""
        return self.raw_position >= head.raw_start

    def join(self, head: Head) -> bytes:
        """The next chunk, whose end a head is that decoding `reaches`."""
        missing = self.raw_position - head.raw_start
        partial = b"".join(self._partial)
        self._drop_partial()
        self.next_chunk += 1
        return partial[: len(partial) - missing] + head.data

    def _decode(
        self, origin: Origin, span: Span, begin: int, pieces: Iterable[bytes]
    ) -> Iterator[tuple[int, bytes]]:
        if self._decoder is None:
            self._decoder = self._make_decoder(origin)
        self._decoder.allow(span.raw_end - self.raw_start)
        for piece in pieces:
            for data in _slices(origin.table, span, begin, piece):
                yield from self._cut(origin.table, self._decoder.feed(data))
            begin += len(piece)
        if self.position >= span.end and self.raw_position < span.raw_end:
            raise CodecError(
                f"bytes {self.start} to {span.end} of {origin.table} decode to "
                f"{self.raw_position - self.raw_start} bytes instead of "
                f"{span.raw_end - self.raw_start}"
            )

    def _make_decoder(self, origin: Origin) -> Decoder:
        table = origin.table
        plain = table.codec is Codec.PLAIN
        return decoder(
            table.codec,
            bit_offset=8 * self.start if plain else table.bit_offsets[self.point],
            window=origin.source.window(self.point),
            limit=0,
        )

    def _cut(self, table: LayerTable, raw: bytes) -> Iterator[tuple[int, bytes]]:
        used = min(len(raw), max(0, self.next_chunk * CHUNK_SIZE - self.raw_position))
        if len(self._head) < self._head_size:
            self._head += memoryview(raw)[:used]
        self.raw_position += len(raw)
        view = memoryview(raw)
        while self.next_chunk < table.chunk_count:
            needed = table.chunk_length(self.next_chunk) - self._partial_size
            if len(raw) - used < needed:
                self._partial.append(view[used:])
                self._partial_size += len(raw) - used
                break
            data = b"".join((*self._partial, view[used : used + needed]))
            self._drop_partial()
            used += needed
            self.next_chunk += 1
            yield self.next_chunk - 1, data

    def _drop_partial(self) -> None:
        self._partial.clear()
        self._partial_size = 0


def _slices(table: LayerTable, span: Span, begin: int, data: bytes) -> Iterator[memoryview]:
    """What was received, from byte `begin` of the blob on, in slices to be decoded one by one:
    small ones where little may become much, and cut at seek points, so that a broken frame does not
    take those before it along."""
    bits = table.bit_offsets
    step = SLICE if span.raw_end - span.raw_start > SLICE_SPAN else FEED
    view, start = memoryview(data), 0
    point = bisect_right(bits, 8 * begin)
    while start < len(data):
        stop = start + step
        while point < len(bits) and -(-bits[point] // 8) - begin <= start:
            point += 1
        if point < len(bits):
            stop = min(stop, -(-bits[point] // 8) - begin)
        yield view[start:stop]
        start = stop


class SuspendedDecodings:
    """Decodings whose runs have ended, by the digest of their blob. The latest are kept.

    So are heads: whoever brings what is before a seek point need not go on past that. They alone
    are for every thread.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[bytes, Decoding]] = []
        self._heads: OrderedDict[tuple[bytes, int], Head] = OrderedDict()

    def keep(self, table: LayerTable, decoding: Decoding) -> None:
        """Keep a decoding, if going on with it will save anybody much."""
        following = decoding.next_chunk
        if decoding.broken or following >= table.chunk_count:
            return
        if decoding.position - table.span(following, following).start >= WORTH_KEEPING:
            self._kept.append((table.digest, decoding))
            while sum(one.weight for _, one in self._kept) > MOST_SUSPENDED:
                del self._kept[0]

    def nearest(self, table: LayerTable, chunk: int) -> tuple[int, int]:
        """Where to start for a chunk: the byte of the blob, and the first chunk that comes then.

        Raises FormatError if the table has no such chunk.
        """
        found = self._best(table, chunk)
        if found is not None:
            return found.position, found.next_chunk
        span = table.span(chunk, chunk)
        return span.start, -(-span.raw_start // CHUNK_SIZE)

    def start(self, table: LayerTable, chunk: int) -> Decoding:
        """Start there. Raises FormatError if the table has no such chunk."""
        found = self._best(table, chunk)
        if found is None:
            return Decoding(table, chunk)
        self._kept.remove((table.digest, found))
        return found

    def _best(self, table: LayerTable, chunk: int) -> Decoding | None:
        """The decoding that brings a chunk soonest, unless a seek point does."""
        usable = [
            decoding
            for digest, decoding in self._kept
            if digest == table.digest and decoding.next_chunk <= chunk
        ]
        best = max(usable, key=lambda decoding: decoding.position, default=None)
        if best is None or best.position <= table.span(chunk, chunk).start:
            return None
        return best

    def discard(self, table: LayerTable) -> None:
        """Nobody will go on with this blob."""
        self._kept = [entry for entry in self._kept if entry[0] != table.digest]
        for digest, chunk in list(self._heads):
            if digest == table.digest:
                self.drop_head(table, chunk)

    # --- heads ---

    def keep_head(self, table: LayerTable, chunk: int, head: Head) -> None:
        """Keep the end of a chunk."""
        self._heads[table.digest, chunk] = head
        while len(self._heads) > MOST_HEADS:
            self._heads.popitem(last=False)

    def head(self, table: LayerTable, chunk: int) -> Head | None:
        return self._heads.get((table.digest, chunk))

    def drop_head(self, table: LayerTable, chunk: int) -> None:
        """It was used, or it is wrong."""
        self._heads.pop((table.digest, chunk), None)
