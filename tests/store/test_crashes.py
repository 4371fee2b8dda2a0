"""The chunk store after a crash: what was written is there, and nothing else is believed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from index.tables import CHUNK_SIZE, Codec
from snapshotter.store import layer as layer_module
from snapshotter.store import recent
from snapshotter.store.layers import LayerStore
from tests.support.blobs import make_layer, sample_bytes

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


LAYER = make_layer(sample_bytes(5 * CHUNK_SIZE + 1000), Codec.PLAIN)
CHUNKS = 6


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
