"""zstd and lz4: frames as seek points, and streams that end or go wrong anywhere."""

from __future__ import annotations

import subprocess
import tracemalloc
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

import lz4.frame
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from index import codecs
from index.codecs import frames as subject
from index.errors import CodecError, FirstByteError, UnsupportedError
from index.tables import Codec
from tests.support.streams import UNLIMITED, check_points, cut, piece_sizes, raw_data, scan

if TYPE_CHECKING:
    from collections.abc import Iterator

SPACING = 20_000  # so that small data has many points
CODECS = (Codec.ZSTD, Codec.LZ4)


@pytest.fixture(autouse=True, scope="module")
def narrow_spacing() -> Iterator[None]:
    with patch.object(subject, "FRAME_SPACING", SPACING):
        yield


class Sample(NamedTuple):
    """A blob, what it holds, (raw offset, offset in the blob) of each frame with data, and where
    the blob might have ended: after a frame, or skippable frames behind one.
    """

    codec: Codec
    blob: bytes
    raw: bytes
    frames: list[tuple[int, int]]
    ends: list[int]

    def __repr__(self) -> str:
        return f"<{self.codec.name} {len(self.raw)} in {len(self.blob)}: {self.blob[:40].hex()}…>"


def skippable(content: bytes, number: int = 0) -> bytes:
    magic = 0x184D2A50 + number
    return magic.to_bytes(4, "little") + len(content).to_bytes(4, "little") + content


@st.composite
def zstd_frames(draw: st.DrawFn, raw: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        draw(st.sampled_from([-5, 1, 3, 9])),
        window_log=draw(st.sampled_from([10, 17, 21])),
        write_content_size=draw(st.booleans()),
        write_checksum=draw(st.booleans()),
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    if draw(st.booleans()):
        return compressor.compress(raw)
    stream = compressor.compressobj()  # does not know the size, and may cut blocks short
    half = stream.compress(raw[: len(raw) // 2]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return half + stream.compress(raw[len(raw) // 2 :]) + stream.flush()


@st.composite
def lz4_frames(draw: st.DrawFn, raw: bytes) -> bytes:
    frame: bytes = lz4.frame.compress(
        raw,
        compression_level=draw(st.sampled_from([-3, 0, 3, 9])),
        block_size=draw(st.sampled_from([0, 4, 5, 6, 7])),
        block_linked=draw(st.booleans()),
        content_checksum=draw(st.booleans()),
        block_checksum=draw(st.booleans()),
        store_size=draw(st.booleans()),
    )
    return frame


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """One to four frames by any options, with skippable frames in all places."""
    codec = draw(st.sampled_from(CODECS))
    one_frame = zstd_frames if codec is Codec.ZSTD else lz4_frames
    blob, raw = b"", b""
    frames: list[tuple[int, int]] = []
    ends: list[int] = []
    for part in draw(st.lists(raw_data(60_000), min_size=1, max_size=4)):
        if draw(st.booleans()):
            blob += skippable(bytes(draw(st.integers(0, 300))), draw(st.integers(0, 15)))
            ends += [len(blob)] if ends else []
        if part:
            frames.append((len(raw), len(blob)))
        blob += draw(one_frame(part))
        raw += part
        ends.append(len(blob))
    if draw(st.booleans()):
        blob += skippable(b"a table")
        ends.append(len(blob))
    return Sample(codec, blob, raw, frames, ends)


def scanned(
    codec: Codec, blob: bytes, sizes: list[int] | None = None
) -> tuple[codecs.Scanner, bytes]:
    scanner = codecs.scanner(codec, limit=UNLIMITED)
    return scanner, scan(scanner, cut(blob, sizes or [len(blob)]))


@settings(max_examples=80)
@given(samples(), piece_sizes, piece_sizes)
def test_points_are_frames_far_enough_apart_and_all_decode_from_there(
    sample: Sample, sizes: list[int], decode_sizes: list[int]
) -> None:
    scanner, raw = scanned(sample.codec, sample.blob, sizes)
    assert raw == sample.raw
    expected = [(0, 0)]
    for raw_offset, offset in sample.frames:
        if raw_offset - expected[-1][0] >= SPACING:
            expected.append((raw_offset, offset * 8))
    assert [(point.raw_offset, point.bit_offset) for point in scanner.points] == expected
    assert scanner.windows == []
    check_points(sample.codec, scanner, sample.blob, raw, decode_sizes)


@settings(max_examples=60)
@given(samples(), st.data())
def test_a_blob_may_end_after_a_frame_and_nowhere_else(sample: Sample, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(sample.blob)) | st.sampled_from(sample.ends))
    if length in sample.ends:
        assert sample.raw.startswith(scanned(sample.codec, sample.blob[:length])[1])
    else:
        with pytest.raises(CodecError, match="truncated"):
            scanned(sample.codec, sample.blob[:length])


@pytest.mark.parametrize("codec", CODECS)
def test_truncation_is_seen_at_every_byte(codec: Codec) -> None:
    compress = zstandard.compress if codec is Codec.ZSTD else lz4.frame.compress
    frame = compress(b"words, words, words")
    table = skippable(b"a table")
    blob = frame + table
    for length in range(len(blob)):
        if length == len(frame):
            continue
        with pytest.raises(CodecError, match="truncated"):
            scanned(codec, blob[:length])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "garbage", [b"garbage", bytes(8), b"\x28\xb5\x2f\xfe", b"\x02\x21\x4c\x18"]
)
def test_what_follows_a_frame_must_be_a_frame(codec: Codec, garbage: bytes) -> None:
    compress = zstandard.compress if codec is Codec.ZSTD else lz4.frame.compress
    with pytest.raises(CodecError, match="no frame at byte"):
        scanned(codec, compress(b"words") + garbage)


@settings(max_examples=150)
@given(samples(), st.data())
def test_damage_is_an_error_or_other_bytes_and_the_limit_holds(
    sample: Sample, data: st.DataObject
) -> None:
    damaged = bytearray(sample.blob)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    limit = data.draw(st.sampled_from([0, 1000, 1 << 20]))
    decoder = codecs.decoder(sample.codec, bit_offset=0, window=None, limit=limit)
    try:
        output = decoder.feed(bytes(damaged))
    except FirstByteError as error:
        assert isinstance(error, CodecError | UnsupportedError)  # noqa: PT017
    else:
        assert len(output) <= limit
    try:
        scanned(sample.codec, bytes(damaged))
    except FirstByteError as error:
        assert isinstance(error, CodecError | UnsupportedError)  # noqa: PT017


def zstd_bomb(blocks: int) -> bytes:
    """Four bytes for every 128 KiB of zeros: a frame with a window of 128 KiB, then RLE blocks."""
    header = b"\x28\xb5\x2f\xfd\x00" + bytes([7 << 3])
    block = (128 << 10) << 3 | 1 << 1
    return header + (block.to_bytes(3, "little") + b"\0") * blocks


@pytest.mark.parametrize("codec", CODECS)
def test_a_bomb_is_stopped_at_the_limit_before_it_fills_memory(codec: Codec) -> None:
    bomb = zstd_bomb(10_000) if codec is Codec.ZSTD else lz4.frame.compress(bytes(200 << 20))
    limit = 2 << 20
    scanner = codecs.scanner(codec, limit=limit)
    decoder = codecs.decoder(codec, bit_offset=0, window=None, limit=limit)
    tracemalloc.start()
    with pytest.raises(CodecError, match="more than"):
        for _ in scanner.feed(bomb):
            pass
    with pytest.raises(CodecError, match="more than"):
        decoder.feed(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize(("window_log", "accepted"), [(20, True), (27, True), (28, False)])
def test_zstd_windows_up_to_128_mib_are_accepted(window_log: int, accepted: bool) -> None:
    parameters = zstandard.ZstdCompressionParameters(
        window_log=window_log, hash_log=10, chain_log=10
    )
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = stream.compress(b"words") + stream.flush()
    if accepted:
        assert scanned(Codec.ZSTD, blob)[1] == b"words"
    else:
        with pytest.raises(UnsupportedError, match="window of 256 MiB"):
            scanned(Codec.ZSTD, blob)


def test_frames_that_need_a_dictionary_are_unsupported() -> None:
    header = b"\x28\xb5\x2f\xfd\x21\x07\x05"  # single segment, dictionary 7, content of 5
    with pytest.raises(UnsupportedError, match="dictionary"):
        scanned(Codec.ZSTD, header)
    lz4_header = b"\x04\x22\x4d\x18\x61\x40" + bytes(5)
    with pytest.raises(UnsupportedError, match="dictionary"):
        scanned(Codec.LZ4, lz4_header)


@pytest.mark.parametrize(
    ("codec", "command"),
    [
        (Codec.ZSTD, ["zstd", "-q", "-c"]),
        (Codec.ZSTD, ["zstd", "-q", "-c", "-19", "--long=27", "-T2"]),
        (Codec.ZSTD, ["zstd", "-q", "-c", "--fast=3", "--no-check"]),
        (Codec.LZ4, ["lz4", "-q", "-c"]),
        (Codec.LZ4, ["lz4", "-q", "-c", "-9", "-BD", "-B4", "-BX"]),
    ],
)
def test_what_the_tools_make_is_read(codec: Codec, command: list[str]) -> None:
    raw = b"".join(number.to_bytes(3, "little") for number in range(1_000_000))
    blob = subprocess.run(command, input=raw, stdout=subprocess.PIPE, check=True).stdout
    scanner, output = scanned(codec, blob, [100_000])
    assert output == raw
    assert len(scanner.points) == 1
