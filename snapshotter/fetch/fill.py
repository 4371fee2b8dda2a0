"""Background fill: makes an image fully local, and proves that it is the image."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from index.errors import IntegrityError
from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch.errors import FetchError
from snapshotter.store.errors import StoreError
from snapshotter.store.layer import held

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from index.tables import LayerTable
    from snapshotter.fetch.layer import LazyLayer
    from snapshotter.fetch.scheduler import Scheduler
    from snapshotter.store.layer import StoredLayer

log = logging.getLogger(__name__)

WINDOW = 256
"""Chunks (64 MiB) that are wanted together: the scheduler cuts them into runs of 16 MiB."""

WINDOWS = 3
"""Windows that are wanted at once: enough to keep every connection of fill busy while one ends."""

HASH_PIECE = 4 << 20
"""Bytes of raw space hashed in one go: some 3 ms."""

FIRST_PAUSE = 5.0
LONGEST_PAUSE = 300.0
"""Seconds before what failed is tried again; doubled while nothing gets better."""


HELD_BACK = "the store's limit holds it back"
"""The problem of a download that the store has no room for."""

ROOM_POLL = 0.5
"""Seconds between two looks whether there is room."""

ENOUGH_ROOM = 16
"""Chunks (4 MiB) that it is worth going on for, so that it is not done chunk by chunk."""


class _Digest:
    """The hash of a layer's raw space from its start to `end`."""

    __slots__ = ("end", "hasher")

    def __init__(self) -> None:
        self.hasher = hashlib.sha256()
        self.end = 0

    def advance(self, stored: StoredLayer, end: int) -> bool:
        """Go on to `end`, if all of that is present. Blocks. Raises StoreError."""
        with held([stored]):  # or what is hashed could be evicted
            if stored.missing(self.end // CHUNK_SIZE, (end - 1) // CHUNK_SIZE):
                return False
            stored.hash_raw(self.hasher, self.end, end)
        self.end = end
        return True


class ImageFill:
    """Fills the layers of one mounted image. `run` it in a task of its own.

    `fully_local` is set when every chunk of every layer is present, synced, and raw space hashes
    to each layer's diff_id. `problem` is what holds it up at the moment, in one line, or empty.
    """

    def __init__(
        self,
        layers: Sequence[LazyLayer],
        scheduler: Scheduler,
        *,
        quarantine: Callable[[LazyLayer, IntegrityError], None],
    ) -> None:
        """`quarantine` is called with a layer that has every chunk that the file index promises,
        but is not the layer that the image names: the index lies."""
        # Small layers first: they are many, on top, and close to what a container runs.
        self._layers = sorted(layers, key=lambda layer: layer.table.blob_size)
        self._scheduler = scheduler
        self._quarantine = quarantine
        self._proven: set[LazyLayer] = set()
        self._digests = {layer: _Digest() for layer in layers}
        self._arrived = trio.Event()
        self._windows: deque[tuple[LazyLayer, int, int]] = deque()
        self.fully_local = trio.Event()
        self.problem = ""

    @property
    def total_bytes(self) -> int:
        """Bytes of raw space in all layers."""
        return sum(layer.table.raw_size for layer in self._layers)

    @property
    def done_bytes(self) -> int:
        """Bytes of raw space that are present."""
        return sum(layer.stored.present_bytes for layer in self._layers)

    async def run(self) -> None:
        """Fill until fully local, or until a layer has been quarantined.

        What fails is tried again, ever more seldom, for as long as this is not cancelled. For room
        in the store it waits.
        """
        self.fully_local = trio.Event()
        pause = FIRST_PAUSE
        self._scheduler.expect_reads()  # an image is mounted to start something on it
        while True:
            before = self.done_bytes
            self.problem = ""
            try:
                await self._pass()
            except IntegrityError as error:
                self.problem = str(error)
                return
            if all(layer in self._proven and layer.stored.complete for layer in self._layers):
                self.fully_local.set()
                return
            pause = FIRST_PAUSE if self.done_bytes > before else min(LONGEST_PAUSE, 2 * pause)
            log.warning("fill goes on in %.0f s: %s", pause, self.problem)
            await trio.sleep(pause)

    async def _pass(self) -> None:
        """Ask once for all that is missing. Raises IntegrityError after a quarantine."""
        self._windows.clear()
        self._proven = {layer for layer in self._proven if layer.stored.complete}
        if here := [one for one in self._layers if one.stored.complete and one not in self._proven]:
            # Proven before, perhaps for another image that has the layer.
            self._proven.update(
                await trio.to_thread.run_sync(lambda: [one for one in here if one.stored.proven])
            )
        for layer in self._layers:
            table = layer.table
            # A stream with one seek point is fetched front to back in one run.
            step = WINDOW if _seekable(table) else max(1, table.chunk_count)
            self._windows += [
                (layer, first, min(first + step, table.chunk_count) - 1)
                for first in range(0, table.chunk_count, step)
            ]
        async with trio.open_nursery() as beside:
            beside.start_soon(self._hash_along)
            async with trio.open_nursery() as nursery:
                for _ in range(WINDOWS):
                    nursery.start_soon(self._fill_windows)
            beside.cancel_scope.cancel()
        for layer in self._layers:
            await self._prove(layer)

    async def _fill_windows(self) -> None:
        while self._windows:
            layer, first, last = self._windows.popleft()
            missing = layer.stored.missing(first, last)
            try:
                while missing:
                    async with self._room(layer, len(missing)) as granted:
                        await self._scheduler.fill(layer.origin, missing[:granted])
                    self._arrived.set()
                    missing = missing[granted:]
            except FetchError as error:
                self.problem = str(error)

    @asynccontextmanager
    async def _room(self, layer: LazyLayer, chunks: int) -> AsyncIterator[int]:
        """Room in the store for so many chunks, or for some of them; waits until there is."""
        space = layer.stored.space
        least = min(chunks, ENOUGH_ROOM) if _seekable(layer.table) else chunks
        granted = space.reserve(chunks * CHUNK_SIZE, least * CHUNK_SIZE)
        while not granted:
            self.problem = HELD_BACK
            await trio.sleep(ROOM_POLL)
            granted = space.reserve(chunks * CHUNK_SIZE, least * CHUNK_SIZE)
            if granted:
                self.problem = ""
        try:
            yield -(-granted // CHUNK_SIZE)
        finally:
            space.release(granted)

    async def _prove(self, layer: LazyLayer) -> None:
        """Compare a complete layer with its diff_id. Raises IntegrityError after a quarantine."""
        table, stored = layer.table, layer.stored
        if layer in self._proven:
            return
        try:
            with held([stored]):  # or what is hashed could be evicted
                if not stored.complete:
                    return
                if stored.proven_diff_id != table.diff_id:
                    await self._hash(layer)
                    found = self._digests[layer].hasher.digest()
                    self._digests[layer] = _Digest()  # for the next time, if it is wrong
                    if found != table.diff_id:
                        await self._blame(layer, found)
                        return
                    await trio.to_thread.run_sync(stored.record_diff_id, found)
        except StoreError as error:
            self.problem = str(error)
            return
        self._proven.add(layer)

    async def _hash_along(self) -> None:
        """Hash what has come while the rest is on its way, and the kernel has it in memory."""
        with suppress(StoreError):  # it is met again when the layer is proven
            while True:
                self._arrived = trio.Event()
                for layer in self._layers:
                    if layer not in self._proven:
                        await self._hash(layer)
                await self._arrived.wait()

    async def _hash(self, layer: LazyLayer) -> None:
        """Go on with the hash of a layer, for as far as that is present."""
        digest, size = self._digests[layer], layer.table.raw_size
        while digest.end < size:
            await self._scheduler.give_way()
            end = min(digest.end + HASH_PIECE, size)
            if not await trio.to_thread.run_sync(digest.advance, layer.stored, end):
                break

    async def _blame(self, layer: LazyLayer, found: bytes) -> None:
        """Is it the disk, whose chunks are fetched again, or the file index?"""
        for chunk in range(layer.table.chunk_count):
            await self._scheduler.give_way()
            await trio.to_thread.run_sync(layer.stored.check, chunk)
        if not layer.stored.complete:
            self.problem = f"chunks of {layer.table} were damaged on disk"
            return
        error = IntegrityError(
            f"{layer.table} unpacks to sha256:{found.hex()} "
            f"instead of sha256:{layer.table.diff_id.hex()}",
            hint="its file index is wrong: remove it and build another",
        )
        log.error("%s", error)
        self._quarantine(layer, error)
        raise error


def _seekable(table: LayerTable) -> bool:
    """Whether parts of a layer can be had without all that is before them."""
    return table.codec is Codec.PLAIN or len(table.raw_offsets) > 1
