"""gzip: what a scan finds in a blob, and that every checkpoint is a place to start from."""

from __future__ import annotations

import gzip
import io
import random
import subprocess
import sysconfig
import tracemalloc
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index import codecs
from index.codecs import points
from index.codecs.inflate import WINDOW_SIZE
from index.codecs.window import NO_LIMIT
from index.errors import CodecError, FirstByteError
from index.tables import CHUNK_SIZE, Codec
from tests.support.streams import (
    UNLIMITED,
    check_points,
    cut,
    piece_sizes,
    points_with_windows,
    raw_data,
    scan,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SPACING = 40_000  # so that small data has many checkpoints
STRATEGIES = (
    zlib.Z_DEFAULT_STRATEGY,
    zlib.Z_FILTERED,
    zlib.Z_HUFFMAN_ONLY,
    zlib.Z_RLE,
    zlib.Z_FIXED,
)
FLUSHES = (zlib.Z_NO_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK)


@pytest.fixture(autouse=True, scope="module")
def narrow_spacing() -> Iterator[None]:
    """And any border may be a point, whatever its window needs."""
    with patch.multiple(
        points,
        APPROACH=CHUNK_SIZE,
        LEAST_SPACING=SPACING,
        WINDOW_SHARE=NO_LIMIT,
    ):
        yield


class Sample(NamedTuple):
    """A blob and what it holds."""

    blob: bytes
    raw: bytes

    def __repr__(self) -> str:
        return f"<{len(self.raw)} bytes in {len(self.blob)}: {self.blob[:40].hex()}…>"


@st.composite
def members(draw: st.DrawFn) -> Sample:
    """One member, by any of zlib's ways to compress."""
    compressor = zlib.compressobj(
        level=draw(st.integers(0, 9)),
        wbits=draw(st.sampled_from([31, 31, 28, 25])),
        memLevel=draw(st.sampled_from([1, 4, 8, 9])),
        strategy=draw(st.sampled_from(STRATEGIES)),
    )
    raw = draw(raw_data())
    step = draw(st.sampled_from([3_000, 20_000, 200_000]))
    flush = draw(st.sampled_from(FLUSHES))
    blob = b"".join(
        compressor.compress(raw[at : at + step]) + compressor.flush(flush)
        for at in range(0, len(raw), step)
    )
    return Sample(blob + compressor.flush(), raw)


@st.composite
def blobs(draw: st.DrawFn) -> Sample:
    """One to three members, perhaps padded with zeros."""
    parts = draw(st.lists(members(), min_size=1, max_size=3))
    padding = bytes(draw(st.sampled_from([0, 0, 1, 600])))
    return Sample(
        b"".join(part.blob for part in parts) + padding, b"".join(part.raw for part in parts)
    )


def scanned(blob: bytes, sizes: list[int] | None = None) -> tuple[codecs.Scanner, bytes]:
    scanner = codecs.scanner(Codec.GZIP, limit=UNLIMITED)
    return scanner, scan(scanner, cut(blob, sizes or [len(blob)]))


@settings(max_examples=60)
@given(blobs(), piece_sizes, piece_sizes)
def test_every_checkpoint_decodes_to_the_raw_bytes_from_there(
    sample: Sample, sizes: list[int], decode_sizes: list[int]
) -> None:
    blob, raw = sample
    assert raw == gzip.decompress(blob)
    scanner, output = scanned(blob, sizes)
    assert output == raw
    check_points(Codec.GZIP, scanner, blob, raw, decode_sizes)


@settings(max_examples=40)
@given(blobs(), piece_sizes)
def test_checkpoints_and_windows_do_not_depend_on_the_pieces_of_input(
    sample: Sample, sizes: list[int]
) -> None:
    blob, _ = sample
    whole, pieced = scanned(blob)[0], scanned(blob, sizes)[0]
    assert pieced.points == whole.points
    assert pieced.windows == whole.windows


@settings(max_examples=40)
@given(blobs())
def test_windows_hold_bytes_of_raw_space_or_zeros(sample: Sample) -> None:
    blob, raw = sample
    for point, window in points_with_windows(scanned(blob)[0]):
        if window is None:
            continue
        assert len(window) == WINDOW_SIZE
        before = raw[point.raw_offset - WINDOW_SIZE : point.raw_offset]
        assert all(kept in (0, byte) for kept, byte in zip(window, before, strict=True))


def test_a_window_keeps_exactly_the_bytes_that_are_referred_to() -> None:
    """A known stream: literals, a flush, then one copy of 20 bytes from 5 000 bytes back."""
    source = random.Random(1)
    noise = bytes(source.choices(range(200), k=SPACING))
    copied = noise[-5_000:-4_980]
    rest = copied + source.randbytes(50)
    literals = zlib.compressobj(wbits=-15, strategy=zlib.Z_HUFFMAN_ONLY)
    copies = zlib.compressobj(wbits=-15, zdict=noise[-WINDOW_SIZE:])
    body = literals.compress(noise) + literals.flush(zlib.Z_SYNC_FLUSH)
    body += copies.compress(rest) + copies.flush()
    sums = zlib.crc32(noise + rest), len(noise + rest)
    blob = b"\x1f\x8b\x08" + bytes(7) + body + b"".join(n.to_bytes(4, "little") for n in sums)
    scanner, _ = scanned(blob)
    (window,) = scanner.windows
    start = WINDOW_SIZE - 5_000
    assert window == copied.rjust(start + 20, b"\0").ljust(WINDOW_SIZE, b"\0")


def test_a_reference_to_zeros_needs_a_window_too() -> None:
    compressor = zlib.compressobj(6, wbits=31)
    blob = compressor.compress(bytes(SPACING)) + compressor.flush(zlib.Z_SYNC_FLUSH)
    blob += compressor.compress(bytes(SPACING // 2)) + compressor.flush()
    scanner, raw = scanned(blob)
    assert scanner.windows == [bytes(WINDOW_SIZE)]
    check_points(Codec.GZIP, scanner, blob, raw, [len(blob)])


def test_a_checkpoint_behind_a_full_flush_has_no_window() -> None:
    compressor = zlib.compressobj(6, wbits=31)
    words = b"the same words again and again, "
    blob = b""
    for _ in range(3):
        blob += compressor.compress(words * (SPACING // len(words) + 1))
        blob += compressor.flush(zlib.Z_FULL_FLUSH)
    scanner, _ = scanned(blob + compressor.flush())
    assert len(scanner.points) == 3
    assert scanner.windows == []


def test_starts_of_members_serve_as_points_without_windows() -> None:
    parts = [random.Random(seed).randbytes(SPACING) for seed in range(4)]
    scanner, _ = scanned(b"".join(gzip.compress(part) for part in parts))
    assert [point.raw_offset for point in scanner.points] == [
        number * SPACING for number in range(4)
    ]
    assert scanner.windows == []


def test_tiny_members_do_not_make_a_point_each() -> None:
    scanner, raw = scanned(gzip.compress(b"tiny") * 25_000)
    assert len(scanner.points) == 1 + (len(raw) - 1) // SPACING


def real_tree(size: int) -> bytes:
    """Source text and machine code of the Python that runs this."""
    content = io.BytesIO()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted((*library.glob("*.py"), *library.glob("lib-dynload/*.so"))):
        content.write(path.read_bytes())
    return content.getvalue()[:size]


@pytest.mark.parametrize("level", [1, 6, 9])
def test_every_checkpoint_of_what_the_gzip_tool_makes(level: int) -> None:
    raw = real_tree(4 << 20)
    blob = subprocess.run(
        ["gzip", f"-{level}"], input=raw, stdout=subprocess.PIPE, check=True
    ).stdout
    scanner, output = scanned(blob)
    assert output == raw
    assert len(scanner.windows) > 20
    check_points(Codec.GZIP, scanner, blob, raw, [50_000])


@pytest.mark.parametrize("skipped_bits", range(8))
@pytest.mark.parametrize("junk", [0, 0xFF])
def test_a_checkpoint_may_lie_at_any_bit_and_stored_blocks_may_follow(
    skipped_bits: int, junk: int
) -> None:
    stored = b"stored bytes"
    bits = [(junk >> bit) & 1 for bit in range(skipped_bits)]
    bits += [0, 1, 0] + [0] * 7  # an empty block with fixed codes
    bits += [0, 0, 0]  # a stored block, not the last; it goes on at the next byte
    bits += [0] * (-len(bits) % 8)
    blob = sum(bit << at for at, bit in enumerate(bits)).to_bytes(len(bits) // 8, "little")
    blob += (
        len(stored).to_bytes(2, "little") + (len(stored) ^ 0xFFFF).to_bytes(2, "little") + stored
    )
    blob += zlib.compress(b"compressed bytes" * 100, wbits=-15)
    decoder = codecs.decoder(Codec.GZIP, bit_offset=80 + skipped_bits, window=None, limit=5_000)
    assert decoder.feed(blob) == stored + b"compressed bytes" * 100


def header_with_everything(raw: bytes) -> bytes:
    """A member with all optional header fields (RFC 1952, section 2.3)."""
    flags = 0x01 | 0x02 | 0x04 | 0x08 | 0x10  # FTEXT, FHCRC, FEXTRA, FNAME, FCOMMENT
    header = b"\x1f\x8b\x08" + bytes([flags]) + b"\x01\x02\x03\x04\x02\x03"
    header += (300).to_bytes(2, "little") + bytes(300) + b"na\xefme\0" + b"a comment\0"
    header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little")
    body = zlib.compress(raw, wbits=-15)
    trailer = zlib.crc32(raw).to_bytes(4, "little") + len(raw).to_bytes(4, "little")
    return header + body + trailer


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_header_fields_are_passed_over_in_first_and_later_members(size: int) -> None:
    raw = b"content" * 5_000
    blob = header_with_everything(raw) * 3
    scanner, output = scanned(blob, [size])
    assert output == raw * 3
    assert scanner.points[0].bit_offset == 8 * (10 + 2 + 300 + 6 + 10 + 2)
    check_points(Codec.GZIP, scanner, blob, output, [size])


@settings(max_examples=40)
@given(members(), st.data())
def test_a_truncated_blob_is_refused(sample: Sample, data: st.DataObject) -> None:
    blob, _ = sample
    length = data.draw(st.one_of(st.integers(0, 40), st.integers(1, 20).map(lambda n: -n)))
    with pytest.raises(CodecError):
        scanned(blob[:length] if length < len(blob) else b"")


def test_truncation_is_seen_at_every_byte_and_in_later_members() -> None:
    blob = gzip.compress(b"some words, some words") * 2
    half = len(blob) // 2
    for length in range(len(blob)):
        if length == half:
            continue  # one whole member
        with pytest.raises(CodecError, match="truncated"):
            scanned(blob[:length])


@pytest.mark.parametrize(
    "garbage", [b"x", b"\x1f\x8bxxxxxxxx", b"\0\0\0x", b"\0" + gzip.compress(b"", mtime=0)]
)
def test_what_follows_the_last_member_must_be_zeros(garbage: bytes) -> None:
    blob = gzip.compress(b"words")
    assert scanned(blob + bytes(1000), [3])[1] == b"words"
    with pytest.raises(CodecError):
        scanned(blob + garbage, [3])
    decoder = codecs.decoder(Codec.GZIP, bit_offset=80, window=None, limit=100)
    with pytest.raises(CodecError):
        decoder.feed(blob[10:] + garbage + bytes(20))


@settings(max_examples=60)
@given(members(), st.data())
def test_a_flipped_bit_is_an_error_or_changes_nothing_in_a_scan(
    sample: Sample, data: st.DataObject
) -> None:
    blob, raw = sample
    damaged = bytearray(blob)
    at = data.draw(st.integers(0, len(blob) - 1))
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert scanned(bytes(damaged))[1] == raw
    except FirstByteError as error:
        assert isinstance(error, CodecError)  # noqa: PT017


@settings(max_examples=60)
@given(blobs(), st.data())
def test_a_decoder_survives_damage_and_keeps_its_limit(sample: Sample, data: st.DataObject) -> None:
    blob, _ = sample
    point, window = data.draw(st.sampled_from(points_with_windows(scanned(blob)[0])))
    damaged = bytearray(blob[point.bit_offset // 8 :])
    for _ in range(3):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    limit = data.draw(st.integers(0, 100_000))
    decoder = codecs.decoder(Codec.GZIP, bit_offset=point.bit_offset, window=window, limit=limit)
    try:
        assert len(decoder.feed(bytes(damaged))) <= limit
    except FirstByteError as error:
        assert isinstance(error, CodecError)  # noqa: PT017


def test_a_bomb_is_stopped_at_the_limit_before_it_fills_memory() -> None:
    compressor = zlib.compressobj(9, wbits=31)
    blob = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(200)) + compressor.flush()
    limit = 2 << 20
    scanner = codecs.scanner(Codec.GZIP, limit=limit)
    decoder = codecs.decoder(Codec.GZIP, bit_offset=80, window=None, limit=limit)
    tracemalloc.start()
    with pytest.raises(CodecError, match="more than"):
        for _ in scanner.feed(blob):
            pass
    with pytest.raises(CodecError, match="more than"):
        decoder.feed(blob[10:])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20
