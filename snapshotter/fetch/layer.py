"""A layer that can be read although it is not here yet: the way of one read.

view -> LazyLayer.read_now -> (store)
     -> LazyLayer.read     -> Scheduler.read -> run -> source, decoder, store -> bytes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from index.errors import FormatError
from index.tables import CHUNK_SIZE
from snapshotter.fetch.errors import FetchError
from snapshotter.fetch.readahead import Neighbours, SequentialReaders
from snapshotter.fetch.source import Origin
from snapshotter.fetch.wants import Priority

if TYPE_CHECKING:
    from index.tables import LayerTable
    from snapshotter.fetch.scheduler import Scheduler
    from snapshotter.fetch.source import BlobSource
    from snapshotter.fetch.startup import StartupRecorder
    from snapshotter.fetch.trace import StartTrace
    from snapshotter.store.layer import StoredLayer

ATTEMPTS = 3
"""Times that a chunk may turn out to be damaged on disk, right after it was stored, before the
reader is told: the disk is broken then."""


_Part = tuple[int, int, int]  # a chunk's number, and which of its bytes: from, to


class LazyLayer:
    """One layer of a mounted image. For the trio thread.

    `stored` is an opened layer that this object closes; `number` is what `recorder` calls it.
    `foreseen` are chunks that a first start will probably read.
    """

    def __init__(
        self,
        table: LayerTable,
        stored: StoredLayer,
        source: BlobSource,
        scheduler: Scheduler,
        *,
        recorder: StartupRecorder | None = None,
        trace: StartTrace | None = None,
        number: int = 0,
    ) -> None:
        self.table = table
        self.stored = stored
        self.origin = Origin(table, stored, source, trace, number)
        self._scheduler = scheduler
        self._stats = scheduler.stats
        self._recorder = recorder
        self._number = number
        self._readers = SequentialReaders()
        self._neighbours = Neighbours()
        self.foreseen: set[int] = set()
        self._latest = (-1, -1)
        self._closed = False

    def read_now(self, raw_offset: int, length: int) -> bytes | memoryview | None:
        """Bytes of raw space if they are here and no disk has to be waited for; else None.

        Raises FormatError if the range is not within raw space.
        """
        first, last = self._chunks(raw_offset, length)
        if self._closed:
            return None
        if (first, last) != self._latest:
            self._note(first, last)
        data = self._peek(raw_offset, length)
        self._stats.hits += data is not None
        return data

    def _peek(self, raw_offset: int, length: int) -> bytes | memoryview | None:
        parts: list[bytes | memoryview] = []
        for chunk, start, end in _cut(raw_offset, length):
            data = self.stored.peek(chunk, start, end)
            if data is None:
                return None
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def note(self, raw_offset: int, length: int) -> None:
        """These bytes are read for another image that has the layer, or for this one: nobody can
        tell, so the starts of both may need them."""
        if self._recorder is not None:
            self._recorder.touch(self._number, *self._chunks(raw_offset, length))

    async def read(self, raw_offset: int, length: int) -> bytes | memoryview:
        """Bytes of raw space, fetched if need be. No checkpoint if they are at hand.

        Raises FormatError if the range is not within raw space, FetchError if the bytes cannot be
        had; reading again starts afresh.
        """
        ready = self.read_now(raw_offset, length)
        if ready is not None:
            return ready
        if self._closed:
            raise FetchError(f"{self.table} was unmounted")
        began = trio.current_time()
        self.stored.retain()
        try:
            parts = await self._collect(_cut(raw_offset, length))
        finally:
            self.stored.close()
            self._stats.stalls.add(trio.current_time() - began)
            if self.origin.trace is not None:
                self.origin.trace.stalled(self.origin.number, raw_offset, length, began)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def foresee(self, chunks: range) -> None:
        """The first start of an image will probably read these chunks."""
        self.foreseen.update(chunks)
        self._scheduler.advise(self.origin, chunks, Priority.STARTUP)

    async def inspect(self, raw_offset: int, length: int, *, urgent: bool) -> bytes:
        """The same for this process's own sake: no start has touched them. If it is not `urgent`
        a start's reads go first, and FetchError is raised also if the disk does not take them."""
        chunks = self._chunks(raw_offset, length)
        if self._closed:
            raise FetchError(f"{self.table} was unmounted")
        self.stored.retain()
        try:
            if not urgent and (missing := self.stored.missing(*chunks)):
                await self._scheduler.prepare(self.origin, missing)
            ready = self._peek(raw_offset, length)
            if ready is None:
                return b"".join(await self._collect(_cut(raw_offset, length), guess=False))
        finally:
            self.stored.close()
        await trio.lowlevel.checkpoint()  # a thousand of these come before a start
        return bytes(ready)

    async def _collect(
        self, wanted: list[_Part], *, guess: bool = True
    ) -> list[bytes | memoryview]:
        """The parts of chunks that are wanted, in their order."""
        stored = self.stored
        found: dict[int, bytes | memoryview] = {}
        for _ in range(ATTEMPTS):
            here = [part for part in wanted if part[0] not in found and stored.has(part[0])]
            if here:  # in one thread, because a hop costs as much as reading 256 KiB
                found.update(await trio.to_thread.run_sync(_read_all, stored, here))
            absent = [part for part in wanted if part[0] not in found]
            if absent:
                if guess:
                    self._guess(absent[-1][0])
                missing = [chunk for chunk, _, _ in absent]
                fetched = await self._scheduler.read(self.origin, missing)
                for chunk, start, end in absent:
                    if chunk in fetched:
                        found[chunk] = memoryview(fetched[chunk])[start:end]
            if len(found) == len(wanted):
                return [found[chunk] for chunk, _, _ in wanted]
        raise FetchError(
            f"{self.table} cannot be read: chunks are damaged as soon as they are stored",
            hint=f"check the disk under {stored.raw_path}",
        )

    def _chunks(self, raw_offset: int, length: int) -> tuple[int, int]:
        if raw_offset < 0 or length <= 0 or raw_offset + length > self.table.raw_size:
            raise FormatError(
                f"{length} bytes at {raw_offset} are not within the "
                f"{self.table.raw_size} bytes of {self.table}"
            )
        return raw_offset // CHUNK_SIZE, (raw_offset + length - 1) // CHUNK_SIZE

    def _note(self, first: int, last: int) -> None:
        self._latest = (first, last)
        if self._recorder is not None and self._recorder.touch(self._number, first, last):
            self._scheduler.note_touch()
        self._neighbours.read(last)
        if last not in self.foreseen:  # or what comes next is, too, or not needed
            self._fetch_ahead(last, self._readers.advance(first, last))

    def _guess(self, chunk: int) -> None:
        """A chunk is waited for. If that is in a start, fetch what it may read next; unless that is
        known, because earlier starts have told, or foreseen: what they have not read is the
        kernel's guess, next to what they have."""
        if self._recorder is None or self.stored.start_chunks:
            return
        if not self.foreseen.isdisjoint((chunk - 1, chunk)):
            return
        if self._recorder.stopped:
            self._neighbours.forget()
        self._fetch_ahead(chunk, self._neighbours.guess(chunk, self.foreseen))

    def _fetch_ahead(self, chunk: int, ahead: range) -> None:
        """Who reads a chunk is expected to read these. Of what earlier starts have read, the rest
        is known as well, and on its way."""
        if ahead and not self.stored.complete and chunk not in self.stored.start_chunks:
            within = range(ahead.start, min(ahead.stop, self.table.chunk_count))
            self._scheduler.advise(self.origin, within, Priority.READAHEAD)

    def close(self) -> None:
        """The image is unmounted: reads that wait get FetchError."""
        if not self._closed:
            self._closed = True
            self._scheduler.detach(self.origin)
            self.stored.close()


def _cut(raw_offset: int, length: int) -> list[_Part]:
    """The parts of consecutive chunks that make up a range of raw space."""
    end = raw_offset + length
    return [
        (
            chunk,
            max(raw_offset - chunk * CHUNK_SIZE, 0),
            min(end - chunk * CHUNK_SIZE, CHUNK_SIZE),
        )
        for chunk in range(raw_offset // CHUNK_SIZE, (end - 1) // CHUNK_SIZE + 1)
    ]


def _read_all(stored: StoredLayer, parts: list[_Part]) -> dict[int, bytes | memoryview]:
    """What the store has of parts of chunks, by chunk. Waits for the disk."""
    read = ((chunk, stored.read(chunk, start, end)) for chunk, start, end in parts)
    return {chunk: data for chunk, data in read if data is not None}
