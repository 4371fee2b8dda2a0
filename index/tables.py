"""Layer tables: where each byte of a layer's raw space comes from, and what it must hash to.

Columnar and read in place: a table of a mapped file index costs no memory per row.
"""

from __future__ import annotations

import enum
import hashlib
import operator
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from index.errors import FormatError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK_SIZE = 256 << 10
"""Bytes of raw space that are verified, stored and marked present together; the last is shorter."""

DIGEST_SIZE = 32

MAX_RAW_SIZE = 512 << 32
"""Bytes a layer's raw space may have: EROFS counts a device's 512-byte blocks in 32 bits."""


class Codec(enum.IntEnum):
    """How a layer's blob is compressed. The values are part of the file format."""

    PLAIN = 0
    GZIP = 1
    ZSTD = 2
    LZ4 = 3


@dataclass(frozen=True, slots=True)
class SeekPoint:
    """A place where decompression can start.

    `raw_offset` is in bytes of raw space. `bit_offset` is in bits of the blob; only gzip has
    points inside a byte. `has_window` tells that the 32 KiB before it are needed (gzip only).
    """

    raw_offset: int
    bit_offset: int
    has_window: bool = False


class Span(NamedTuple):
    """What has to be fetched to decode from one seek point to another.

    `start` … `end` are bytes of the blob (end exclusive); decoding yields raw space from
    `raw_start` to `raw_end`. `point` is the number of the seek point at which it starts.
    """

    point: int
    start: int
    end: int
    raw_start: int
    raw_end: int


@dataclass(frozen=True, slots=True)
class LayerTable:
    """One layer of a file index. Sequences may be views into a mapped file.

    `digest` and `diff_id` are the raw 32 bytes of the SHA-256 of the blob and of raw space.
    `raw_offsets` and `bit_offsets` have one element a seek point; the first point is at raw 0.
    `window_flags` has one byte a point. `digests` is the concatenation of one SHA-256 a chunk.
    """

    digest: bytes
    diff_id: bytes
    codec: Codec
    blob_size: int
    raw_size: int
    raw_offsets: Sequence[int]
    bit_offsets: Sequence[int]
    window_flags: Sequence[int]
    digests: bytes | memoryview

    @property
    def chunk_count(self) -> int:
        return -(-self.raw_size // CHUNK_SIZE)

    def chunk_length(self, chunk: int) -> int:
        """Bytes in this chunk: CHUNK_SIZE except for the last."""
        return min(CHUNK_SIZE, self.raw_size - chunk * CHUNK_SIZE)

    def chunk_digest(self, chunk: int) -> bytes:
        return bytes(self.digests[chunk * DIGEST_SIZE : (chunk + 1) * DIGEST_SIZE])

    def verify(self, chunk: int, data: bytes | bytearray | memoryview) -> None:
        """Raise IntegrityError unless `data` is exactly this chunk's bytes."""
        if hashlib.sha256(data).digest() != self.chunk_digest(chunk):
            raise IntegrityError(f"chunk {chunk} of {self} does not match its digest")

    def check(self) -> None:
        """Raise FormatError if the columns contradict each other or the sizes."""
        if not 0 <= self.raw_size <= MAX_RAW_SIZE:
            raise FormatError(f"{self} has {self.raw_size} bytes of raw space")
        if len(self.digests) != DIGEST_SIZE * self.chunk_count:
            raise FormatError(f"{self} has a wrong number of chunk digests")
        raw, bits = self.raw_offsets, self.bit_offsets
        if not len(raw) == len(bits) == len(self.window_flags):
            raise FormatError(f"{self} has columns of different lengths")
        if not raw or raw[0] != 0 or (len(raw) > 1 and raw[-1] >= self.raw_size):
            raise FormatError(f"{self} has no seek points or some outside its raw space")
        if bits[-1] > 8 * self.blob_size:
            raise FormatError(f"{self} has seek points outside its blob")
        if not all(map(operator.lt, raw, raw[1:])) or not all(map(operator.lt, bits, bits[1:])):
            raise FormatError(f"{self} has seek points out of order")
        if max(self.window_flags) > 1:
            raise FormatError(f"{self} has malformed window flags")
        if self.codec is not Codec.GZIP and (
            any(self.window_flags) or any(bit % 8 for bit in bits)
        ):
            raise FormatError(f"{self} has gzip seek points in a {self.codec.name.lower()} layer")
        if self.codec is Codec.PLAIN and (self.blob_size != self.raw_size or len(raw) != 1):
            raise FormatError(f"{self} is a plain tar of a wrong size")

    def __str__(self) -> str:
        return f"layer sha256:{self.digest.hex()}"

    @property
    def content_key(self) -> bytes:
        """SHA-256 over raw size and all chunk digests: names what this layer's raw space holds.

        Stores are keyed by it, not by diff_id, so that an index that lies about a layer's chunks
        can never put bytes where an honest index of the same layer would look.
        """
        hasher = hashlib.sha256(self.raw_size.to_bytes(8, "little"))
        hasher.update(self.digests)
        return hasher.digest()

    def span(self, first: int, last: int) -> Span:
        """The smallest span that decodes to chunks `first` … `last` inclusive.

        For plain tars the span is cut to the chunks; for the others it starts at the nearest
        seek point at or before the first chunk and ends at the first point that is at or past the
        end of the last chunk (or at the end of the blob).
        """
        if not 0 <= first <= last < self.chunk_count:
            raise FormatError(f"chunks {first} to {last} of a layer of {self.chunk_count}")
        raw_start = first * CHUNK_SIZE
        raw_end = min((last + 1) * CHUNK_SIZE, self.raw_size)
        if self.codec is Codec.PLAIN:
            return Span(0, raw_start, raw_end, raw_start, raw_end)
        point = bisect_right(self.raw_offsets, raw_start) - 1
        end_point = point + 1
        while end_point < len(self.raw_offsets) and self.raw_offsets[end_point] < raw_end:
            end_point += 1
        bits = self.bit_offsets[point]
        if end_point < len(self.raw_offsets):
            end = (self.bit_offsets[end_point] + 7) // 8
            raw_end = self.raw_offsets[end_point]
        else:
            end, raw_end = self.blob_size, self.raw_size
        return Span(point, bits // 8, end, self.raw_offsets[point], raw_end)
