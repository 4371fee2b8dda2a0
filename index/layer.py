"""One pass over a layer's blob: its digests, seek points, chunk digests and tar entries."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from index import codecs
from index.tables import CHUNK_SIZE, MAX_RAW_SIZE, Codec, LayerTable
from index.tar import TarScanner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from index.entry import Entry

_T = TypeVar("_T")

_MAX_QUEUED = 8
"""Batches that may wait for the other thread; one of raw bytes has less than 2 MiB."""


@dataclass(frozen=True, slots=True)
class LayerScan:
    """What a file index needs of one layer besides its entries.

    `windows` has WINDOW_SIZE bytes for each seek point that has a window, in order.
    """

    table: LayerTable
    windows: tuple[bytes, ...]


class LayerScanner:
    """Feed it a whole blob in pieces of any size; the result does not depend on the pieces.

    `codec` None means: by the blob's first bytes. Raw space may have `limit` bytes. Besides the
    codec's errors (see Scanner), those of the tar scanner pass through. After an error the
    scanner is spent.

    A thread of its own hashes, and chooses a gzip layer's points: with it a zstd layer goes at 400
    instead of 250 MB/s of raw space (two cores, both in use by others too).
    """

    def __init__(
        self,
        codec: Codec | None = None,
        *,
        limit: int = MAX_RAW_SIZE,
        on_raw: Callable[[bytes], None] | None = None,
    ) -> None:
        """`on_raw` is given raw space, piece after piece, from within `feed`."""
        self._codec = codec
        self._on_raw = on_raw
        self._limit = limit
        self._head = b""  # until there is enough of it to tell the codec
        self._aside = _Aside()
        self._scanner = None if codec is None else self._make_scanner(codec)
        self._tar = TarScanner()
        self._hashes = _Hashes()

    def feed(self, data: bytes | memoryview) -> list[Entry]:
        """Take the next bytes of the blob; return the tar entries that they complete."""
        data = bytes(data)
        if self._scanner is None:
            self._head += data
            if len(self._head) < codecs.DETECT_SIZE:
                return []
            data = self._detect()
        with self._no_thread_after_error():
            return self._scan(data)

    def finish(self) -> LayerScan:
        """The blob ends here. CodecError or TarError if it cannot."""
        with self._no_thread_after_error():
            if self._scanner is None:
                self._scan(self._detect())  # too short to complete an entry
            scanner, codec = self._scanner, self._codec
            assert scanner is not None
            assert codec is not None
            scanner.finish()
            self._tar.finish()
            self._aside.wait()
        self._aside.close()
        hashes = self._hashes
        points = scanner.points
        table = LayerTable(
            digest=hashes.blob.digest(),
            diff_id=hashes.raw.digest(),
            codec=codec,
            blob_size=hashes.blob_size,
            raw_size=hashes.raw_size,
            raw_offsets=array("Q", [point.raw_offset for point in points]),
            bit_offsets=array("Q", [point.bit_offset for point in points]),
            window_flags=bytes(point.has_window for point in points),
            digests=hashes.chunk_digests(),
        )
        return LayerScan(table, tuple(scanner.windows))

    @contextmanager
    def _no_thread_after_error(self) -> Iterator[None]:
        """An exception may keep the scanner alive for long: its thread must not wait for that."""
        try:
            yield
        except BaseException:
            self._aside.abandon()
            raise

    def _detect(self) -> bytes:
        head, self._head = self._head, b""
        self._codec = codecs.detect(head)
        self._scanner = self._make_scanner(self._codec)
        return head

    def _scan(self, data: bytes) -> list[Entry]:
        assert self._scanner is not None
        entries: list[Entry] = []
        batch: list[bytes] = []
        size = 0
        self._aside.submit(self._hashes.add_blob, data)
        for raw in self._scanner.feed(data):
            entries += self._tar.feed(raw)
            if self._on_raw is not None:
                self._on_raw(raw)
            batch.append(raw)
            size += len(raw)
            if size >= codecs.PIECE_SIZE:
                self._aside.submit(self._hashes.add_raw, batch)
                batch, size = [], 0
        if batch:
            self._aside.submit(self._hashes.add_raw, batch)
        return entries

    def _make_scanner(self, codec: Codec) -> codecs.Scanner:
        return codecs.scanner(codec, limit=self._limit, submit=self._aside.submit)


class _Aside:
    """A thread that does one thing after the other. It ends with the last reference to this."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "layer-aside")
        self._queued: deque[Future[None]] = deque()

    def submit(self, work: Callable[[_T], None], subject: _T, /) -> None:
        """See codecs.base.Submit. Waits while much is queued; raises what work before it raised."""
        self._wait(_MAX_QUEUED - 1)
        self._queued.append(self._thread.submit(work, subject))

    def wait(self) -> None:
        """Until all is done."""
        self._wait(0)

    def close(self) -> None:
        self._thread.shutdown()

    def abandon(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _wait(self, most: int) -> None:
        while len(self._queued) > most:
            self._queued.popleft().result()


class _Hashes:
    """SHA-256 of the blob, of raw space and of each chunk. One thread at a time may add."""

    def __init__(self) -> None:
        self.blob = hashlib.sha256()
        self.blob_size = 0
        self.raw = hashlib.sha256()
        self.raw_size = 0
        self._chunk = hashlib.sha256()
        self._digests = bytearray()  # of whole chunks

    def add_blob(self, data: bytes) -> None:
        self.blob.update(data)
        self.blob_size += len(data)

    def add_raw(self, batch: Sequence[bytes]) -> None:
        for raw in batch:
            self.raw.update(raw)
            left = memoryview(raw)
            while left:
                part = left[: CHUNK_SIZE - self.raw_size % CHUNK_SIZE]
                left = left[len(part) :]
                self._chunk.update(part)
                self.raw_size += len(part)
                if self.raw_size % CHUNK_SIZE == 0:
                    self._digests += self._chunk.digest()
                    self._chunk = hashlib.sha256()

    def chunk_digests(self) -> bytes:
        """Of all chunks; raw space ends here, possibly in mid-chunk."""
        return bytes(self._digests) + (self._chunk.digest() if self.raw_size % CHUNK_SIZE else b"")
