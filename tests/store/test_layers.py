"""The chunk store keeps verified bytes, gives back verified bytes, and survives its disk."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index.errors import IntegrityError
from index.tables import CHUNK_SIZE, Codec
from snapshotter.store.errors import StoreError, StoreFullError, StoreLockedError
from snapshotter.store.flusher import INTERVAL, POLL, keep_flushed
from snapshotter.store.layers import LayerStore
from tests.support.blobs import make_layer, sample_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio.testing import MockClock

LAYER = make_layer(sample_bytes(5 * CHUNK_SIZE + 1000), Codec.PLAIN)
CHUNKS = 6


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LayerStore]:
    with LayerStore(tmp_path / "store") as store:
        yield store


def reopened(store: LayerStore) -> LayerStore:
    store.close()
    return LayerStore(store.root)


def forget_verified(store: LayerStore) -> None:
    """What a restart would do to the memory of verified chunks."""
    store._cache._chunks.clear()


def test_a_written_chunk_is_present_and_reads_back(store: LayerStore) -> None:
    stored = store.open(LAYER.table)
    assert not stored.has(1)
    assert stored.read(1) is None
    assert stored.peek(1) is None
    stored.write(1, LAYER.chunk(1))
    stored.write(5, LAYER.chunk(5))
    forget_verified(store)
    assert stored.read(1) == LAYER.chunk(1)
    assert stored.read(5) == LAYER.chunk(5)
    assert stored.missing(0, 5) == [0, 2, 3, 4]
    assert stored.present_bytes == CHUNK_SIZE + 1000
    assert not stored.complete


def test_what_is_in_the_page_cache_needs_no_wait(store: LayerStore) -> None:
    stored = store.open(LAYER.table)
    stored.write(2, LAYER.chunk(2), remember=False)
    assert stored.peek(2) == LAYER.chunk(2)


def test_a_layer_is_complete_with_its_last_chunk(store: LayerStore) -> None:
    stored = store.open(LAYER.table)
    for chunk in range(CHUNKS):
        assert not stored.complete
        stored.write(chunk, LAYER.chunk(chunk))
    assert stored.complete
    assert stored.present_bytes == len(LAYER.raw)
    raw = stored.raw_path.read_bytes()
    assert raw == LAYER.raw + bytes(-len(LAYER.raw) % 512), "the kernel reads whole blocks"


def test_an_empty_layer_is_complete(store: LayerStore) -> None:
    stored = store.open(make_layer(b"", Codec.PLAIN).table)
    assert stored.complete
    assert stored.present_bytes == 0


@pytest.mark.parametrize("data", [b"", LAYER.chunk(0), LAYER.chunk(1)[:-1], LAYER.chunk(1) + b"x"])
def test_unverified_bytes_are_refused(store: LayerStore, data: bytes) -> None:
    stored = store.open(LAYER.table)
    with pytest.raises(IntegrityError, match="chunk 1 of layer sha256:"):
        stored.write(1, data)
    assert not stored.has(1)
    assert not any(stored.raw_path.read_bytes())


def test_raw_files_are_sparse(store: LayerStore) -> None:
    stored = store.open(make_layer(sample_bytes(64 * CHUNK_SIZE), Codec.PLAIN).table)
    stored.write(40, sample_bytes(64 * CHUNK_SIZE)[40 * CHUNK_SIZE :][:CHUNK_SIZE])
    stored.flush()
    assert stored.raw_path.stat().st_size == 64 * CHUNK_SIZE
    assert CHUNK_SIZE <= stored.disk_usage() < 8 * CHUNK_SIZE
    assert store.disk_usage() >= stored.disk_usage()


def test_flushed_chunks_are_there_after_a_restart(store: LayerStore) -> None:
    stored = store.open(LAYER.table)
    stored.write(3, LAYER.chunk(3))
    assert store.dirty_bytes > 0
    store.flush()
    assert store.dirty_bytes == 0
    with reopened(store) as again:
        stored = again.open(LAYER.table)
        assert stored.missing(0, 5) == [0, 1, 2, 4, 5]
        assert stored.read(3) == LAYER.chunk(3)


async def test_the_flusher_makes_everything_durable(
    store: LayerStore, autojump_clock: MockClock
) -> None:
    stored = store.open(LAYER.table)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_flushed, store)
        stored.write(3, LAYER.chunk(3))
        await trio.sleep(INTERVAL + POLL)
        nursery.cancel_scope.cancel()
    assert store.dirty_bytes == 0
    file = stored.raw_path.with_name("present").read_bytes()
    assert file[512] == 1 << 3


# --- sharing ---


def test_images_share_a_layer_by_content(store: LayerStore) -> None:
    stored = store.open(LAYER.table)
    other = make_layer(LAYER.raw, Codec.GZIP)
    assert store.open(other.table) is stored


def test_a_layer_stays_open_while_anybody_has_it(store: LayerStore) -> None:
    stored = store.open(LAYER.table)
    assert store.open(LAYER.table) is stored
    stored.close()
    stored.write(0, LAYER.chunk(0))
    store.flush()
    stored.write(1, LAYER.chunk(1))
    stored.close()
    store.flush()
    again = store.open(LAYER.table)
    assert again is not stored
    assert again.missing(0, 5) == [2, 3, 4, 5]


def test_one_process_owns_a_root(store: LayerStore) -> None:
    with pytest.raises(StoreLockedError, match="in use by another process") as caught:
        LayerStore(store.root)
    assert caught.value.hint
    reopened(store).close()


# --- damage ---


@pytest.mark.parametrize("access", ["read", "peek", "check"])
def test_a_damaged_chunk_is_dropped_for_good_and_logged(
    store: LayerStore, caplog: pytest.LogCaptureFixture, access: str
) -> None:
    stored = store.open(LAYER.table)
    stored.write(2, LAYER.chunk(2))
    store.flush()
    with stored.raw_path.open("r+b") as file:
        file.seek(2 * CHUNK_SIZE + 77)
        file.write(b"?!")
    forget_verified(store)
    assert getattr(stored, access)(2) is None
    assert not stored.has(2)
    for name in (f"chunk 2 of layer sha256:{LAYER.table.digest.hex()}", str(stored.raw_path)):
        assert name in caplog.text
    assert str(2 * CHUNK_SIZE) in caplog.text
    with reopened(store) as again:
        stored = again.open(LAYER.table)
        assert not stored.has(2)
        stored.write(2, LAYER.chunk(2))
        assert stored.read(2) == LAYER.chunk(2)


def test_a_raw_file_that_was_cut_short_loses_only_what_is_gone(store: LayerStore) -> None:
    stored = store.open(LAYER.table)
    for chunk in range(CHUNKS):
        stored.write(chunk, LAYER.chunk(chunk))
    path = stored.raw_path
    store.close()
    os.truncate(path, 2 * CHUNK_SIZE + 5)
    with LayerStore(store.root) as again:
        stored = again.open(LAYER.table)
        assert [stored.read(n) is not None for n in range(CHUNKS)] == [True] * 2 + [False] * 4
        assert path.stat().st_size == len(LAYER.raw) + -len(LAYER.raw) % 512  # whole blocks


def test_a_proof_is_void_as_soon_as_a_chunk_is_damaged(store: LayerStore) -> None:
    stored = store.open(LAYER.table)
    for chunk in range(CHUNKS):
        stored.write(chunk, LAYER.chunk(chunk), remember=False)
    hasher = hashlib.sha256()
    stored.hash_raw(hasher, 0, len(LAYER.raw))
    assert hasher.digest() == LAYER.table.diff_id
    stored.record_diff_id(hasher.digest())
    assert stored.proven_diff_id == LAYER.table.diff_id
    with stored.raw_path.open("r+b") as file:
        file.write(b"?!")
    assert stored.read(0) is None
    assert stored.proven_diff_id is None


# --- a disk that refuses ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for six chunks and the small files."""
    path = tmp_path / "small"
    path.mkdir()
    size = 6 * CHUNK_SIZE + (128 << 10)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.root
def test_a_full_disk_keeps_what_it_has_and_says_so_once(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LayerStore(small_disk) as store:
        stored = store.open(LAYER.table)
        (small_disk / "somebody-else").write_bytes(bytes(4 * CHUNK_SIZE))
        for chunk in (0, 1):
            stored.write(chunk, LAYER.chunk(chunk))
        for chunk in (2, 3):
            with pytest.raises(StoreFullError, match="No space left"):
                stored.write(chunk, LAYER.chunk(chunk))
            assert not stored.has(chunk)
            assert stored.read(chunk) == LAYER.chunk(chunk), "verified bytes are served anyway"
        assert caplog.text.count("are served but not kept") == 1
        forget_verified(store)
        assert [stored.read(n) is not None for n in range(4)] == [True, True, False, False]


def test_chunks_whose_sync_failed_are_not_believed(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store.open(LAYER.table)
    stored.write(0, LAYER.chunk(0))
    store.flush()
    stored.write(1, LAYER.chunk(1))

    def refuse(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", refuse)
        with pytest.raises(StoreError, match=r"cannot sync .*raw"):
            store.flush()
    assert stored.has(0)
    assert not stored.has(1)
    store.flush()
    with reopened(store) as again:
        assert again.open(LAYER.table).missing(0, 5) == [1, 2, 3, 4, 5]


def test_a_chunk_that_the_disk_cannot_read_is_dropped(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stored = store.open(LAYER.table)
    stored.write(1, LAYER.chunk(1), remember=False)

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        assert stored.peek(1) is None
        assert stored.has(1), "peek only looks"
        assert stored.read(1) is None
    assert not stored.has(1)
    assert "Input/output error" in caplog.text


# --- parts of chunks ---


@pytest.fixture(params=["noted when written", "noted when read", "never noted"])
def noted(store: LayerStore, request: pytest.FixtureRequest) -> Iterator[LayerStore]:
    """A store with all chunks of LAYER on disk, in this process's mind or not."""
    stored = store.open(LAYER.table)
    for chunk in range(CHUNKS):
        stored.write(chunk, LAYER.chunk(chunk), remember=False)
    if request.param == "noted when written":
        yield store
        return
    with reopened(store) as again:
        if request.param == "noted when read":
            stored = again.open(LAYER.table)
            assert all(stored.read(chunk) for chunk in range(CHUNKS))
            stored.close()
        yield again


@given(chunk=st.integers(0, CHUNKS - 1), ends=st.tuples(*[st.integers(0, CHUNK_SIZE)] * 2))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_of_a_chunk_can_be_read(
    noted: LayerStore, chunk: int, ends: tuple[int, int]
) -> None:
    stored = noted.open(LAYER.table)
    start, end = sorted(ends)
    expected = LAYER.chunk(chunk)[start:end]
    if start < len(LAYER.chunk(chunk)):
        assert stored.read(chunk, start, end) == expected
        assert stored.peek(chunk, start, end) in (None, expected)
    stored.close()


@pytest.mark.parametrize("access", ["read", "peek"])
def test_a_damaged_part_of_a_chunk_never_comes_out(
    noted: LayerStore, caplog: pytest.LogCaptureFixture, access: str
) -> None:
    stored = noted.open(LAYER.table)
    with stored.raw_path.open("r+b") as file:
        file.seek(3 * CHUNK_SIZE + 50_000)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    assert getattr(stored, access)(3, 49_999, 50_002) is None
    assert not stored.has(3)
    assert "chunk 3" in caplog.text
    stored.write(3, LAYER.chunk(3), remember=False)
    assert getattr(stored, access)(3, 49_999, 50_002) == LAYER.chunk(3)[49_999:50_002]


def test_a_small_read_of_a_noted_chunk_reads_little(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store.open(LAYER.table)
    stored.write(1, LAYER.chunk(1), remember=False)
    read = []
    preadv = os.preadv

    def note(file: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        read.append((offset, len(buffers[0])))
        return preadv(file, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", note)
    assert stored.read(1, 5000, 5010) == LAYER.chunk(1)[5000:5010]
    assert stored.read(1, 4000, 5000) == LAYER.chunk(1)[4000:5000]
    assert read == [(CHUNK_SIZE + 4096, 4096), (CHUNK_SIZE, 8192)]
