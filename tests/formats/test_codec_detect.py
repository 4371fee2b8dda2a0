"""Which codec a blob has, and blobs that have none."""

from __future__ import annotations

import bz2
import gzip

import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from index import codecs
from index.errors import CodecError
from index.tables import Codec, SeekPoint
from tests.support.streams import UNLIMITED, cut, piece_sizes, scan
from tests.support.tars import file, tar


@pytest.mark.parametrize(
    ("blob", "codec"),
    [
        (gzip.compress(b"words", mtime=0), Codec.GZIP),
        (zstandard.compress(b"words"), Codec.ZSTD),
        (b"\x50\x2a\x4d\x18\x04\0\0\0", Codec.ZSTD),
        (b"\x5f\x2a\x4d\x18\x04\0\0\0", Codec.ZSTD),
        (lz4.frame.compress(b"words"), Codec.LZ4),
        (tar(file(b"name", b"words")), Codec.PLAIN),
        (bz2.compress(b"words"), Codec.PLAIN),
        (b"\x60\x2a\x4d\x18\x04\0\0\0", Codec.PLAIN),
        (b"", Codec.PLAIN),
        (b"\x1f", Codec.PLAIN),
    ],
)
def test_magic_numbers_tell_the_codec(blob: bytes, codec: Codec) -> None:
    assert codecs.detect(blob[: codecs.DETECT_SIZE]) is codec


@given(st.binary(max_size=3_000_000), piece_sizes)
def test_a_plain_blob_is_its_own_raw_space(blob: bytes, sizes: list[int]) -> None:
    scanner = codecs.scanner(Codec.PLAIN, limit=UNLIMITED)
    assert scan(scanner, cut(blob, sizes)) == blob
    assert scanner.points == [SeekPoint(0, 0)]
    assert scanner.windows == []
    decoder = codecs.decoder(Codec.PLAIN, bit_offset=0, window=None, limit=len(blob))
    assert b"".join(decoder.feed(piece) for piece in cut(blob, sizes)) == blob


def test_a_plain_blob_keeps_the_limit() -> None:
    scanner = codecs.scanner(Codec.PLAIN, limit=1000)
    with pytest.raises(CodecError, match="more than 1000 bytes"):
        scan(scanner, [bytes(600), bytes(401)])
    decoder = codecs.decoder(Codec.PLAIN, bit_offset=0, window=None, limit=1000)
    decoder.feed(bytes(1000))
    with pytest.raises(CodecError, match="more than 1000 bytes"):
        decoder.feed(b"x")
