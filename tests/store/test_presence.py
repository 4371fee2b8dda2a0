"""The presence bitmap says what was marked, and says nothing when it is damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index.tables import CHUNK_SIZE, DIGEST_SIZE, Codec, LayerTable
from snapshotter.store.presence import (
    BLOCK_SIZE,
    CHUNKS_PER_BLOCK,
    PresenceFile,
    decode_block,
    encode_block,
)

if TYPE_CHECKING:
    from pathlib import Path


def table_of(chunks: int, fill: int = 0) -> LayerTable:
    size = chunks * CHUNK_SIZE
    return LayerTable(
        digest=bytes(32),
        diff_id=bytes(32),
        codec=Codec.PLAIN,
        blob_size=size,
        raw_size=size,
        raw_offsets=[0],
        bit_offsets=[0],
        window_flags=b"\0",
        digests=bytes([fill]) * DIGEST_SIZE * chunks,
    )


def present(path: Path, table: LayerTable) -> set[int]:
    file = PresenceFile(path, table)
    flags = file.present()
    file.close()
    assert len(flags) == table.chunk_count
    return {chunk for chunk, flag in enumerate(flags) if flag}


def marked(path: Path, table: LayerTable, chunks: set[int]) -> None:
    file = PresenceFile(path, table)
    file.mark(chunks)
    file.sync()
    file.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    chunks=st.integers(0, 2 * CHUNKS_PER_BLOCK + 3),
    data=st.data(),
)
def test_what_was_marked_and_not_cleared_is_present(
    tmp_path: Path, chunks: int, data: st.DataObject
) -> None:
    path = tmp_path / "present"
    path.unlink(missing_ok=True)
    table = table_of(chunks)
    some = st.sets(st.integers(0, chunks - 1), max_size=50) if chunks else st.just(set[int]())
    expected: set[int] = set()
    for _ in range(3):
        mark, clear = data.draw(some), data.draw(some)
        file = PresenceFile(path, table)
        file.mark(mark)
        file.clear(clear)
        file.close()
        expected = (expected | mark) - clear
        assert present(path, table) == expected


@given(bits=st.binary(min_size=508, max_size=508), number=st.integers(0, 9), data=st.data())
def test_a_block_with_any_bit_flipped_is_noticed(
    bits: bytes, number: int, data: st.DataObject
) -> None:
    block = encode_block(number, bits)
    assert decode_block(number, block) == bits
    at = data.draw(st.integers(0, 8 * BLOCK_SIZE - 1))
    changed = bytearray(block)
    changed[at // 8] ^= 1 << (at % 8)
    if any(changed):
        assert decode_block(number, bytes(changed)) is None


def test_a_block_in_another_ones_place_is_noticed() -> None:
    assert decode_block(1, encode_block(2, b"\x01")) is None


def test_a_block_that_was_never_written_has_nothing() -> None:
    assert decode_block(7, bytes(BLOCK_SIZE)) == bytes(508)


def test_a_damaged_block_costs_only_its_own_chunks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, table = tmp_path / "present", table_of(CHUNKS_PER_BLOCK + 10)
    marked(path, table, {0, 5, CHUNKS_PER_BLOCK + 2})
    with path.open("r+b") as file:
        file.seek(BLOCK_SIZE + 3)
        file.write(b"\xff")
    assert present(path, table) == {CHUNKS_PER_BLOCK + 2}
    assert "block 0" in caplog.text


@pytest.mark.parametrize("content", [b"", b"x", b"\0" * 2000, b"FBpresnt" + b"\xff" * 1016])
def test_a_foreign_file_is_started_anew(tmp_path: Path, content: bytes) -> None:
    path, table = tmp_path / "present", table_of(9)
    path.write_bytes(content)
    assert present(path, table) == set()
    marked(path, table, {3})
    assert present(path, table) == {3}


def test_the_bitmap_of_other_content_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "present"
    marked(path, table_of(9, fill=1), {1, 2, 3})
    assert present(path, table_of(9, fill=2)) == set()
    assert "damaged or foreign" in caplog.text
