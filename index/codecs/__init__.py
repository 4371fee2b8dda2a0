"""The compressions that layers come in: one Scanner and one Decoder for each."""

from __future__ import annotations

from typing import assert_never

from index.codecs.base import PIECE_SIZE, Decoder, Scanner, Submit, at_once
from index.codecs.frames import FrameDecoder, FrameScanner
from index.codecs.gzip import GzipDecoder, GzipScanner
from index.codecs.lz4 import Lz4Frames
from index.codecs.plain import PlainDecoder, PlainScanner
from index.codecs.zstd import ZstdFrames
from index.tables import Codec

__all__ = ["DETECT_SIZE", "PIECE_SIZE", "Decoder", "Scanner", "decoder", "detect", "scanner"]

DETECT_SIZE = 8
"""How many bytes of a blob `detect` wants to see (fewer if the blob has fewer)."""

_MAGICS = (
    (b"\x1f\x8b", Codec.GZIP),  # RFC 1952, section 2.3.1
    (ZstdFrames.magic, Codec.ZSTD),
    (Lz4Frames.magic, Codec.LZ4),
)
# zstd's skippable frames (RFC 8878, section 3.1.2). lz4 has the same ones, but no lz4 tool is
# known to begin a file with one, while zstd's parallel compressor (pzstd) does.
_SKIPPABLE_TAIL = b"\x2a\x4d\x18"
_SKIPPABLE_FIRST = range(0x50, 0x60)


def detect(head: bytes) -> Codec:
    """Which codec a blob that begins with `head` has; PLAIN when it is none that we know."""
    for magic, codec in _MAGICS:
        if head.startswith(magic):
            return codec
    if head[1:4] == _SKIPPABLE_TAIL and head[0] in _SKIPPABLE_FIRST:
        return Codec.ZSTD
    return Codec.PLAIN


def scanner(codec: Codec, *, limit: int, submit: Submit = at_once) -> Scanner:
    """For a whole blob with at most `limit` raw bytes. See Scanner. What can be done beside
    decompressing goes to `submit`."""
    match codec:
        case Codec.PLAIN:
            return PlainScanner(limit=limit)
        case Codec.GZIP:
            return GzipScanner(limit=limit, submit=submit)
        case Codec.ZSTD:
            return FrameScanner(ZstdFrames(), limit=limit)
        case Codec.LZ4:
            return FrameScanner(Lz4Frames(), limit=limit)
        case _:
            assert_never(codec)


def decoder(codec: Codec, *, bit_offset: int, window: bytes | None, limit: int) -> Decoder:
    """From the seek point at `bit_offset` of the blob, for at most `limit` raw bytes.

    Feed it the blob from byte `bit_offset // 8` on. `window` is the point's, if it has one.
    """
    match codec:
        case Codec.PLAIN:
            return PlainDecoder(limit=limit)
        case Codec.GZIP:
            return GzipDecoder(bit_offset=bit_offset, window=window, limit=limit)
        case Codec.ZSTD:
            return FrameDecoder(ZstdFrames(), limit=limit)
        case Codec.LZ4:
            return FrameDecoder(Lz4Frames(), limit=limit)
        case _:
            assert_never(codec)
