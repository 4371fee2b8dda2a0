"""lz4 frames (lz4_Frame_format.md, version 1.6), as steps for a decompressor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lz4.frame

from index.codecs.base import PIECE_SIZE
from index.codecs.frames import MAGIC_SIZE, Block, FrameStream
from index.errors import CodecError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Frame header:
#   u32 le   magic
#   u8 FLG   version (bits 7-6: 1), and the masks below
#   u8 BD    greatest size of a block (bits 6-4): 4 … 7 for 64 KiB … 4 MiB
#   0/8      size of the content
#   0/4      dictionary's number
#   u8       checksum of FLG … here, checked by the library
_VERSION_SHIFT, _VERSION = 6, 1
_HAS_BLOCK_CHECKSUMS = 0x10
_HAS_CONTENT_SIZE = 0x08
_HAS_CONTENT_CHECKSUM = 0x04
_HAS_DICTIONARY = 0x01
_CHECKSUM_SIZE = 4
_CONTENT_SIZE_SIZE = 8
_BLOCK_SIZES = {4: 64 << 10, 5: 256 << 10, 6: 1 << 20, 7: 4 << 20}

# Block: u32 le size (bit 31: stored uncompressed), data, perhaps a checksum.
# A size of 0 is the end mark; the content's checksum may follow.
_BLOCK_HEADER_SIZE = 4
_STORED = 1 << 31


class Lz4Frames(FrameStream):
    """See FrameStream. The library releases the GIL."""

    name = "lz4"
    magic = b"\x04\x22\x4d\x18"

    def __init__(self) -> None:
        super().__init__()
        self._block_size = 0
        self._block_checksum_size = 0
        self._content_checksum_size = 0

    def _open(self, buffer: bytearray, at: int) -> int:
        if len(buffer) - at < MAGIC_SIZE + 2:
            return 0
        flags, block_code = buffer[at + MAGIC_SIZE], buffer[at + MAGIC_SIZE + 1] >> 4
        if flags >> _VERSION_SHIFT != _VERSION or block_code not in _BLOCK_SIZES:
            raise CodecError("malformed lz4 data: a frame header that cannot be")
        if flags & _HAS_DICTIONARY:
            raise UnsupportedError("lz4 frame needs a dictionary")
        size = MAGIC_SIZE + 3 + (_CONTENT_SIZE_SIZE if flags & _HAS_CONTENT_SIZE else 0)
        if len(buffer) - at < size:
            return 0
        self._block_size = _BLOCK_SIZES[block_code]
        self._block_checksum_size = _CHECKSUM_SIZE if flags & _HAS_BLOCK_CHECKSUMS else 0
        self._content_checksum_size = _CHECKSUM_SIZE if flags & _HAS_CONTENT_CHECKSUM else 0
        self._decompressor = lz4.frame.LZ4FrameDecompressor()
        return size

    def _block(self, buffer: bytearray, at: int) -> Block | None:
        if len(buffer) - at < _BLOCK_HEADER_SIZE:
            return None
        header = int.from_bytes(buffer[at : at + _BLOCK_HEADER_SIZE], "little")
        if not header:
            return Block(_BLOCK_HEADER_SIZE + self._content_checksum_size, 0, last=True)
        size = header & ~_STORED
        if size > self._block_size:
            raise CodecError("malformed lz4 data: a block greater than its frame allows")
        size += _BLOCK_HEADER_SIZE + self._block_checksum_size
        return Block(size, self._block_size, last=False)

    def _decompress(self, data: bytes) -> Iterator[bytes]:
        while True:
            try:
                raw = self._decompressor.decompress(data, PIECE_SIZE)
            except RuntimeError as error:
                raise CodecError(f"malformed lz4 data: {error}") from error
            if raw:
                yield raw
            if self._decompressor.eof or self._decompressor.needs_input:
                return
            data = b""

    def _at_end(self) -> bool:
        return bool(self._decompressor.eof)
