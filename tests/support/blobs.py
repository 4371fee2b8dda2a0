"""Layers for tests of store and fetch: any raw bytes, compressed somehow, with their table."""

from __future__ import annotations

import gzip
import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lz4.frame
import zstandard

from index.codecs import scanner
from index.tables import CHUNK_SIZE, Codec, LayerTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from index.tables import SeekPoint


@dataclass(frozen=True)
class MadeLayer:
    """A blob, what it decompresses to, and how to get at parts of it."""

    raw: bytes
    blob: bytes
    table: LayerTable
    windows: dict[int, bytes]
    """By number of the seek point."""

    def chunk(self, number: int) -> bytes:
        return self.raw[number * CHUNK_SIZE : (number + 1) * CHUNK_SIZE]


def sample_bytes(size: int, seed: int = 0) -> bytes:
    """Bytes that compress to about a half, different in every chunk."""
    rng = random.Random(seed)
    block = rng.randbytes(1 << 12)
    parts = []
    for number in range(-(-size // 8192)):
        parts += [rng.randbytes(4088), number.to_bytes(8, "little"), block]
    return b"".join(parts)[:size]


def table_for(
    raw: bytes, blob: bytes, codec: Codec, points: Sequence[SeekPoint], *, diff_id: bytes = b""
) -> LayerTable:
    digests = b"".join(
        hashlib.sha256(raw[start : start + CHUNK_SIZE]).digest()
        for start in range(0, len(raw), CHUNK_SIZE)
    )
    return LayerTable(
        digest=hashlib.sha256(blob).digest(),
        diff_id=diff_id or hashlib.sha256(raw).digest(),
        codec=codec,
        blob_size=len(blob),
        raw_size=len(raw),
        raw_offsets=[point.raw_offset for point in points],
        bit_offsets=[point.bit_offset for point in points],
        window_flags=bytes(point.has_window for point in points),
        digests=digests,
    )


def make_layer(
    raw: bytes, codec: Codec = Codec.ZSTD, *, frame: int = CHUNK_SIZE, level: int = 1
) -> MadeLayer:
    """`frame` is in raw bytes: the spacing of zstd's and lz4's frames; 0 is a single frame."""
    pieces = [raw[start : start + frame] for start in range(0, len(raw), frame)] if frame else [raw]
    match codec:
        case Codec.PLAIN:
            blob = raw
        case Codec.GZIP:
            blob = gzip.compress(raw, level, mtime=0)
        case Codec.ZSTD:
            blob = b"".join(zstandard.ZstdCompressor(level).compress(piece) for piece in pieces)
        case Codec.LZ4:
            blob = b"".join(lz4.frame.compress(piece) for piece in pieces)
    scan = scanner(codec, limit=len(raw))
    for start in range(0, len(blob), 1 << 16):
        for _ in scan.feed(blob[start : start + (1 << 16)]):
            pass
    scan.finish()
    windows = iter(scan.windows)
    return MadeLayer(
        raw=raw,
        blob=blob,
        table=table_for(raw, blob, codec, scan.points),
        windows={n: next(windows) for n, point in enumerate(scan.points) if point.has_window},
    )
