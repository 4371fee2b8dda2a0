"""Which chunks of a layer are here, and what is under way with them.

    absent ──► being written ──► here, not synced ──► here, durable
      ▲                                │                    │
      ├── being evicted ◄──────────────┴────────────────────┤
      └── dropped: damaged, or lost by the disk ◄───────────┘

What is here is known three times: in memory, which is what counts while the process lives; for a
successor of this process (`recent`); and durably (`presence`). The layer whose chunks these are
moves the data itself, in the order that `layer` describes.
"""

from __future__ import annotations

import threading
from array import array
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from index.tables import CHUNK_SIZE
from snapshotter.store.errors import StoreFullError
from snapshotter.store.presence import PresenceFile
from snapshotter.store.recent import RecentChunks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

    from index.tables import LayerTable


class ChunkStates:
    """Of one layer. Thread-safe, but flushes and evictions are made one at a time."""

    def __init__(self, directory: Path, table: LayerTable) -> None:
        """Open or create the files that tell. Raises StoreError."""
        self._table = table
        self._lock = threading.Lock()
        self._presence = PresenceFile(directory / "present", table)
        try:
            self._recent = RecentChunks(directory / "recent", table)
        except BaseException:
            self._presence.close()
            raise
        self._here = self._presence.present()
        self._dirty: set[int] = set()
        for chunk in self._recent.chunks():
            if not self._here[chunk]:
                self._here[chunk] = 1
                self._dirty.add(chunk)
        self._here_count = self._here.count(1)
        self._used = array("I", bytes(4 * len(self._here)))
        self._writing: list[int] = []  # a list, because two may write the same chunk
        self._evicting: set[int] = set()
        self._holds = 0
        self._unsynced_clears = False

    def close(self) -> None:
        self._presence.close()
        self._recent.close()

    # --- what is here ---

    def has(self, chunk: int) -> bool:
        return bool(self._here[chunk])

    def missing(self, first: int, last: int) -> list[int]:
        """The chunks of `first` … `last` inclusive that are not here."""
        here = self._here
        return [chunk for chunk in range(first, last + 1) if not here[chunk]]

    @property
    def complete(self) -> bool:
        return self._here_count == len(self._here)

    @property
    def present_bytes(self) -> int:
        """Bytes of raw space that are here."""
        last = len(self._here) - 1
        if last < 0:
            return 0
        short = CHUNK_SIZE - self._table.chunk_length(last) if self._here[last] else 0
        return self._here_count * CHUNK_SIZE - short

    @property
    def dirty_bytes(self) -> int:
        """About how many bytes were written since the last flush."""
        return len(self._dirty) * CHUNK_SIZE

    def use(self, chunk: int, now: int) -> None:
        """A chunk is used, at a time that `Space.now` counts."""
        self._used[chunk] = now

    # --- coming ---

    @contextmanager
    def being_written(self, chunk: int) -> Iterator[None]:
        """Nobody makes a hole where a chunk is being written. Raises StoreFullError if somebody
        does that already."""
        with self._lock:
            if chunk in self._evicting:
                raise StoreFullError(f"chunk {chunk} of {self._table} is just being evicted")
            self._writing.append(chunk)
        try:
            yield
        finally:
            with self._lock:
                self._writing.remove(chunk)

    def written(self, chunk: int, now: int) -> None:
        """A chunk that was being written is here."""
        with self._lock:
            self._here_count += 1 - self._here[chunk]
            self._here[chunk] = 1
            self._used[chunk] = now
            self._dirty.add(chunk)
            with suppress(OSError):  # a successor would fetch it again
                self._recent.add(chunk)

    def begin_flush(self) -> set[int] | None:
        """The chunks whose data is to be synced before `make_durable`; None if there is nothing to
        do."""
        with self._lock:
            chunks, self._dirty = self._dirty, set()
            if not chunks and not self._unsynced_clears:
                return None
            self._unsynced_clears = False
            return chunks

    def lose(self, chunks: Collection[int]) -> None:
        """The data of chunks could not be synced: the kernel may have dropped it."""
        with self._lock:
            for chunk in chunks:
                self._forget(chunk)
            with suppress(OSError):  # else it is verified when it is read
                self._recent.remove(chunks)

    def make_durable(self, chunks: Collection[int]) -> None:
        """The data of chunks is synced: say so durably. Raises OSError."""
        try:
            with self._lock:
                # Dropped meanwhile, or dropped and written anew: not synced just now.
                synced = {c for c in chunks if self._here[c] and c not in self._dirty}
                self._presence.mark(synced)
            self._presence.sync()
        except OSError:
            with self._lock:
                self._dirty |= {c for c in chunks if self._here[c]}
                self._unsynced_clears = True
            raise

    # --- going ---

    def drop(self, chunk: int) -> None:
        """Stop believing a chunk; durable after the next flush, which knows of it even if this
        raises OSError."""
        with self._lock:
            self._forget(chunk)
            self._unsynced_clears = True
            self._disbelieve([chunk])

    def hold(self) -> None:
        """Let nothing be evicted until `unhold`."""
        with self._lock:
            self._holds += 1

    def unhold(self) -> None:
        with self._lock:
            self._holds -= 1

    def candidates(self, needed: Collection[int]) -> list[tuple[bool, int, int]]:
        """What may be evicted: for each chunk whether it is `needed`, when it was last used, its
        number. Nothing while somebody holds the layer."""
        with self._lock:
            if self._holds:
                return []
            here = bytes(self._here)
        used = self._used
        return [(n in needed, used[n], n) for n, is_here in enumerate(here) if is_here]

    def begin_eviction(
        self, chunks: Iterable[int], leftovers: Iterable[int]
    ) -> tuple[set[int], bool]:
        """Stop believing chunks.

        Returns where holes may be made until `end_eviction` (there, and where `leftovers` of a
        crash are no chunks), and whether this makes the layer incomplete. Raises OSError: no hole
        may be made then.
        """
        with self._lock:
            if self._holds:
                return set(), False
            going = {chunk for chunk in chunks if self._here[chunk]} - {*self._writing}
            absent = {chunk for chunk in leftovers if not self._here[chunk]} - {*self._writing}
            self._evicting |= going | absent
            ends_complete = self.complete and bool(going)
            for chunk in going:
                self._forget(chunk)
            try:
                self._disbelieve(going)
            except OSError:
                self._unsynced_clears = True
                self._evicting.clear()
                raise
        return going | absent, ends_complete

    def sync_eviction(self) -> None:
        """Wait until the disk believes no more in what is being evicted. Raises OSError."""
        try:
            self._presence.sync()
        except OSError:
            self._unsynced_clears = True
            raise

    def end_eviction(self) -> None:
        """The holes are made, or will not be."""
        with self._lock:
            self._evicting.clear()

    def _forget(self, chunk: int) -> None:
        self._here_count -= self._here[chunk]
        self._here[chunk] = 0
        self._dirty.discard(chunk)

    def _disbelieve(self, chunks: Iterable[int]) -> None:
        """Whoever opens the layer next is not to find chunks either. Durable after a sync of the
        bits. Raises OSError."""
        self._recent.remove(chunks)
        self._presence.clear(chunks)
