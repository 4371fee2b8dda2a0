"""One run: a span of a blob that is fetched, decoded and cut into chunks, front to back.

A run outlives the requests it takes: when one fails, or when it is cut short to let others pass,
the next goes on where the decoder is.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from index.codecs import decoder
from index.errors import CodecError, FirstByteError, IntegrityError
from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch.wants import MOST_URGENT_FIRST, Priority
from snapshotter.store.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from index.codecs.base import Decoder
    from snapshotter.fetch.source import Origin
    from snapshotter.fetch.wants import LayerWants, Want

LARGEST_REQUEST = 16 << 20
"""Compressed bytes of any one request."""

READER_REQUEST = 1 << 20
"""Compressed bytes of one request for a reader, unless the link holds more: it may turn elsewhere
meanwhile, and what of a response is not read is lost, and the connection with it."""

LEAVE_COST = 4 << 20
"""Compressed bytes: a run that would have to decode more than this again, should somebody want
the next chunk later, is better finished. Plain zstd streams have one seek point for all."""

GUESS_MARGIN = 64 << 10
"""Compressed bytes that a guess at a chunk's end is exceeded by. Too little costs one more
request, too much is fetched twice."""

SMALL_BATCH = 128 << 10
"""Compressed bytes that are decoded although they may not complete a chunk, so that little is
left to do when the last of them comes."""

SLICE_SPAN = 32 << 20
SLICE = 4 << 10
"""Spans of more raw bytes than SLICE_SPAN are decoded from slices of SLICE compressed bytes: a
decoder hands out all that its input holds, and zstd can put 128 KiB of zeros into 4 bytes."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A chunk that was decoded: verified and stored, unless `damage` or `unsaved` says otherwise.

    `data` is None where nobody wanted the chunk while it was cut. There is one for every chunk,
    because somebody may have begun to want it since.
    """

    chunk: int
    data: bytes | None = None
    damage: IntegrityError | None = None
    unsaved: StoreError | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call of `Run.advance` brought; after an `error` the decoder is of no more use."""

    arrivals: list[Arrival]
    error: FirstByteError | None = None


class Run:
    """Brings the chunks in `wants`. Only `advance` runs in another thread, one call at a time.

    `position` is the next byte of the blob to be received, `next_chunk` the next chunk to arrive.
    """

    def __init__(self, origin: Origin, layer: LayerWants, first: int, last: int) -> None:
        """Raises FormatError if the table has no such chunks."""
        self.origin = origin
        self.layer = layer
        self.wants: dict[int, Want] = {}
        self.urgencies = [0] * len(Priority)
        self.scope = trio.CancelScope()
        self.decode_failures = 0
        self.nudged = False
        self.progressed_at = trio.current_time()
        self._high_water = 0
        self.restart(first, last)

    def restart(self, first: int, last: int) -> None:
        """Begin (anew) at the seek point before chunk `first`."""
        table = self.origin.table
        self.span = span = table.span(first, last)
        complete = span.raw_end == table.raw_size
        self.last_chunk = table.chunk_count - 1 if complete else span.raw_end // CHUNK_SIZE - 1
        self.position = span.start
        self.next_chunk = -(-span.raw_start // CHUNK_SIZE)
        self.buffered = 0
        self._pieces: list[bytes] = []
        self._decoder: Decoder | None = None
        self._raw_position = span.raw_start
        self._cut_chunk = self.next_chunk
        self._partial = bytearray()

    # --- what it will bring, and how urgent that is ---

    @property
    def priority(self) -> Priority:
        """That of its most urgent chunk; FILL when nobody wants anything of it any more."""
        for priority in MOST_URGENT_FIRST:
            if self.urgencies[priority]:
                return priority
        return Priority.FILL

    def covers(self, chunk: int) -> bool:
        """Whether it will pass all of a chunk."""
        return self.next_chunk <= chunk <= self.last_chunk

    def ahead(self, chunk: int) -> int:
        """Compressed bytes between what has been received and the best point to start for a chunk.

        Zero or less: no run of its own could bring it sooner.
        """
        return self.origin.table.span(chunk, chunk).start - self.position

    def leave(self, chunk: int) -> list[Want]:
        """This chunk and all after it, which somebody else will bring sooner."""
        self.stop_before(chunk)
        return [want for number, want in self.wants.items() if number >= chunk]

    def stop_before(self, chunk: int) -> None:
        """Leave this chunk and all after it to others."""
        self.last_chunk = min(self.last_chunk, chunk - 1)

    @property
    def expensive_to_leave(self) -> bool:
        """Whether much would have to be decoded again by whoever wants the next chunk."""
        if self.next_chunk > self.last_chunk:
            return False
        return -self.ahead(self.next_chunk) > LEAVE_COST

    # --- receiving ---

    def request_end(self, *, segment: int, holds: int) -> int:
        """Where the next request should end: after the chunks that are more urgent than fill, or
        else after all of them, as far as can be told.

        Requests for fill have at most `segment` bytes, those for readers twice what the link
        `holds`, or READER_REQUEST, or what a blocked read needs. The rest of a span is asked for,
        too, if it is at most half of what the link holds, which carries it before the next
        request's answer.
        """
        priority = self.priority
        end = self.span.end
        if self.wants:
            urgent = [chunk for chunk, want in self.wants.items() if want.priority != Priority.FILL]
            last = max(urgent or self.wants)
            end = min(end, self.origin.table.span(last, last).end)
            # What follows the last chunk in its span is fill, or belongs to other runs.
            guess = self._expected_end(last) + GUESS_MARGIN
            if guess > self.position and (priority is Priority.FILL or end - guess > holds // 2):
                end = min(end, guess)
        if end <= self.position:
            end = self.span.end
        if priority is Priority.FILL:
            return min(end, self.position + segment)
        blocked = [chunk for chunk, want in self.wants.items() if want.priority is Priority.BLOCKED]
        longest = max(READER_REQUEST, 2 * holds)
        if blocked:
            needed = self._expected_end(min(blocked)) + GUESS_MARGIN - self.position
            longest = max(longest, min(needed, LARGEST_REQUEST))
        return min(end, self.position + longest)

    def _expected_end(self, chunk: int) -> int:
        """About how much of the blob it takes to decode all of a chunk."""
        table = self.origin.table
        span = table.span(chunk, chunk)
        raw_end = chunk * CHUNK_SIZE + table.chunk_length(chunk)
        share = (raw_end - span.raw_start) / (span.raw_end - span.raw_start)
        return span.start + math.ceil(share * (span.end - span.start))

    def worth_decoding(self) -> bool:
        """Whether what was received has probably completed a chunk: a reader is waiting."""
        return self.buffered >= SMALL_BATCH or (
            self.next_chunk > self.last_chunk
            or self.position >= self._expected_end(self.next_chunk)
        )

    def receive(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self.buffered += len(piece)
        self.position += len(piece)
        if self.position > self._high_water:
            self._high_water = self.position
            self.progressed_at = trio.current_time()

    # --- decoding, in a worker thread ---

    def advance(self, remember: bool) -> Batch:
        """Decode what was received, cut it into chunks, verify and store them.

        `remember` keeps them in the store's memory, too. What fails is in the result.
        """
        data = b"".join(self._pieces) if len(self._pieces) != 1 else self._pieces[0]
        self._pieces.clear()
        self.buffered = 0
        arrivals: list[Arrival] = []
        try:
            if self._decoder is None:
                self._decoder = self._make_decoder()
            for piece in self._slices(data):
                arrivals += self._cut(self._decoder.feed(piece), remember)
            if self.position >= self.span.end and self._raw_position < self.span.raw_end:
                raise CodecError(
                    f"bytes {self.span.start} to {self.span.end} of {self.origin.table} decode to "
                    f"{self._raw_position - self.span.raw_start} bytes instead of "
                    f"{self.span.raw_end - self.span.raw_start}"
                )
        except FirstByteError as error:
            return Batch(arrivals, error)
        return Batch(arrivals)

    def reached(self, chunk: int) -> bool:
        """Whether decoding has come as far as the best point to start for a chunk."""
        return self.origin.table.span(chunk, chunk).raw_start <= self._raw_position

    def _make_decoder(self) -> Decoder:
        table, span = self.origin.table, self.span
        plain = table.codec is Codec.PLAIN
        return decoder(
            table.codec,
            bit_offset=8 * span.start if plain else table.bit_offsets[span.point],
            window=self.origin.source.window(span.point),
            limit=span.raw_end - span.raw_start,
        )

    def _slices(self, data: bytes) -> Iterator[memoryview]:
        """Received bytes, cut at seek points, so that a broken frame does not take those before
        it along, and into small slices where little may become much."""
        bits = self.origin.table.bit_offsets
        large = self.span.raw_end - self.span.raw_start > SLICE_SPAN
        begin = self.position - len(data)
        view, start = memoryview(data), 0
        point = bisect_right(bits, 8 * begin)
        while start < len(data):
            stop = start + SLICE if large else len(data)
            while point < len(bits) and -(-bits[point] // 8) - begin <= start:
                point += 1
            if point < len(bits):
                stop = min(stop, -(-bits[point] // 8) - begin)
            yield view[start:stop]
            start = stop

    def _cut(self, raw: bytes, remember: bool) -> list[Arrival]:
        table = self.origin.table
        arrivals = []
        used = min(len(raw), max(0, self._cut_chunk * CHUNK_SIZE - self._raw_position))
        self._raw_position += len(raw)
        while self._cut_chunk < table.chunk_count:
            needed = table.chunk_length(self._cut_chunk) - len(self._partial)
            if len(raw) - used < needed:
                self._partial += memoryview(raw)[used:]
                break
            data = raw[used : used + needed]
            if self._partial:
                data = bytes(self._partial + data)
                self._partial.clear()
            used += needed
            arrivals.append(self._keep(self._cut_chunk, data, remember))
            self._cut_chunk += 1
        return arrivals

    def _keep(self, chunk: int, data: bytes, remember: bool) -> Arrival:
        stored = self.origin.stored
        wanted = chunk in self.wants
        if not wanted and stored.has(chunk):
            return Arrival(chunk)
        kept = data if wanted else None
        try:
            stored.write(chunk, data, remember=remember)
        except IntegrityError as error:
            return Arrival(chunk, damage=error)
        except StoreError as error:
            return Arrival(chunk, kept, unsaved=error)
        return Arrival(chunk, kept)

    def passed(self) -> None:
        """Back in the trio thread: chunks that were cut count as passed."""
        self.next_chunk = self._cut_chunk
