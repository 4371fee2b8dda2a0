"""One layer's chunks on disk: nothing unverified goes in or comes out.

The order of writes makes a crash harmless at any instant:

    verify -> write raw -> (batched, `flush`) sync raw -> set bits -> sync bits

and the other way round, when something has to go (`evict`):

    clear bits -> sync bits -> punch a hole

A bit is durable only after the data it vouches for, and gone before it. A chunk counts as present
as soon as it is written, for a successor of this process as well (`chunks` keeps the books); what
was not flushed when the power went is simply fetched again.
Opening a new layer waits for no disk, because a container is waiting: its files' names are synced
with the first flush, before its first bit.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from index.erofs.layout import BLOCK_SIZE
from index.errors import IntegrityError
from index.tables import CHUNK_SIZE
from snapshotter.store.chunks import ChunkStates
from snapshotter.store.durable import (
    discard_temporaries,
    remove_file,
    sync_directory,
    write_file,
)
from snapshotter.store.errors import StoreError, StoreFullError, store_error
from snapshotter.store.holes import allocated, punch_hole, runs
from snapshotter.store.leases import sole_access
from snapshotter.store.sums import BLOCK_SIZE as SUMMED_SIZE
from snapshotter.store.sums import BlockSums

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from index.tables import LayerTable
    from snapshotter.store.cache import VerifiedCache
    from snapshotter.store.space import Space

log = logging.getLogger(__name__)

Bytes = bytes | memoryview

COMPLAINT_INTERVAL = 60.0
"""Seconds between two log lines about a disk that refuses chunks: a guess at what an
administrator wants to see of a full disk."""


class StoredLayer:
    """A layer's raw file, and what of it is here. Thread-safe. Made by `LayerStore.open` alone."""

    def __init__(
        self, directory: Path, table: LayerTable, key: bytes, cache: VerifiedCache, space: Space
    ) -> None:
        self.table = table
        self.key = key
        self.raw_path = directory / "raw"
        self.space = space
        self._cache = cache
        self._diff_id_path = directory / "diff_id"
        self._users = 1
        self._users_lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._next_complaint = 0.0
        self._names_synced = False
        # The kernel's EROFS reads the file in whole blocks, or not at all (EIO).
        self._file_size = table.raw_size + -table.raw_size % BLOCK_SIZE
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise store_error(error, directory, "cannot create") from error
        discard_temporaries(directory)
        self._chunks = ChunkStates(directory, table)
        try:
            self._raw = os.open(self.raw_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if os.fstat(self._raw).st_size != self._file_size:
                os.ftruncate(self._raw, self._file_size)
        except OSError as error:
            self._chunks.close()
            raise store_error(error, self.raw_path, "cannot open") from error
        self._sums = BlockSums(table.chunk_count)

        self.start_chunks: set[int] = set()
        """Chunks that starts need: the last to be evicted."""

    # --- what is there ---

    def has(self, chunk: int) -> bool:
        return self._chunks.has(chunk)

    def missing(self, first: int, last: int) -> list[int]:
        """The chunks of `first` … `last` inclusive that are not present."""
        return self._chunks.missing(first, last)

    @property
    def complete(self) -> bool:
        return self._chunks.complete

    @property
    def present_bytes(self) -> int:
        """Bytes of raw space that are present."""
        return self._chunks.present_bytes

    @property
    def dirty_bytes(self) -> int:
        """About how many bytes were written since the last flush."""
        return self._chunks.dirty_bytes

    def disk_usage(self) -> int:
        """Bytes of disk that raw space takes."""
        return 512 * os.fstat(self._raw).st_blocks

    # --- reading ---

    def peek(self, chunk: int, start: int = 0, end: int = CHUNK_SIZE) -> Bytes | None:
        """Bytes `start` … `end` of a chunk if that needs no wait for a disk, else None."""
        self._chunks.use(chunk, self.space.now)
        return self._read(chunk, start, end, os.RWF_NOWAIT)

    def read(self, chunk: int, start: int = 0, end: int = CHUNK_SIZE) -> Bytes | None:
        """Bytes `start` … `end` of a chunk, or None if it is not present.

        What comes from the disk is verified: the first time in this process all of the chunk, by
        its digest, and then the blocks that are asked for (`sums`). A chunk that turns out to be
        damaged or unreadable is dropped and not present any more.
        """
        return self._read(chunk, start, end, 0)

    def check(self, chunk: int) -> memoryview | None:
        """All of a chunk from the disk, verified by its digest, or None."""
        return self._read_all(chunk, 0)

    def _read(self, chunk: int, start: int, end: int, flags: int) -> Bytes | None:
        data: Bytes | None = self._cache.get(self.key, chunk)
        if data is None and self._sums.knows(chunk):
            return self._read_blocks(chunk, start, end, flags)
        if data is None:
            data = self._read_all(chunk, flags)
        return None if data is None else memoryview(data)[start:end]

    def _read_blocks(self, chunk: int, start: int, end: int, flags: int) -> Bytes | None:
        end = min(end, self.table.chunk_length(chunk))
        first = start - start % SUMMED_SIZE
        last = min(end + -end % SUMMED_SIZE, self.table.chunk_length(chunk))
        buffer = self._from_disk(chunk, first, last, flags)
        if buffer is None:
            return None
        if not self._sums.intact(chunk, first, buffer):
            self.drop(chunk, "is damaged")
            return None
        return memoryview(buffer)[start - first : end - first]

    def _read_all(self, chunk: int, flags: int) -> memoryview | None:
        buffer = self._from_disk(chunk, 0, self.table.chunk_length(chunk), flags)
        if buffer is None:
            return None
        try:
            self.table.verify(chunk, buffer)
        except IntegrityError:
            self.drop(chunk, "is damaged")
            return None
        self._sums.note(chunk, buffer)
        return memoryview(buffer).toreadonly()

    def _from_disk(self, chunk: int, start: int, end: int, flags: int) -> bytearray | None:
        """Part of a chunk, unverified; None if it is not present, or cannot be read (so)."""
        if not self._chunks.has(chunk):
            return None
        buffer = bytearray(end - start)
        try:
            length = os.preadv(self._raw, [buffer], chunk * CHUNK_SIZE + start, flags)
        except OSError as error:
            if not flags:  # else it is not in memory, or the file system cannot tell
                self.drop(chunk, f"cannot be read: {error.strerror}")
            return None
        if length < len(buffer):
            if not flags:
                self.drop(chunk, "is cut short")
            return None
        return buffer

    def drop(self, chunk: int, why: str) -> None:
        """Stop believing a chunk on disk; logged. It will be fetched again."""
        if not self._chunks.has(chunk):
            return  # it was evicted while somebody read it
        log.error(
            "chunk %d of %s (%s, offset %d) %s: it is fetched again",
            chunk,
            self.table,
            self.raw_path,
            chunk * CHUNK_SIZE,
            why,
        )
        try:
            self._chunks.drop(chunk)
        except OSError as error:
            log.warning("cannot clear a bit of %s: %s", self.raw_path.parent, error.strerror)
        self._void_proof()

    def _void_proof(self) -> None:
        try:
            remove_file(self._diff_id_path)
        except StoreError as error:
            log.warning("%s", error)

    # --- writing ---

    def write(self, chunk: int, data: bytes, *, remember: bool = True) -> None:
        """Verify a chunk, keep it and call it present; `remember` puts it into the memory, too.

        Raises IntegrityError if these are not the chunk's bytes, and StoreError (StoreFullError)
        if the disk does not take them: they are verified then, but not present.
        """
        self.table.verify(chunk, data)
        self._sums.note(chunk, data)
        if remember:
            self._cache.put(self.key, chunk, data)
        try:
            with self._chunks.being_written(chunk):
                try:
                    with self.space.admitted(len(data), self.raw_path):
                        self._write_raw(data, chunk * CHUNK_SIZE)
                except OSError as error:
                    raise store_error(error, self.raw_path, "cannot write") from error
                self._chunks.written(chunk, self.space.now)
        except StoreError as problem:
            if isinstance(problem.__cause__, OSError) and isinstance(problem, StoreFullError):
                self.space.note_full()
            self._complain(problem)
            raise

    def _write_raw(self, data: bytes, offset: int) -> None:
        written = os.pwrite(self._raw, data, offset)
        while written < len(data):  # a disk that is nearly full takes a part first
            more = os.pwrite(self._raw, memoryview(data)[written:], offset + written)
            if not more:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            written += more

    def _complain(self, problem: StoreError) -> None:
        now = time.monotonic()
        if now >= self._next_complaint:
            self._next_complaint = now + COMPLAINT_INTERVAL
            log.warning("chunks of %s are served but not kept: %s", self.table, problem)

    def flush(self) -> None:
        """Make durable what was written before the call. Blocks; raises StoreError.

        Chunks whose sync failed are not present any more: the kernel may have dropped them.
        """
        with self._flush_lock:
            chunks = self._chunks.begin_flush()
            if chunks is None:
                return
            try:
                self._sync_names()
                os.fdatasync(self._raw)
            except OSError as error:
                self._chunks.lose(chunks)
                raise store_error(error, self.raw_path, "cannot sync") from error
            try:
                self._chunks.make_durable(chunks)
            except OSError as error:
                path = self.raw_path.with_name("present")
                raise store_error(error, path, "cannot sync") from error

    def _sync_names(self) -> None:
        """Make the files' own names durable, once. Raises OSError."""
        if not self._names_synced:
            sync_directory(self.raw_path.parent)
            sync_directory(self.raw_path.parent.parent)
            self._names_synced = True

    # --- making room ---

    def hold(self) -> None:
        """Let nothing be evicted until `unhold`: for who reads the raw file by itself. What was
        evicted before is not `complete` any more."""
        self._chunks.hold()

    def unhold(self) -> None:
        self._chunks.unhold()

    def candidates(self) -> list[tuple[bool, int, int]]:
        """What may be evicted: for each chunk whether starts need it, when it was last used (as
        `Space.now` counts), its number. Nothing while somebody holds the layer."""
        return self._chunks.candidates(self.start_chunks)

    def evict(self, chunks: Iterable[int]) -> int:
        """Give the disk space of chunks back, and that of what a crash has left half written.

        Returns how many bytes that were; none while somebody else, such as the kernel for a native
        mount, has the raw file open. Blocks. Raises StoreError.
        """
        with self._flush_lock, sole_access(self._raw) as alone:
            if not alone:
                return 0
            before = self.disk_usage()
            holes = self._begin_eviction(chunks)
            try:
                self._chunks.sync_eviction()
                for run in runs(sorted(holes)):
                    punch_hole(self._raw, run.start * CHUNK_SIZE, len(run) * CHUNK_SIZE)
            except OSError as error:
                raise store_error(error, self.raw_path, "cannot make holes in") from error
            finally:
                self._chunks.end_eviction()
            freed = before - self.disk_usage()
            self.space.evicted(freed)
            return freed

    def _begin_eviction(self, chunks: Iterable[int]) -> set[int]:
        """Stop believing chunks, and say where holes may be made. Raises StoreError."""
        count = self.table.chunk_count
        leftovers = {
            chunk
            for start, end in allocated(self._raw)
            for chunk in range(start // CHUNK_SIZE, min(-(-end // CHUNK_SIZE), count))
        }
        try:
            holes, ends_complete = self._chunks.begin_eviction(chunks, leftovers)
        except OSError as error:
            raise store_error(error, self.raw_path, "cannot clear bits of") from error
        if ends_complete:
            self._void_proof()
        return holes

    # --- the layer as a whole ---

    def hash_raw(self, hasher: hashlib._Hash, start: int, end: int) -> None:
        """Feed bytes `start` ... `end` of the raw file to a hash, unverified. Raises StoreError."""
        try:
            hasher.update(os.pread(self._raw, end - start, start))
        except OSError as error:
            raise store_error(error, self.raw_path, "cannot read") from error

    @property
    def proven_diff_id(self) -> bytes | None:
        """What all of raw space was found to hash to, if that was ever computed."""
        try:
            return self._diff_id_path.read_bytes()
        except OSError:
            return None

    @property
    def proven(self) -> bool:
        """Whether all of the layer is here, and was found to be what its table says."""
        return self.complete and self.proven_diff_id == self.table.diff_id

    def record_diff_id(self, diff_id: bytes) -> None:
        """Remember durably what a complete layer hashes to. Raises StoreError."""
        self.flush()
        write_file(self._diff_id_path, [diff_id])

    # --- whose it is ---

    def retain(self) -> None:
        """One more user, who calls `close` once."""
        with self._users_lock:
            self._users += 1

    def close(self) -> None:
        """One user less. Never blocks: files are closed by the store, once they are flushed."""
        with self._users_lock:
            self._users -= 1

    @property
    def unused(self) -> bool:
        return self._users == 0

    def release(self) -> None:
        """Close the files. For the store alone, when nobody can use the layer any more."""
        os.close(self._raw)
        self._raw = -1  # a late caller gets EBADF, not whatever file has the number next
        self._chunks.close()


@contextmanager
def held(layers: Iterable[StoredLayer]) -> Iterator[None]:
    """Nothing of these layers is evicted while the block runs."""
    all_of_them = list(layers)
    for layer in all_of_them:
        layer.hold()
    try:
        yield
    finally:
        for layer in all_of_them:
            layer.unhold()
