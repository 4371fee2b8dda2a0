"""Where a regular file's bytes are, as EROFS chunk indices.

All chunks of a file have one size, a power of two of blocks, and each is either a hole or lies in
one piece in one device. The largest such size is taken: one index for a file in one piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from index.erofs.layout import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_BITS_MASK,
    CHUNK_INDEX,
    CHUNK_WITH_DEVICE,
    HOLE,
    align,
)
from index.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_CHUNKS = 16 << 20
"""Chunk indices a file may need: 128 MiB of them. A guess that is far above any honest file."""


class Piece(NamedTuple):
    """A run of a file: `offset` in the file and `length` in bytes, `block` in `device`."""

    offset: int
    length: int
    device: int
    block: int


def encode(size: int, pieces: Iterable[Piece]) -> tuple[int, bytes]:
    """The chunk format and the indices of a file of `size` > 0 bytes; gaps are holes.

    Offsets and lengths must be multiples of the block size, except for the length of what ends
    last. Raises UnsupportedError when they are not, when pieces overlap or go past the end, or
    when the file would need more than MAX_CHUNKS indices.
    """
    end = align(size, BLOCK_SIZE)
    runs = _join(pieces, end)
    edges = 0
    for run in runs:
        edges |= run.offset
        if run.offset + run.length < end:
            edges |= run.offset + run.length
    bits = CHUNK_BITS_MASK
    if edges:
        bits = min(bits, (edges & -edges).bit_length() - 1 - BLOCK_BITS)
    chunk_bits = BLOCK_BITS + bits
    count = (size - 1 >> chunk_bits) + 1
    if count > MAX_CHUNKS:
        raise UnsupportedError(
            f"a sparse file of {size} bytes in pieces of {1 << chunk_bits} needs {count} chunks; "
            f"at most {MAX_CHUNKS} are allowed"
        )
    hole = CHUNK_INDEX.pack(0, 0, HOLE)
    indices = bytearray()
    for run in runs:
        indices += hole * ((run.offset >> chunk_bits) - len(indices) // CHUNK_INDEX.size)
        last = run.block + (run.length - 1 >> BLOCK_BITS)
        for block in range(run.block, last + 1, 1 << bits):
            indices += CHUNK_INDEX.pack(0, run.device, block)
    indices += hole * (count - len(indices) // CHUNK_INDEX.size)
    return CHUNK_WITH_DEVICE | bits, bytes(indices)


def _join(pieces: Iterable[Piece], end: int) -> list[Piece]:
    """The pieces in order, those that continue each other made one, lengths in whole blocks."""
    runs: list[Piece] = []
    position = 0
    for piece in sorted(pieces):
        if piece.offset % BLOCK_SIZE or piece.offset < position or piece.length <= 0:
            raise UnsupportedError(
                f"data of {piece.length} bytes at {piece.offset} of a file overlaps or is not in "
                "blocks"
            )
        piece = piece._replace(length=align(piece.length, BLOCK_SIZE))
        position = piece.offset + piece.length
        if position > end:
            raise UnsupportedError(f"data up to {position} in a file that ends before {end}")
        if runs:
            last = runs[-1]
            if last.device == piece.device and (
                (last.offset + last.length, last.block + (last.length >> BLOCK_BITS))
                == (piece.offset, piece.block)
            ):
                runs[-1] = last._replace(length=last.length + piece.length)
                continue
        runs.append(piece)
    return runs
