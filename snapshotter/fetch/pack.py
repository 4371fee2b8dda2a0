"""A startup pack on its way: one stream that brings chunks of many layers.

To the scheduler a pack is a *lane* in each of its layers: what is wanted of these chunks is in
flight, so nobody else fetches them. A reader who is blocked on a chunk that the pack is far from,
or on any while the pack does not get on, has it fetched from its layer, as if there were no pack.
What the pack does not bring in the end is fetched like the chunks of earlier starts.

A pack may be asked for before the file index is here. The index has the link first: both at once
would take it twice as long, and nothing can begin without it. What comes of the pack between that
and the moment when there is something to verify it with waits, in bounded memory.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from index.errors import IntegrityError
from index.pack import FrameError, PackDecoder, read_table
from snapshotter.fetch.stream import BlobStream
from snapshotter.fetch.trace import traced
from snapshotter.fetch.wants import Priority
from snapshotter.nursery import open_nursery
from snapshotter.store.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from index.pack import Frame, PackTable, Place
    from snapshotter.fetch.scheduler import Scheduler
    from snapshotter.fetch.source import Origin, PackSource
    from snapshotter.fetch.wants import LayerWants, Want

log = logging.getLogger(__name__)

SKIP = 1 << 20
"""Bytes of a pack that are read although they are not needed, rather than asking for what follows
them: 40 ms at 200 Mbit/s, a round trip or two."""

HEAD = 256 << 10
"""Bytes that are asked for first when only some of a pack may be needed: they hold any table."""

DETOUR = 4
"""A blocked reader whose chunk is in the pack has it fetched from its layer only if that takes less
than one in so many of the bytes that the pack has before it: they come on top, and the start needs
those others, too. A guess."""

STALLED = 2.0
"""Seconds without a byte after which nobody waits for a pack any more. A guess: longer than a slow
link pauses, and sooner than the request counts as failed."""


MAX_LOST = 3
"""Frames that may come damaged twice before a pack is given up: whoever made it, or what brings it,
is not to be trusted with more of the link."""


class Lane:
    """What a pack brings of one layer. A `Carrier`."""

    expensive_to_leave = False

    def __init__(self, delivery: PackDelivery, origin: Origin, layer: LayerWants) -> None:
        self.origin = origin
        self.layer = layer
        self.wants: dict[int, Want] = {}
        self.urgencies = [0] * len(Priority)
        self.scope = trio.CancelScope()
        self.nudged = False
        self.ends: dict[int, int] = {}
        """Of the chunks that are still to come: about where in the pack the last byte is."""
        self._delivery = delivery

    @property
    def progressed_at(self) -> float:
        return self._delivery.progressed_at

    def covers(self, chunk: int) -> bool:
        return chunk in self.ends

    def reach(self, chunk: int) -> None:
        pass  # a pack brings what it covers

    def ahead(self, chunk: int) -> float:
        """Bytes until the pack has brought a chunk, less DETOUR times those from its layer."""
        if self._delivery.stalled or chunk not in self.ends:
            return math.inf
        span = self.origin.table.span(chunk, chunk)
        return self.ends[chunk] - self._delivery.received - DETOUR * (span.end - span.start)

    def leave(self, chunk: int) -> list[Want]:
        """A chunk that is too far ahead. It comes all the same, but nobody waits for that."""
        return [self.wants[chunk]]


@dataclass(slots=True)
class _Batch:
    """What some bytes of a pack held. `failed` is the number of a frame that is damaged, `unsaved`
    why the last chunk was verified but not stored."""

    arrivals: list[tuple[Place, bytes]] = field(default_factory=list)
    failed: int | None = None
    unsaved: StoreError | None = None


class PackDelivery:
    """One pack for one image. `start` it as soon as it is known of, then `deliver` it once."""

    def __init__(self, source: PackSource, scheduler: Scheduler) -> None:
        self.stalled = False
        self._source = source
        self._scheduler = scheduler
        self._stream: BlobStream | None = None
        self._lanes: dict[int, Lane] = {}

    def start(self, nursery: trio.Nursery) -> None:
        """Ask for all of it, which comes after `release`, or when it is to be delivered.

        Who does not `deliver` it has to `close` it.
        """
        self._open(nursery, 0, self._source.size, held=True)

    def release(self) -> None:
        """Let it have the link."""
        if self._stream is not None:
            self._stream.release()

    def close(self) -> None:
        """Ask for nothing more."""
        if self._stream is not None:
            self._stream.close()

    @property
    def received(self) -> int:
        """Where in the pack the next byte is that has not come yet."""
        return self._stream.received if self._stream is not None else 0

    @property
    def progressed_at(self) -> float:
        return self._stream.progressed_at if self._stream is not None else -math.inf

    async def deliver(
        self,
        index_digest: bytes,
        origins: Sequence[Origin],
        arrived: Callable[[Sequence[Place]], None],
    ) -> None:
        """Bring those chunks of the pack that are not here, in its order. `origins` are all layers
        of the file index of that digest. What has `arrived`, verified, is told at once.

        Raises FirstByteError if the pack, or some of it, is of no use. Those chunks are wanted
        from then on as `Scheduler.replay` wants them.
        """
        for origin in origins:
            origin.stored.retain()
        try:
            async with open_nursery() as nursery:
                if self._stream is None:
                    fresh = not any(origin.stored.present_bytes for origin in origins)
                    end = self._source.size if fresh else min(HEAD, self._source.size)
                    self._open(nursery, 0, end)
                self.release()
                table = await self._read_table()
                table.check(index_digest, [origin.table for origin in origins])
                frames = self._promise(table, origins)
                if frames:
                    nursery.start_soon(self._watch)
                    await self._bring(nursery, frames, origins, arrived)
                nursery.cancel_scope.cancel()
        finally:
            self.close()
            for lane in self._lanes.values():
                lane.layer.runs.remove(lane)
                self._scheduler.requeue(list(lane.wants.values()))
                self._scheduler.wants.discard_idle(lane.layer)
            for origin in origins:
                origin.stored.close()

    async def _read_table(self) -> PackTable:
        assert self._stream is not None
        head = bytearray()
        while (table := read_table(head, self._source.size)) is None:
            head += await self._stream.take(self._source.size)
        self._stream.give_back(bytes(head[table.start :]))
        return table

    def _promise(self, table: PackTable, origins: Sequence[Origin]) -> list[Frame]:
        """Make lanes for what is missing; returns the frames that have some of it."""
        frames = []
        for frame in table.frames:
            needed = False
            for number, (layer, chunk) in enumerate(frame.places, 1):
                origins[layer].stored.start_chunks.add(chunk)
                if origins[layer].stored.has(chunk):
                    continue
                lane = self._lane(layer, origins[layer])
                want = self._scheduler.wants.advise(lane.origin, chunk, Priority.STARTUP)
                if want.run is None and want.priority is not Priority.BLOCKED:
                    self._scheduler.wants.take(want, lane)
                    length = frame.end - frame.start
                    lane.ends[chunk] = frame.start + length * number // len(frame.places)
                    needed = True
            if needed:
                frames.append(frame)
        return frames

    def _lane(self, layer: int, origin: Origin) -> Lane:
        lane = self._lanes.get(layer)
        if lane is None:
            lane = self._lanes[layer] = Lane(self, origin, self._scheduler.wants.layer(origin))
            lane.layer.runs.append(lane)
        return lane

    # --- trouble ---

    async def _watch(self) -> None:
        """Let nobody wait for a pack that does not get on."""
        while True:
            await trio.sleep(STALLED / 2)
            assert self._stream is not None
            if trio.current_time() - self._stream.silent_since > STALLED:
                self._stall()

    def _stall(self) -> None:
        """Let the blocked readers have their chunks from elsewhere, until more comes."""
        self.stalled = True
        for lane in self._lanes.values():
            self._scheduler.requeue(
                [want for want in lane.wants.values() if want.priority is Priority.BLOCKED]
            )

    def _renounce(self, frame: Frame) -> None:
        """A frame will not come."""
        for layer, chunk in frame.places:
            lane = self._lanes.get(layer)
            if lane is not None and lane.ends.pop(chunk, None) is not None and chunk in lane.wants:
                self._scheduler.requeue([lane.wants[chunk]])

    # --- bringing ---

    async def _bring(
        self,
        nursery: trio.Nursery,
        frames: Sequence[Frame],
        origins: Sequence[Origin],
        arrived: Callable[[Sequence[Place]], None],
    ) -> None:
        """Bring frames in order; one that comes damaged is asked for once more.

        Raises IntegrityError if some were damaged twice: at the end, or when there are too many.
        """
        at = lost = 0
        damaged = -1
        while at < len(frames) and lost < MAX_LOST:
            last = at
            while last + 1 < len(frames) and frames[last + 1].start - frames[last].end <= SKIP:
                last += 1
            together = frames[at : last + 1]
            failed = await self._bring_together(nursery, together, origins, arrived)
            if failed is None:
                at = last + 1
                continue
            at += failed
            log.error("%s: the frame at %d came damaged", self._source, frames[at].start)
            self._scheduler.stats.damaged += 1
            self._source.doubt()
            if at == damaged:
                self._renounce(frames[at])
                at += 1
                lost += 1
            else:
                damaged = at
        if lost:
            raise IntegrityError(f"{lost} frames of {self._source} are damaged")

    async def _bring_together(
        self,
        nursery: trio.Nursery,
        frames: Sequence[Frame],
        origins: Sequence[Origin],
        arrived: Callable[[Sequence[Place]], None],
    ) -> int | None:
        """Bring frames that lie together. Returns the number of one that came damaged."""
        stream = self._stream
        start, end = frames[0].start, frames[-1].end
        reaches = stream is not None and not stream.closed and stream.end >= end
        if stream is None or not reaches or not 0 <= start - stream.position <= SKIP:
            stream = self._open(nursery, start, end)
        while stream.position < start:
            await stream.take(start)
        decoder = PackDecoder(frames, [origin.table for origin in origins])
        with traced(origins[0], Priority.STARTUP) as record:
            while stream.position < end:
                data = await stream.take(end)
                if not record.size:
                    record.answer()
                record.size += len(data)
                self.stalled = False
                batch = await trio.to_thread.run_sync(_advance, decoder, data, origins)
                self._land(batch)
                arrived([place for place, _ in batch.arrivals])
                if batch.unsaved is not None:
                    raise batch.unsaved
                if batch.failed is not None:
                    stream.close()
                    return batch.failed
        return None

    def _land(self, batch: _Batch) -> None:
        last = len(batch.arrivals) - 1
        for number, ((layer, chunk), raw) in enumerate(batch.arrivals):
            lane = self._lanes.get(layer)
            if lane is not None:
                lane.ends.pop(chunk, None)
                if lane.origin.trace is not None:
                    lane.origin.trace.arrive(layer, chunk, Priority.STARTUP)
                problem = batch.unsaved if number == last else None
                self._scheduler.land(lane.layer, chunk, raw, problem)

    def _open(
        self, nursery: trio.Nursery, start: int, end: int, *, held: bool = False
    ) -> BlobStream:
        self.close()
        self._stream = BlobStream(
            self._source, self._scheduler, start, end, trouble=self._stall, held=held
        )
        nursery.start_soon(self._stream.run)
        return self._stream


def _advance(decoder: PackDecoder, data: bytes, origins: Sequence[Origin]) -> _Batch:
    """Decode, verify and store, in a thread. Ends at the first thing that goes wrong."""
    batch = _Batch()
    try:
        for (layer, chunk), raw in decoder.feed(data):
            stored = origins[layer].stored
            if not stored.has(chunk):
                try:
                    stored.write(chunk, raw)
                except IntegrityError:
                    batch.failed = decoder.frame
                    return batch
                except StoreError as error:
                    batch.unsaved = error
            batch.arrivals.append(((layer, chunk), raw))
            if batch.unsaved is not None:
                return batch
    except FrameError as error:
        batch.failed = error.number
    return batch
