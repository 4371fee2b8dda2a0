"""The chunk store keeps verified bytes, gives back verified bytes, and survives its disk."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index.errors import IntegrityError
from index.tables import CHUNK_SIZE, Codec
from snapshotter.store import layer as layer_module
from snapshotter.store import recent
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


# --- crashes ---


def test_no_bit_is_ever_durable_before_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power may go between any two system calls, and then the disk has lost every write to raw
    that was not synced, but none of those to the bitmap: the worst that can happen."""
    root = tmp_path / "store"
    events: list[tuple[str, int, bytes, int]] = []
    pwrite, fdatasync = os.pwrite, os.fdatasync

    def name(handle: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))

    def noted_pwrite(handle: int, data: bytes, offset: int) -> int:
        events.append((name(handle), 1, bytes(data), offset))
        return pwrite(handle, data, offset)

    def noted_fdatasync(handle: int) -> None:
        events.append((name(handle), 0, b"", 0))
        fdatasync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", noted_pwrite)
        patch.setattr(os, "fdatasync", noted_fdatasync)
        with LayerStore(root) as store:
            stored = store.open(LAYER.table)
            directory = stored.raw_path.parent
            for chunks in ((0,), (1, 4), (5, 2, 3)):
                for chunk in chunks:
                    stored.write(chunk, LAYER.chunk(chunk))
                store.flush()
    assert sum(write for file, write, _, _ in events if file == "raw") == CHUNKS
    believed = []
    for crash in range(len(events) + 1):
        raw, unsynced, present = bytearray(len(LAYER.raw)), [], bytearray(1024)
        for file, write, data, offset in events[:crash]:
            if file == "present" and write:
                present[offset : offset + len(data)] = data
            elif file == "raw" and write:
                unsynced.append((data, offset))
            elif file == "raw":
                for done, at in unsynced:
                    raw[at : at + len(done)] = done
                unsynced.clear()
        (directory / "raw").write_bytes(raw)
        (directory / "present").write_bytes(present)
        monkeypatch.setattr(recent, "boot_id", lambda crash=crash: crash.to_bytes(16, "big"))
        with LayerStore(root) as store:
            stored = store.open(LAYER.table)
            here = [chunk for chunk in range(CHUNKS) if stored.has(chunk)]
            assert [stored.read(chunk) for chunk in here] == [LAYER.chunk(n) for n in here]
            believed.append(len(here))
    assert believed == sorted(believed)
    assert believed[-1] == CHUNKS


WRITER = """
import sys
from pathlib import Path
from snapshotter.store.layers import LayerStore
from tests.support.blobs import make_layer, sample_bytes
from index.tables import CHUNK_SIZE, Codec

layer = make_layer(sample_bytes(40 * CHUNK_SIZE), Codec.PLAIN)
store = LayerStore(Path(sys.argv[1]))
stored = store.open(layer.table)
for number, chunk in enumerate(stored.missing(0, 39)):
    stored.write(chunk, layer.chunk(chunk))
    print(chunk, flush=True)
    if number % 4 == 3:
        store.flush()
"""


def test_a_killed_writer_loses_nothing_that_it_had_written(tmp_path: Path) -> None:
    """Flushed or not: the kernel has it."""
    layer = make_layer(sample_bytes(40 * CHUNK_SIZE), Codec.PLAIN)
    least = 0
    for kill_after in (3, 6, 9):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=layer_module.__file__.rsplit("/snapshotter/", 1)[0],
        )
        assert writer.stdout is not None
        for _ in range(kill_after):
            assert writer.stdout.readline()
        writer.kill()
        writer.stdout.close()
        writer.wait()
        least += kill_after
        with LayerStore(tmp_path) as store:
            stored = store.open(layer.table)
            here = [chunk for chunk in range(40) if stored.has(chunk)]
            assert len(here) >= least
            assert [stored.read(chunk) for chunk in here] == [layer.chunk(n) for n in here]
            least = len(here)
            stored.close()


def abandon(store: LayerStore) -> None:
    """As if its process had been killed: nothing is flushed, and the root is free."""
    os.close(store._owner)
    store._closed = True


def test_what_was_written_before_the_machine_started_counts_only_if_it_was_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LayerStore(tmp_path)
    stored = store.open(LAYER.table)
    stored.write(1, LAYER.chunk(1))
    store.flush()
    stored.write(4, LAYER.chunk(4))
    abandon(store)
    successor = LayerStore(tmp_path)
    assert successor.open(LAYER.table).missing(0, CHUNKS - 1) == [0, 2, 3, 5]
    abandon(successor)
    monkeypatch.setattr(recent, "boot_id", lambda: b"of another boot.")
    with LayerStore(tmp_path) as later:
        assert later.open(LAYER.table).missing(0, CHUNKS - 1) == [0, 2, 3, 4, 5]


def test_what_a_predecessor_had_not_flushed_is_flushed_by_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LayerStore(tmp_path)
    store.open(LAYER.table).write(4, LAYER.chunk(4))
    abandon(store)
    with LayerStore(tmp_path) as successor:
        successor.open(LAYER.table)
        successor.flush()
    monkeypatch.setattr(recent, "boot_id", lambda: b"of another boot.")
    with LayerStore(tmp_path) as later:
        assert later.open(LAYER.table).has(4)


def test_what_was_dropped_is_not_there_for_a_successor(tmp_path: Path) -> None:
    store = LayerStore(tmp_path)
    stored = store.open(LAYER.table)
    for chunk in (1, 2):
        stored.write(chunk, LAYER.chunk(chunk))
    stored.drop(2, "is damaged")
    abandon(store)
    with LayerStore(tmp_path) as successor:
        assert successor.open(LAYER.table).missing(0, CHUNKS - 1) == [0, 2, 3, 4, 5]


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
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
