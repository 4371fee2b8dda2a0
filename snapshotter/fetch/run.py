"""One run: a span of a blob that is fetched, decoded and cut into chunks, front to back.

A run outlives the requests it takes: when one fails, or when it is cut short to let others pass,
the next goes on where the decoding is; so does the next run when this one ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import trio

from index.errors import FirstByteError, IntegrityError
from index.tables import CHUNK_SIZE, Span
from snapshotter.fetch.decoding import Decoding, expected_end
from snapshotter.fetch.wants import MOST_URGENT_FIRST, Priority
from snapshotter.store.errors import StoreError

if TYPE_CHECKING:
    from snapshotter.fetch.decoding import SuspendedDecodings
    from snapshotter.fetch.source import Origin
    from snapshotter.fetch.wants import LayerWants, Want

LARGEST_REQUEST = 16 << 20
"""Compressed bytes of any one request."""

READER_REQUEST = 1 << 20
"""Compressed bytes of one request for a reader, unless the link holds more: it may turn elsewhere
meanwhile, and what of a response is not read is lost, and the connection with it."""

LONGEST_RUN = (16 << 20) // CHUNK_SIZE
"""Chunks. Long enough to fill a link, short enough that several connections share the work."""

LEAVE_COST = 4 << 20
"""Compressed bytes: a run that would have to decode more than this again, should somebody want
the next chunk later, is better finished. Plain zstd streams have one seek point for all."""

GUESS_MARGIN = 64 << 10
"""Compressed bytes that a guess at a chunk's end is exceeded by. Too little costs one more
request, too much is fetched twice."""

SMALL_BATCH = 128 << 10
"""Compressed bytes that are decoded although they may not complete a chunk, so that little is
left to do when the last of them comes."""


class Arrival(NamedTuple):
    """A chunk that was decoded: verified and stored, unless `damage` or `unsaved` says otherwise.

    `data` is None where nobody wanted the chunk while it was cut, or only fill did and the store
    has it. There is one for every chunk, because somebody may have begun to want it since.
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
    It is `detached` when the image whose source it uses has gone away. `awaited` is how urgent the
    run is that waits for its head, FILL if none does.
    """

    def __init__(
        self,
        origin: Origin,
        layer: LayerWants,
        first: int,
        last: int,
        suspended: SuspendedDecodings,
    ) -> None:
        """It goes on with a decoding of `suspended`, if that is nearer to chunk `first` than any
        seek point. Raises FormatError if the table has no such chunks.
        """
        self.origin = origin
        self.layer = layer
        self.wants: dict[int, Want] = {}
        self.urgencies = [0] * len(Priority)
        self.scope = trio.CancelScope()
        self.detached = False
        self.decode_failures = 0
        self.nudged = False
        self.awaited = Priority.FILL
        self.progressed_at = trio.current_time()
        self.decoding = suspended.start(origin.table, first)
        self._suspended = suspended
        self._high_water = self.decoding.position
        self._begin(last)

    def restart(self, first: int, last: int) -> None:
        """Begin anew at the seek point before chunk `first`."""
        self.decoding = Decoding(self.origin.table, first)
        self._begin(last)

    def _begin(self, last: int) -> None:
        self.next_chunk = self.decoding.next_chunk
        self.last_chunk = -1
        self.reach(last)

    def reach(self, last: int) -> None:
        """Go on until chunk `last` at least, and to the seek point after it."""
        if last <= self.last_chunk:
            return
        table, decoding = self.origin.table, self.decoding
        end = table.span(last, last)
        self.span = Span(decoding.point, decoding.start, end.end, decoding.raw_start, end.raw_end)
        complete = end.raw_end == table.raw_size
        self.last_chunk = table.chunk_count - 1 if complete else end.raw_end // CHUNK_SIZE - 1

    # --- what it will bring, and how urgent that is ---

    @property
    def priority(self) -> Priority:
        """That of its most urgent chunk, or of the run that waits for its head; FILL when nobody
        wants anything of it any more."""
        for priority in MOST_URGENT_FIRST:
            if self.urgencies[priority] or self.awaited is priority:
                return priority
        return Priority.FILL

    @property
    def position(self) -> int:
        return self.decoding.position

    @property
    def buffered(self) -> int:
        """Bytes that were received but not decoded."""
        return self.decoding.buffered

    def covers(self, chunk: int) -> bool:
        """Whether it will pass all of a chunk, or can go on to it: if that is sooner than a run of
        its own would come to it, or if that would begin where this one comes past anyway. Not if it
        fetched again what a suspended decoding has received."""
        if chunk < self.next_chunk:
            return False
        if self.decoding.broken:
            return chunk <= self.last_chunk
        table = self.origin.table
        start, _ = self._suspended.nearest(table, chunk)
        if start <= self.position:
            return True
        anyway = bool(self.wants) and start < expected_end(table, max(self.wants))
        if anyway and chunk - self.next_chunk < LONGEST_RUN:
            return True
        resumed = start > table.span(chunk, chunk).start
        return chunk <= self.last_chunk and (anyway or not resumed)

    def ahead(self, chunk: int) -> int:
        """Compressed bytes between what has been received and the best point to start for a chunk.

        Zero or less: no run of its own could bring it sooner.
        """
        start, _ = self._suspended.nearest(self.origin.table, chunk)
        return start - self.position

    def leave(self, chunk: int) -> list[Want]:
        """This chunk, all that whoever brings it sooner will pass on the way, and all after it."""
        _, first = self._suspended.nearest(self.origin.table, chunk)
        self.stop_before(first)
        return [want for number, want in self.wants.items() if number >= first]

    def leave_to(self, other: Run) -> list[Want]:
        """All that another run of the same layer, which has come farther, will pass."""
        if other.position <= self.position:
            return []
        self.stop_before(other.next_chunk)
        return [want for number, want in self.wants.items() if number >= other.next_chunk]

    def stop_before(self, chunk: int) -> None:
        """Leave this chunk and all after it to others."""
        self.last_chunk = min(self.last_chunk, chunk - 1)

    @property
    def expensive_to_leave(self) -> bool:
        """Whether much would have to be decoded again by whoever wants the next chunk."""
        if self.next_chunk > self.last_chunk:
            return False
        return -self.ahead(self.next_chunk) > LEAVE_COST

    # --- where another run begins inside of a chunk ---

    def _joint(self, chunk: int) -> int | None:
        """Where in the blob to end, if `chunk` is the last one: at the seek point inside of it, if
        a run that has begun there brings its end as a head, or one will that brings what follows.
        What is behind it would be fetched twice."""
        table = self.origin.table
        head = self._suspended.head(table, chunk)
        if head is not None:
            return head.position
        if (other := self._run_from_inside(chunk)) is not None:
            return other.decoding.start
        following = self.layer.wants.get(chunk + 1)
        if following is None or following.run is not None:
            return None
        span = table.span(chunk + 1, chunk + 1)
        begins_inside = chunk * CHUNK_SIZE < span.raw_start < (chunk + 1) * CHUNK_SIZE
        afresh = self._suspended.nearest(table, chunk + 1)[0] == span.start
        return span.start if begins_inside and afresh else None

    def head_bringer(self) -> Run | None:
        """The run whose head is the end of the next chunk, if it has begun where this one is now
        and has not come to the end of that."""
        other = self._run_from_inside(self.next_chunk)
        return other if other is not None and other.decoding.start == self.position else None

    def _run_from_inside(self, chunk: int) -> Run | None:
        """The run that owes the end of a chunk as its head."""
        for other in self.layer.runs:
            if other is not self and isinstance(other, Run) and other.decoding.owes_head:
                same = other.origin.table.digest == self.origin.table.digest
                if same and other.decoding.raw_start // CHUNK_SIZE == chunk:
                    return other
        return None

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
            guess = expected_end(self.origin.table, last) + GUESS_MARGIN
            if guess > self.position and (priority is Priority.FILL or end - guess > holds // 2):
                end = min(end, guess)
            joint = self._joint(last)
            if joint is not None and joint > self.position:
                end = min(end, joint)
        if end <= self.position:
            end = self.span.end
        if priority is Priority.FILL:
            return min(end, self.position + segment)
        blocked = [chunk for chunk, want in self.wants.items() if want.priority is Priority.BLOCKED]
        longest = max(READER_REQUEST, 2 * holds)
        if blocked:
            needed = expected_end(self.origin.table, min(blocked)) + GUESS_MARGIN - self.position
            longest = max(longest, min(needed, LARGEST_REQUEST))
        return min(end, self.position + longest)

    def worth_decoding(self) -> bool:
        """Whether what was received has probably completed a chunk: a reader is waiting."""
        return self.buffered >= SMALL_BATCH or (
            self.next_chunk > self.last_chunk
            or self.position >= expected_end(self.origin.table, self.next_chunk)
        )

    def receive(self, piece: bytes) -> None:
        self.decoding.receive(piece)
        if self.position > self._high_water:
            self._high_water = self.position
            self.progressed_at = trio.current_time()

    def can_advance(self) -> bool:
        """Between requests: whether something can be decoded or joined before the next one."""
        head = self._suspended.head(self.origin.table, self.next_chunk)
        if head is None:
            return self.buffered > 0
        if head.shared and head.position == self.position:
            self.receive(head.shared)
        return self.buffered > 0 or self.decoding.reaches(head)

    # --- decoding, in a worker thread ---

    def advance(self, remember: bool) -> Batch:
        """Decode what was received, cut it into chunks, verify and store them.

        `remember` keeps them in the store's memory, too, and in what this returns. What fails is in
        the result.
        """
        arrivals: list[Arrival] = []
        try:
            for chunk, data in self.decoding.chunks(self.origin, self.span):
                arrivals.append(self._keep(chunk, data, remember))
        except FirstByteError as error:
            self._suspended.drop_head(self.origin.table, self.decoding.next_chunk)
            return Batch(arrivals, error)
        finally:
            self._keep_head()
        chunk = self.decoding.next_chunk
        head = self._suspended.head(self.origin.table, chunk)
        if head is not None and self.decoding.reaches(head):
            self._suspended.drop_head(self.origin.table, chunk)
            arrivals.append(self._keep(chunk, self.decoding.join(head), remember))
        return Batch(arrivals)

    def _keep_head(self) -> None:
        """Whoever brings the chunk before the first of this decoding needs its end."""
        head = self.decoding.head(self.origin.table)
        if head is None:
            return
        before = -(-head.raw_start // CHUNK_SIZE) - 1
        if not self.origin.stored.has(before):
            self._suspended.keep_head(self.origin.table, before, head)
        self.decoding.drop_head()  # only now: somebody may be waiting for either

    def reached(self, chunk: int) -> bool:
        """Whether decoding has come as far as the best point to start for a chunk."""
        return self.origin.table.span(chunk, chunk).raw_start <= self.decoding.raw_position

    def _keep(self, chunk: int, data: bytes, remember: bool) -> Arrival:
        stored = self.origin.stored
        wanted = chunk in self.wants
        if not wanted and stored.has(chunk):
            return Arrival(chunk)
        try:
            stored.write(chunk, data, remember=remember)
        except IntegrityError as error:
            self.decoding.broken = True
            return Arrival(chunk, damage=error)
        except StoreError as error:
            return Arrival(chunk, data if wanted else None, unsaved=error)
        # Memory that is used again at once is in the processor's caches: fill keeps none.
        return Arrival(chunk, data if wanted and remember else None)

    def passed(self) -> None:
        """Back in the trio thread: chunks that were cut count as passed."""
        self.next_chunk = self.decoding.next_chunk
        if not self.decoding.owes_head:
            self.awaited = Priority.FILL
