"""The durable presence bitmap of one layer: which chunks of its raw file can be believed.

The file is a header block and one block for each 4064 chunks, all of 512 bytes, the unit that
disks write as a whole. Integers are little-endian.

    header block                              bitmap block
    offset size field                         offset size field
         0    8 magic "FBpresnt"                   0  508 bits, least significant first
         8    4 version, 1                       508    4 CRC-32 of the bits, started with
        12    4 bytes in a chunk                            the block's number
        16    8 bytes in raw space
        24    8 chunks                        A block of zeros is valid: nothing is present.
        32   32 content key of the layer
        64    4 CRC-32 of bytes 0 ... 63

A damaged block costs its own chunks, a damaged header all of them: they are fetched again.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from typing import TYPE_CHECKING

from index.tables import CHUNK_SIZE
from snapshotter.store.errors import store_error

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from index.tables import LayerTable

log = logging.getLogger(__name__)

BLOCK_SIZE = 512
VERSION = 1
_MAGIC = b"FBpresnt"
_HEADER = struct.Struct("<8sIIQQ32s")
_CRC = struct.Struct("<I")
_BITS = BLOCK_SIZE - _CRC.size
CHUNKS_PER_BLOCK = 8 * _BITS
_EMPTY = bytes(BLOCK_SIZE)


def encode_header(table: LayerTable) -> bytes:
    fields = _HEADER.pack(
        _MAGIC, VERSION, CHUNK_SIZE, table.raw_size, table.chunk_count, table.content_key
    )
    return (fields + _CRC.pack(zlib.crc32(fields))).ljust(BLOCK_SIZE, b"\0")


def encode_block(number: int, bits: bytes | bytearray | memoryview) -> bytes:
    """One block of up to 508 bytes of bits."""
    padded = bytes(bits).ljust(_BITS, b"\0")
    return padded + _CRC.pack(zlib.crc32(padded, number))


def decode_block(number: int, block: bytes) -> bytes | None:
    """The 508 bytes of bits in a block, or None if it is damaged."""
    if block == _EMPTY:
        return block[:_BITS]
    bits = block[:_BITS]
    if len(block) != BLOCK_SIZE or block != encode_block(number, bits):
        return None
    return bits


def read_presence(path: Path) -> tuple[int, int]:
    """(bytes of raw space, bytes of it that are durably present) of a layer that may be closed.

    Nothing is known of a damaged file: (0, 0). Raises OSError.
    """
    content = path.read_bytes()
    fields = content[: _HEADER.size]
    if len(content) < BLOCK_SIZE or content[_HEADER.size :][: _CRC.size] != _CRC.pack(
        zlib.crc32(fields)
    ):
        return 0, 0
    _, _, chunk_size, raw_size, chunks, _ = _HEADER.unpack(fields)
    present = last = 0
    for number, start in enumerate(range(BLOCK_SIZE, len(content), BLOCK_SIZE)):
        bits = int.from_bytes(decode_block(number, content[start:][:BLOCK_SIZE]) or b"", "little")
        present += bits.bit_count()
        last = bits >> (chunks - 1 - number * CHUNKS_PER_BLOCK) & 1 if chunks else 0
    return raw_size, present * chunk_size - last * (chunks * chunk_size - raw_size)


class PresenceFile:
    """An open presence bitmap. Not thread-safe: its layer holds a lock around every call."""

    def __init__(self, path: Path, table: LayerTable) -> None:
        """Open or create; what is damaged or belongs to something else is started anew, logged.

        Raises StoreError.
        """
        self._path = path
        self._count = table.chunk_count
        blocks = -(-self._count // CHUNKS_PER_BLOCK)
        self._bits = bytearray(blocks * _BITS)
        header = encode_header(table)
        size = BLOCK_SIZE * (1 + blocks)
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                content = os.pread(self._handle, size + 1, 0)
                if len(content) != size or content[:BLOCK_SIZE] != header:
                    if content:
                        log.error("%s is damaged or foreign: its chunks are fetched again", path)
                    os.ftruncate(self._handle, 0)
                    # All of it now: on a disk that is full later, bits can still be changed.
                    os.pwrite(self._handle, header.ljust(size, b"\0"), 0)
                    return
            except BaseException:
                os.close(self._handle)
                raise
        except OSError as error:
            raise store_error(error, path, "cannot open") from error
        for number in range(blocks):
            start = BLOCK_SIZE * (1 + number)
            bits = decode_block(number, content[start : start + BLOCK_SIZE])
            if bits is None:
                log.error("block %d of %s is damaged: its chunks are fetched again", number, path)
                continue
            self._bits[number * _BITS : (number + 1) * _BITS] = bits

    def present(self) -> bytearray:
        """One byte a chunk: 1 where the chunk is durably present."""
        flags = b"".join(_UNPACKED[byte] for byte in self._bits)
        return bytearray(flags[: self._count])

    def mark(self, chunks: Iterable[int]) -> None:
        """Set the bits of chunks whose data has been synced. Durable after `sync`."""
        self._change(chunks, present=True)

    def clear(self, chunks: Iterable[int]) -> None:
        """Clear the bits of chunks that are not to be believed. Durable after `sync`."""
        self._change(chunks, present=False)

    def sync(self) -> None:
        """Wait until the disk has the bits. Raises OSError."""
        os.fdatasync(self._handle)

    def close(self) -> None:
        os.close(self._handle)
        self._handle = -1

    def _change(self, chunks: Iterable[int], *, present: bool) -> None:
        blocks = set()
        for chunk in chunks:
            if present:
                self._bits[chunk >> 3] |= 1 << (chunk & 7)
            else:
                self._bits[chunk >> 3] &= ~(1 << (chunk & 7))
            blocks.add(chunk // CHUNKS_PER_BLOCK)
        for number in sorted(blocks):
            bits = self._bits[number * _BITS : (number + 1) * _BITS]
            os.pwrite(self._handle, encode_block(number, bits), BLOCK_SIZE * (1 + number))


_UNPACKED = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]
