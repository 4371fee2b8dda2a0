"""One pass over a layer's blob: digests, chunks, seek points and entries, whatever the codec."""

from __future__ import annotations

import gzip
import hashlib
import random
import threading
import zlib
from typing import TYPE_CHECKING

import lz4.frame
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from index import codecs
from index.errors import CodecError, TarError
from index.layer import LayerScan, LayerScanner
from index.tables import CHUNK_SIZE, Codec
from tests.support.streams import cut, piece_sizes
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from index.entry import Entry


def sample_tar(seed: int, size: int) -> bytes:
    source = random.Random(seed)
    words = [source.randbytes(source.randrange(3, 30)) for _ in range(500)]
    content = b"".join(source.choices(words, k=size // 16))
    return tar(file(b"a", content), file(b"b", source.randbytes(size // 8)), file(b"empty", b""))


def compress(codec: Codec, raw: bytes) -> bytes:
    parts = [raw[at : at + 300_000] for at in range(0, len(raw), 300_000)]
    match codec:
        case Codec.PLAIN:
            return raw
        case Codec.GZIP:
            return gzip.compress(raw, 6)
        case Codec.ZSTD:
            return b"".join(map(zstandard.compress, parts))
        case Codec.LZ4:
            return b"".join(map(lz4.frame.compress, parts))


def scan(
    pieces: Iterable[bytes], codec: Codec | None = None, limit: int = 1 << 40
) -> tuple[LayerScan, list[Entry]]:
    scanner = LayerScanner(codec, limit=limit)
    entries = [entry for piece in pieces for entry in scanner.feed(piece)]
    return scanner.finish(), entries


RAW = sample_tar(seed=1, size=5_500_000)


@pytest.fixture(scope="module", params=list(Codec), ids=lambda codec: codec.name)
def sample(request: pytest.FixtureRequest) -> tuple[Codec, bytes]:
    return request.param, compress(request.param, RAW)


def test_the_table_holds_digests_and_sizes_of_blob_and_raw_space(
    sample: tuple[Codec, bytes],
) -> None:
    codec, blob = sample
    table = scan(cut(blob, [100_000]))[0].table
    assert table.codec is codec
    assert (table.blob_size, table.raw_size) == (len(blob), len(RAW))
    assert table.digest == hashlib.sha256(blob).digest()
    assert table.diff_id == hashlib.sha256(RAW).digest()
    assert len(table.digests) == 32 * table.chunk_count
    assert len(RAW) % CHUNK_SIZE
    for chunk in range(table.chunk_count):
        table.verify(chunk, RAW[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE])


def test_entries_come_as_from_the_bare_tar(sample: tuple[Codec, bytes]) -> None:
    _, blob = sample
    entries = scan(cut(blob, [7000]))[1]
    assert [entry.name for entry in entries] == [b"a", b"b", b"empty"]
    assert entries == scan([RAW])[1]


def test_every_chunk_can_be_read_by_the_table_alone(sample: tuple[Codec, bytes]) -> None:
    codec, blob = sample
    layer = scan([blob])[0]
    table, windows = layer.table, iter(layer.windows)
    by_point = [next(windows) if flag else None for flag in table.window_flags]
    if codec is not Codec.PLAIN:
        assert len(table.raw_offsets) > 2
    for chunk in range(table.chunk_count):
        span = table.span(chunk, chunk)
        decoder = codecs.decoder(
            codec,
            bit_offset=table.bit_offsets[span.point],
            window=by_point[span.point],
            limit=span.raw_end - span.raw_start,
        )
        raw = decoder.feed(blob[span.start : span.end])
        assert raw == RAW[span.raw_start : span.raw_end]
        start = chunk * CHUNK_SIZE - span.raw_start
        table.verify(chunk, raw[start : start + table.chunk_length(chunk)])


@settings(max_examples=30)
@given(st.sampled_from(Codec), st.integers(0, 600_000), piece_sizes)
def test_the_result_does_not_depend_on_the_pieces(
    codec: Codec, size: int, sizes: list[int]
) -> None:
    blob = compress(codec, sample_tar(seed=size, size=size))
    assert scan(cut(blob, sizes)) == scan([blob], codec)


def test_a_raw_file_with_the_same_bytes_has_the_same_chunks(sample: tuple[Codec, bytes]) -> None:
    """That is how a layer that is fully local is verified."""
    _, blob = sample
    compressed = scan([blob])[0].table
    local = scan([RAW], Codec.PLAIN)[0].table
    assert (local.diff_id, local.digests) == (compressed.diff_id, compressed.digests)
    assert local.content_key == compressed.content_key


def test_an_empty_layer_is_a_layer() -> None:
    for raw in (b"", bytes(1024)):
        for blob in (raw, gzip.compress(raw)):
            layer, entries = scan([blob])
            assert entries == []
            assert layer.table.raw_size == len(raw)
            assert list(layer.table.raw_offsets) == [0]


def test_a_truncated_blob_or_tar_is_refused(sample: tuple[Codec, bytes]) -> None:
    codec, blob = sample
    with pytest.raises(TarError if codec is Codec.PLAIN else CodecError):
        scan([blob[: len(blob) // 2]])
    with pytest.raises(TarError):
        scan([compress(codec, RAW[: len(RAW) // 2])])


def test_more_raw_bytes_than_the_limit_are_refused(sample: tuple[Codec, bytes]) -> None:
    codec, blob = sample
    assert scan([blob], codec, limit=len(RAW))[0].table.raw_size == len(RAW)
    with pytest.raises(CodecError, match="more than"):
        scan([blob], codec, limit=len(RAW) - 1)


def test_a_blob_of_another_codec_than_promised_is_refused() -> None:
    for codec in (Codec.GZIP, Codec.ZSTD, Codec.LZ4):
        with pytest.raises(CodecError):
            scan([RAW], codec)
    with pytest.raises(TarError):
        scan([zlib.compress(RAW)])


@pytest.mark.parametrize("end", ["whole", "malformed", "truncated", "abandoned"])
def test_a_scanner_leaves_no_thread(end: str) -> None:
    blob = compress(Codec.GZIP, RAW)
    before = set(threading.enumerate())
    scanner = LayerScanner()
    scanner.feed(blob[:-1])
    (thread,) = set(threading.enumerate()) - before
    if end == "whole":
        scanner.feed(blob[-1:])
        scanner.finish()
    elif end == "malformed":
        with pytest.raises(CodecError):
            scanner.feed(b"\xff more than the last byte")
    elif end == "truncated":
        with pytest.raises(CodecError):
            scanner.finish()
    else:
        del scanner
    thread.join(timeout=60)
    assert not thread.is_alive()
