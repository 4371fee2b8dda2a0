"""Startup packs: what is written is read however it is cut, and lies are found out."""

from __future__ import annotations

import random
import struct
import subprocess
import zlib
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from index.errors import FirstByteError, FormatError, UnsupportedError
from index.pack import (
    FRAME_CHUNKS,
    FrameError,
    PackDecoder,
    PackTable,
    PackWriter,
    read_table,
)
from index.tables import CHUNK_SIZE
from tests.support.blobs import make_layer, sample_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from index.pack import Place

DIGEST = bytes(range(32))
LAYERS = [
    make_layer(sample_bytes(size, seed))
    for seed, size in enumerate((9 * CHUNK_SIZE, 3 * CHUNK_SIZE + 77, 12 * CHUNK_SIZE + 1))
]
TABLES = [layer.table for layer in LAYERS]
EVERYWHERE = [(n, chunk) for n, table in enumerate(TABLES) for chunk in range(table.chunk_count)]


def write(places: Sequence[Place]) -> bytes:
    writer = PackWriter(DIGEST, level=1, threads=2)
    for layer, chunk in places:
        writer.add(layer, chunk, LAYERS[layer].chunk(chunk))
    return writer.finish()


def table_of(pack: bytes) -> PackTable:
    table = read_table(pack, len(pack))
    assert table is not None
    return table


def unpack(pack: bytes, step: int = 1 << 16) -> list[tuple[Place, bytes]]:
    table = table_of(pack)
    decoder = PackDecoder(table.frames, TABLES)
    found = []
    for at in range(table.start, len(pack), step):
        found += list(decoder.feed(pack[at : at + step]))
    return found


SHUFFLED = random.Random(3).sample(EVERYWHERE, len(EVERYWHERE))
PACK = write(SHUFFLED)
FIRST = table_of(PACK).start


@settings(max_examples=20)
@given(st.lists(st.sampled_from(EVERYWHERE), unique=True), st.integers(1, 1 << 20))
def test_chunks_come_in_the_order_they_were_written(places: list[Place], step: int) -> None:
    pack = write(places)
    table = table_of(pack)
    table.check(DIGEST, TABLES)
    assert [place for frame in table.frames for place in frame.places] == places
    if places:
        assert unpack(pack, max(step, 1000)) == [
            (place, LAYERS[place[0]].chunk(place[1])) for place in places
        ]


def test_equal_chunks_are_equal_bytes() -> None:
    assert write(SHUFFLED) == PACK


def test_every_zstd_tool_reads_a_pack() -> None:
    raw = b"".join(LAYERS[layer].chunk(chunk) for layer, chunk in SHUFFLED)
    done = subprocess.run(["zstd", "-dc"], input=PACK, capture_output=True, check=True)
    assert done.stdout == raw


def test_a_chunk_is_there_before_its_frame_is() -> None:
    decoder = PackDecoder(table_of(PACK).frames, TABLES)
    frame = table_of(PACK).frames[0]
    half = list(decoder.feed(PACK[frame.start : (frame.start + frame.end) // 2]))
    assert 0 < len(half) < FRAME_CHUNKS


def test_what_lies_between_frames_is_passed_over() -> None:
    frames = table_of(PACK).frames
    decoder = PackDecoder([frames[0], frames[2]], TABLES)
    found = list(decoder.feed(PACK[frames[0].start : frames[2].end]))
    assert [place for place, _ in found] == [*frames[0].places, *frames[2].places]


def test_the_table_is_read_as_soon_as_it_is_there() -> None:
    assert read_table(PACK[: FIRST - 1], len(PACK)) is None
    assert read_table(PACK[:FIRST], len(PACK)) == table_of(PACK)
    assert read_table(b"", 0) is None


def test_a_pack_of_another_index_is_refused() -> None:
    with pytest.raises(FormatError, match="of another file index"):
        table_of(PACK).check(DIGEST[::-1], TABLES)


@pytest.mark.parametrize("place", [(3, 0), (0, 9), (1, 4)])
def test_chunks_that_are_not_in_the_image_are_refused(place: Place) -> None:
    writer = PackWriter(DIGEST)
    writer.add(*place, b"x" * CHUNK_SIZE)
    with pytest.raises(FormatError, match="has chunk"):
        table_of(writer.finish()).check(DIGEST, TABLES)


def test_a_newer_version_is_refused_by_name() -> None:
    newer = bytearray(PACK)
    newer[16] = 2
    with pytest.raises(UnsupportedError, match="version 2"):
        read_table(newer, len(newer))


@pytest.mark.parametrize("size", [0, len(PACK) - 1, len(PACK) + 1])
def test_a_pack_of_another_size_than_its_descriptor_says_is_refused(size: int) -> None:
    with pytest.raises(FormatError):
        read_table(PACK, size)


@given(st.integers(0, FIRST - 1), st.integers(1, 255))
def test_one_damaged_byte_of_the_table_is_noticed(at: int, change: int) -> None:
    damaged = bytearray(PACK)
    damaged[at] ^= change
    try:
        assert read_table(damaged, len(damaged)) in (None, table_of(PACK))  # the minor version
    except FirstByteError:
        return


@given(st.binary(max_size=200), st.integers(0, 1 << 40))
def test_anything_else_is_no_pack(data: bytes, size: int) -> None:
    try:
        assert read_table(data, size) is None
    except FirstByteError:
        return


def forged(frames: Sequence[tuple[int, int]], chunks: Sequence[Place], body: bytes) -> bytes:
    """A pack whose table says what it is told to, with a good checksum."""
    tables = b"".join(struct.pack("<II", *frame) for frame in frames)
    tables += b"".join(struct.pack("<II", *chunk) for chunk in chunks)
    size = 8 + 64 + len(tables) + 4 + len(body)
    header = struct.pack(
        "<8sHHI32sIIQ", b"\x89FBP\r\n\x1a\n", 1, 0, 0, DIGEST, len(frames), len(chunks), size
    )
    checksum = struct.pack("<I", zlib.crc32(header + tables))
    return (
        struct.pack("<II", 0x184D2A5D, len(header + tables) + 4) + header + tables + checksum + body
    )


@pytest.mark.parametrize(
    ("frames", "chunks"),
    [
        pytest.param([(10, 1)], [(0, 0), (0, 1)], id="a chunk in no frame"),
        pytest.param([(10, 2)], [(0, 0)], id="more chunks than there are"),
        pytest.param([(10, 0)], [], id="an empty frame"),
        pytest.param([(10, 2)], [(0, 0), (0, 0)], id="a chunk twice"),
        pytest.param([(11, 1)], [(0, 0)], id="past the end"),
        pytest.param([(9, 1)], [(0, 0)], id="short of the end"),
        pytest.param([(10, 65)], [(0, n) for n in range(65)], id="a huge frame"),
        pytest.param([(1 << 31, 1)], [(0, 0)], id="a frame larger than its chunks"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(
    frames: list[tuple[int, int]], chunks: list[Place]
) -> None:
    pack = forged(frames, chunks, bytes(10))
    with pytest.raises(FormatError):
        read_table(pack, len(pack))


def one_frame(raw: bytes, *places: Place) -> bytes:
    body = zstandard.ZstdCompressor(1).compress(raw)
    return forged([(len(body), len(places))], places, body)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"x" * (CHUNK_SIZE - 1), id="less"),
        pytest.param(b"x" * (CHUNK_SIZE + 1), id="more"),
        pytest.param(bytes(200 << 20), id="a bomb"),
    ],
)
def test_a_frame_holds_its_chunks_and_nothing_else(raw: bytes) -> None:
    with pytest.raises(FrameError, match="frame 0"):
        unpack(one_frame(raw, (0, 0)))


@settings(max_examples=30)
@given(st.integers(FIRST, len(PACK) - 1), st.integers(1, 255))
def test_damage_stays_within_its_frame(at: int, change: int) -> None:
    damaged = bytearray(PACK)
    damaged[at] ^= change
    table = table_of(PACK)
    hit = next(n for n, frame in enumerate(table.frames) if frame.start <= at < frame.end)
    before = [place for frame in table.frames[:hit] for place in frame.places]
    decoder = PackDecoder(table.frames, TABLES)
    found: list[tuple[Place, bytes]] = []
    number = hit
    try:
        for chunk in decoder.feed(damaged[table.start :]):
            found.append(chunk)  # noqa: PERF402  (what came before the error counts)
    except FrameError as error:
        number = error.number
    assert number == hit
    good = {place: LAYERS[place[0]].chunk(place[1]) for place in SHUFFLED}
    wrong = {place for place, data in found if data != good[place]}
    assert [place for place, _ in found[: len(before)]] == before
    assert wrong <= {*table.frames[hit].places}
