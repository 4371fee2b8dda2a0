"""zstd (RFC 8878): frames, as the steps that a decompressor can be trusted with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import zstandard

from index.codecs.base import PIECE_SIZE
from index.codecs.frames import MAGIC_SIZE, Block, FrameStream
from index.errors import CodecError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_WINDOW_SIZE = 1 << 27
"""Memory a frame may ask for, in bytes: what the zstd tool accepts without being told."""

# Frame header (RFC 8878, section 3.1.1.1):
#   u32 le    magic
#   u8        descriptor: see the masks below
#   u8        window descriptor: exponent (5 bits) and mantissa (3); absent in a single segment
#   0/1/2/4   dictionary's number, le; size by the descriptor's bits 1-0
#   0/1/2/4/8 size of the content, le; size by its bits 7-6
_SINGLE_SEGMENT = 0x20  # the window is the whole content, and the content's size is given
_HAS_CHECKSUM = 0x04  # 4 bytes follow the last block
_DICTIONARY_SIZES = (0, 1, 2, 4)
_CONTENT_SIZE_SIZES = (0, 2, 4, 8)
_CONTENT_SIZE_BIAS = 256  # of the form in 2 bytes
_CHECKSUM_SIZE = 4
_MIN_WINDOW_LOG = 10

# Block header (section 3.1.1.2), u24 le: last (1 bit), type (2 bits), size (21 bits)
_BLOCK_HEADER_SIZE = 3
_RAW, _RLE, _COMPRESSED, _RESERVED = range(4)
_MAX_BLOCK_SIZE = 128 << 10  # of both forms


class ZstdFrames(FrameStream):
    """See FrameStream. libzstd works without the GIL."""

    name = "zstd"
    magic = b"\x28\xb5\x2f\xfd"

    def __init__(self) -> None:
        super().__init__()
        self._context = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_SIZE)
        self._decompressor = self._context.decompressobj()
        self._checksum_size = 0

    def _open(self, buffer: bytearray, at: int) -> int:
        if len(buffer) - at <= MAGIC_SIZE:
            return 0
        descriptor = buffer[at + MAGIC_SIZE]
        single = bool(descriptor & _SINGLE_SEGMENT)
        dictionary_size = _DICTIONARY_SIZES[descriptor & 0x03]
        content_size_size = _CONTENT_SIZE_SIZES[descriptor >> 6] or int(single)
        dictionary_at = MAGIC_SIZE + (1 if single else 2)
        content_size_at = dictionary_at + dictionary_size
        size = content_size_at + content_size_size
        header = bytes(buffer[at : at + size])
        if len(header) < size:
            return 0
        if any(header[dictionary_at:content_size_at]):
            raise UnsupportedError("zstd frame needs a dictionary")
        if single:
            window = int.from_bytes(header[content_size_at:], "little")
            window += _CONTENT_SIZE_BIAS if content_size_size == 2 else 0
        else:
            exponent, mantissa = divmod(header[MAGIC_SIZE + 1], 8)
            base = 1 << (_MIN_WINDOW_LOG + exponent)
            window = base + base // 8 * mantissa
        if window > MAX_WINDOW_SIZE:
            raise UnsupportedError(
                f"zstd frame needs a window of {window >> 20} MiB",
                hint=f"compress it with a window of at most {MAX_WINDOW_SIZE >> 20} MiB",
            )
        self._checksum_size = _CHECKSUM_SIZE if descriptor & _HAS_CHECKSUM else 0
        self._decompressor = self._context.decompressobj(write_size=PIECE_SIZE)
        return size

    def _block(self, buffer: bytearray, at: int) -> Block | None:
        if len(buffer) - at < _BLOCK_HEADER_SIZE:
            return None
        header = int.from_bytes(buffer[at : at + _BLOCK_HEADER_SIZE], "little")
        last, kind, size = bool(header & 1), header >> 1 & 0x03, header >> 3
        if kind == _RESERVED or size > _MAX_BLOCK_SIZE:
            raise CodecError("malformed zstd data: a block that cannot be")
        return Block(
            size=_BLOCK_HEADER_SIZE
            + (1 if kind == _RLE else size)
            + (self._checksum_size if last else 0),
            bound=_MAX_BLOCK_SIZE if kind == _COMPRESSED else size,
            last=last,
        )

    def _decompress(self, data: bytes) -> Iterator[bytes]:
        try:
            raw = self._decompressor.decompress(data)
        except zstandard.ZstdError as error:
            raise CodecError(f"malformed zstd data: {error}") from error
        if raw:
            yield raw

    def _at_end(self) -> bool:
        return self._decompressor.eof
