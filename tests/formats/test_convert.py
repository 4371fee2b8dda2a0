"""Converted layers: ordinary compressed tars for every tool, and easy to read at random for us."""

from __future__ import annotations

import random
import struct
import subprocess
from typing import TYPE_CHECKING

import lz4.frame
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from index.convert import FRAME_SIZE, FrameWriter, compress_frame
from index.errors import UnsupportedError
from index.layer import LayerScanner
from index.tables import CHUNK_SIZE, Codec
from tests.support.streams import cut, piece_sizes, raw_data
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Iterable

TOOLS = {Codec.ZSTD: ["zstd", "-dcq"], Codec.LZ4: ["lz4", "-dcq"]}
CODECS = sorted(TOOLS)


def convert(
    codec: Codec,
    pieces: Iterable[bytes],
    *,
    level: int = 1,
    frame_size: int = FRAME_SIZE,
    threads: int = 1,
) -> bytes:
    writer = FrameWriter(codec, level=level, frame_size=frame_size, threads=threads)
    return b"".join([writer.feed(piece) for piece in pieces] + [writer.finish()])


def seek_table(blob: bytes) -> list[tuple[int, int]]:
    """(compressed, raw) sizes of all frames, read from the end as a seeking reader does."""
    count, descriptor, magic = struct.unpack("<IBI", blob[-9:])
    assert (descriptor, magic) == (0, 0x8F92EAB1)
    size = count * 8 + 9
    assert struct.unpack_from("<II", blob, len(blob) - size - 8) == (0x184D2A5E, size)
    return list(struct.iter_unpack("<II", blob[-size:-9]))


def sample(size: int) -> bytes:
    source = random.Random(size)
    words = [source.randbytes(source.randrange(3, 30)) for _ in range(500)]
    return tar(file(b"a", b"".join(source.choices(words, k=size // 16))))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [0, 100, 3_000_000])
def test_the_tools_decompress_a_converted_layer_to_the_same_tar(codec: Codec, size: int) -> None:
    raw = sample(size)
    blob = convert(codec, [raw])
    output = subprocess.run(TOOLS[codec], input=blob, stdout=subprocess.PIPE, check=True).stdout
    assert output == raw


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_at_all_converts_to_a_blob_that_decompresses_to_nothing(codec: Codec) -> None:
    blob = convert(codec, [])
    assert not subprocess.run(TOOLS[codec], input=blob, stdout=subprocess.PIPE, check=True).stdout
    assert LayerScanner().feed(blob) == []


@settings(max_examples=30)
@given(st.sampled_from(CODECS), raw_data(700_000), piece_sizes, st.sampled_from([1, 2, 5]))
def test_the_seek_table_names_frames_that_stand_alone(
    codec: Codec, raw: bytes, sizes: list[int], chunks: int
) -> None:
    blob = convert(codec, cut(raw, sizes), frame_size=chunks * CHUNK_SIZE)
    at, output = 0, b""
    table = seek_table(blob)
    for compressed_size, raw_size in table:
        frame = blob[at : at + compressed_size]
        if codec is Codec.ZSTD:
            assert zstandard.frame_content_size(frame) == raw_size
            content = zstandard.decompress(frame) if raw_size else b""
        else:
            assert lz4.frame.get_frame_info(frame)["content_size"] == raw_size
            content = lz4.frame.decompress(frame)
        assert len(content) == raw_size
        output += content
        at += compressed_size
    assert output == raw
    assert all(raw_size == chunks * CHUNK_SIZE for _, raw_size in table[:-1])


@settings(max_examples=20)
@given(st.sampled_from(CODECS), raw_data(700_000), piece_sizes, st.sampled_from([1, 2, 4]))
def test_neither_pieces_nor_threads_change_the_blob(
    codec: Codec, raw: bytes, sizes: list[int], threads: int
) -> None:
    pieced = convert(codec, cut(raw, sizes), frame_size=CHUNK_SIZE, threads=threads)
    assert pieced == convert(codec, [raw], frame_size=CHUNK_SIZE)


@pytest.mark.parametrize("codec", CODECS)
def test_a_scan_finds_each_frame_and_the_same_raw_space(codec: Codec) -> None:
    raw = sample(3_000_000)
    scanner = LayerScanner()
    entries = scanner.feed(convert(codec, [raw]))
    table = scanner.finish().table
    plain = LayerScanner(Codec.PLAIN)
    assert entries == plain.feed(raw)
    original = plain.finish().table
    assert table.codec is codec
    assert (table.diff_id, table.digests) == (original.diff_id, original.digests)
    assert list(table.raw_offsets) == list(range(0, len(raw), FRAME_SIZE))


@pytest.mark.parametrize("codec", CODECS)
def test_higher_levels_make_smaller_frames(codec: Codec) -> None:
    raw = sample(CHUNK_SIZE)
    assert len(compress_frame(raw, codec, 9)) < len(compress_frame(raw, codec, 1)) < len(raw)


@pytest.mark.parametrize(
    ("codec", "level"), [(Codec.PLAIN, 1), (Codec.GZIP, 6), (Codec.ZSTD, 23), (Codec.LZ4, 13)]
)
def test_other_codecs_and_levels_are_refused(codec: Codec, level: int) -> None:
    with pytest.raises(UnsupportedError, match=f"level {level}"):
        FrameWriter(codec, level=level)
