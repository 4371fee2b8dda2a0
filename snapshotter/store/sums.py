"""Checksums of blocks that were verified: a small read from the disk costs a small check.

A chunk's SHA-256 needs all of its 256 KiB. So when a chunk has been verified by that, be it on its
way to the disk or back from it, the CRC-32 of each 4 KiB of it is remembered in this process. Who
reads a part later compares that with what the disk gives. A CRC-32 finds all damage of up to 32
bits in a row, and any other but for one time in 4 billion; against who can change both disk and
memory of this process there is no check.
"""

from __future__ import annotations

import mmap

from isal.isal_zlib import crc32

from index.tables import CHUNK_SIZE

BLOCK_SIZE = 4096
"""Bytes: what the kernel asks for at least, and a disk gives."""

_BLOCKS = CHUNK_SIZE // BLOCK_SIZE
_SUM_SIZE = 4


class BlockSums:
    """Of one layer. Thread-safe. 256 bytes a chunk, once it is noted, and 1 before."""

    def __init__(self, chunks: int) -> None:
        self._noted = bytearray(chunks)
        # Anonymous memory, so that what is never written takes none.
        self._sums = memoryview(mmap.mmap(-1, max(1, chunks) * _BLOCKS * _SUM_SIZE)).cast("I")

    def note(self, chunk: int, data: bytes | bytearray | memoryview) -> None:
        """Remember all of a chunk that was verified just now."""
        view = memoryview(data)
        first = chunk * _BLOCKS
        for number, start in enumerate(range(0, len(view), BLOCK_SIZE)):
            self._sums[first + number] = crc32(view[start : start + BLOCK_SIZE])
        self._noted[chunk] = 1

    def knows(self, chunk: int) -> bool:
        return bool(self._noted[chunk])

    def intact(self, chunk: int, start: int, data: bytearray) -> bool:
        """Whether a noted chunk has these bytes from `start` on, whole blocks but for its last."""
        view = memoryview(data)
        first = chunk * _BLOCKS + start // BLOCK_SIZE
        return all(
            crc32(view[at : at + BLOCK_SIZE]) == self._sums[first + number]
            for number, at in enumerate(range(0, len(view), BLOCK_SIZE))
        )
