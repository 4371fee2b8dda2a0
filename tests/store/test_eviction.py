"""What has to go goes: never what is in use, the coldest first, no more than was asked for, and in
an order that no crash can harm."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from index.tables import CHUNK_SIZE, Codec
from snapshotter.store import layer as layer_module
from snapshotter.store import space as space_module
from snapshotter.store.errors import StoreError, StoreFullError
from snapshotter.store.layer import held
from snapshotter.store.layers import LayerStore
from snapshotter.store.presence import BLOCK_SIZE
from snapshotter.store.space import UNBOUNDED, Amount, Bounds, marks
from tests.support.blobs import MadeLayer, make_layer, sample_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNKS = 6
LAYER = make_layer(sample_bytes((CHUNKS - 1) * CHUNK_SIZE + 1000), Codec.PLAIN)
OTHER = make_layer(sample_bytes(CHUNKS * CHUNK_SIZE, 1), Codec.PLAIN)

same_directory = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LayerStore]:
    with LayerStore(tmp_path / "store") as store:
        yield store


def fill(store: LayerStore, layer: MadeLayer = LAYER) -> layer_module.StoredLayer:
    """The layer, opened, with all of its chunks, flushed."""
    stored = store.open(layer.table)
    for chunk in range(layer.table.chunk_count):
        stored.write(chunk, layer.chunk(chunk), remember=False)
    store.flush()
    return stored


# --- chunks ---


def test_evicted_chunks_give_their_space_back_and_are_gone_for_good(store: LayerStore) -> None:
    stored = fill(store)
    before, used = stored.disk_usage(), store.space.used
    assert stored.evict([1, 2, 5]) == before - stored.disk_usage() >= 2 * CHUNK_SIZE
    assert used - store.space.used == before - stored.disk_usage()
    assert stored.missing(0, 5) == [1, 2, 5]
    assert [stored.read(n) is not None for n in range(6)] == [True, False, False, True, True, False]
    store.close()
    with LayerStore(store.root) as again:
        stored = again.open(LAYER.table)
        assert stored.missing(0, 5) == [1, 2, 5]
        stored.write(1, LAYER.chunk(1), remember=False)
        assert stored.read(1) == LAYER.chunk(1)


def test_a_proof_ends_with_the_first_chunk_that_goes(store: LayerStore) -> None:
    stored = fill(store)
    stored.record_diff_id(LAYER.table.diff_id)
    assert stored.proven
    stored.evict([0])
    stored.write(0, LAYER.chunk(0))
    assert stored.complete
    assert not stored.proven


def test_nothing_goes_while_somebody_else_has_the_file_open(store: LayerStore) -> None:
    """Such as the kernel's EROFS, which asks nobody before it reads."""
    stored = fill(store)
    with stored.raw_path.open("rb"):
        assert stored.evict([0, 1]) == 0
        assert stored.complete
    assert stored.evict([0, 1]) > 0


def test_nothing_goes_while_somebody_holds_the_layer(store: LayerStore) -> None:
    stored = fill(store)
    with held([stored]):
        assert stored.evict([0]) == 0
        assert store.evict_chunks(1) == []
        assert stored.complete
    assert store.evict_chunks(1) == [LAYER.table.content_key]


def test_what_a_crash_left_without_a_bit_goes_too(store: LayerStore) -> None:
    stored = fill(store)
    path = stored.raw_path
    store.close()
    for name in ("present", "recent"):
        path.with_name(name).unlink()
    with LayerStore(store.root) as again:
        stored = again.open(LAYER.table)
        assert stored.present_bytes == 0
        stored.write(3, LAYER.chunk(3))
        stored.flush()
        stored.evict([3])
        assert stored.disk_usage() == 0


def test_a_file_system_without_holes_loses_nothing_but_chunks(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = fill(store)

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(layer_module, "punch_hole", refuse)
    with pytest.raises(StoreError, match="cannot make holes"):
        stored.evict([0])
    assert stored.missing(0, 5) == [0]
    stored.write(0, LAYER.chunk(0))
    store.flush()
    assert stored.complete


def test_a_chunk_is_not_written_where_a_hole_is_being_made(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = fill(store)
    punch = layer_module.punch_hole
    refused = []

    def write_first(descriptor: int, offset: int, length: int) -> None:
        with pytest.raises(StoreFullError) as caught:
            stored.write(2, LAYER.chunk(2))
        refused.append(str(caught.value))
        punch(descriptor, offset, length)

    monkeypatch.setattr(layer_module, "punch_hole", write_first)
    stored.evict([2])
    assert "is just being evicted" in refused[0]
    assert stored.missing(0, 5) == [2]


def test_no_hole_is_made_where_a_chunk_is_being_written(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = fill(store)
    write_raw = stored._write_raw

    def evict_first(data: bytes, offset: int) -> None:
        stored.evict([4])
        write_raw(data, offset)

    monkeypatch.setattr(stored, "_write_raw", evict_first)
    stored.write(4, LAYER.chunk(4))
    assert stored.check(4) == LAYER.chunk(4)


def test_a_reader_who_meets_a_hole_finds_no_damage(
    store: LayerStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stored = fill(store)
    preadv = os.preadv

    def evict_first(descriptor: int, buffers: list[bytearray], *rest: int) -> int:
        stored.evict([3])
        return preadv(descriptor, buffers, *rest)

    monkeypatch.setattr(os, "preadv", evict_first)
    assert stored.read(3) is None
    assert "damaged" not in caplog.text


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sets(st.integers(0, CHUNKS - 1), min_size=1)),
        st.tuples(st.just("evict"), st.sets(st.integers(0, CHUNKS - 1), min_size=1)),
        st.tuples(st.just("flush"), st.just(set[int]())),
    ),
    max_size=12,
)


@same_directory
@given(OPERATIONS)
@example([("write", {0, 1}), ("flush", set()), ("evict", {0})])
@example([("write", {0, 1}), ("evict", {0}), ("write", {0}), ("flush", set()), ("evict", {1})])
def test_no_bit_ever_vouches_for_a_hole(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, set[int]]]
) -> None:
    """Power may go between any two system calls. Of what was not synced by then, the disk has any
    part, whatever the order was in which it was written."""
    # What may be on the disk of each chunk, and of the bits: as synced last, and each state since.
    raw = [{False} for _ in range(CHUNKS)]
    latest = [False] * CHUNKS
    present = [0]
    pwrite, fdatasync, punch = os.pwrite, os.fdatasync, layer_module.punch_hole

    def check() -> None:
        for bits in present:
            for chunk in range(CHUNKS):
                assert not (bits >> chunk & 1 and False in raw[chunk]), (chunk, present, raw)

    def set_raw(chunk: int, good: bool) -> None:
        latest[chunk] = good
        raw[chunk].add(good)
        check()

    def noted_pwrite(handle: int, data: bytes, offset: int) -> int:
        done = pwrite(handle, data, offset)
        if handle == stored._raw:
            set_raw(offset // CHUNK_SIZE, True)
        elif offset == BLOCK_SIZE:
            present.append(data[0])
            check()
        return done

    def noted_punch(handle: int, offset: int, length: int) -> None:
        punch(handle, offset, length)
        for chunk in range(offset // CHUNK_SIZE, (offset + length) // CHUNK_SIZE):
            set_raw(chunk, False)

    def noted_fdatasync(handle: int) -> None:
        fdatasync(handle)
        if handle == stored._raw:
            raw[:] = [{good} for good in latest]
        else:
            del present[:-1]

    with (
        LayerStore(tmp_path_factory.mktemp("store")) as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        stored = store.open(LAYER.table)
        patch.setattr(os, "pwrite", noted_pwrite)
        patch.setattr(os, "fdatasync", noted_fdatasync)
        patch.setattr(layer_module, "punch_hole", noted_punch)
        for operation, chunks in operations:
            if operation == "write":
                for chunk in sorted(chunks):
                    stored.write(chunk, LAYER.chunk(chunk), remember=False)
            elif operation == "evict":
                stored.evict(chunks)
            else:
                store.flush()
        here = [chunk for chunk in range(CHUNKS) if stored.has(chunk)]
        assert [stored.check(chunk) for chunk in here] == [LAYER.chunk(n) for n in here]


@same_directory
@given(
    uses=st.lists(st.integers(0, 9), min_size=2 * CHUNKS, max_size=2 * CHUNKS),
    needed=st.sets(st.integers(0, CHUNKS - 1)),
    asked=st.integers(0, 14 * CHUNK_SIZE),
    held=st.booleans(),
)
def test_the_coldest_chunks_go_and_no_more_than_was_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
    uses: list[int],
    needed: set[int],
    asked: int,
    held: bool,
) -> None:
    with LayerStore(tmp_path_factory.mktemp("store")) as store:
        layers = [fill(store, LAYER), fill(store, OTHER)]
        layers[1].start_chunks = needed
        for number, stored in enumerate(layers):
            for chunk in range(CHUNKS):
                store.space.now = uses[number * CHUNKS + chunk]
                stored.peek(chunk)
        if held:
            layers[0].hold()
        before = store.disk_usage()
        lost = store.evict_chunks(asked)
        freed = before - store.disk_usage()
        gone: list[tuple[bool, int]] = []
        left: list[tuple[bool, int]] = []
        for number, stored in enumerate(layers):
            for chunk in range(CHUNKS):
                rank = (chunk in stored.start_chunks, uses[number * CHUNKS + chunk])
                if held and number == 0:
                    assert stored.has(chunk)
                else:
                    (left if stored.has(chunk) else gone).append(rank)
            assert (stored.key in lost) == (not stored.complete)
        assert freed < asked + CHUNK_SIZE
        assert freed >= asked or not left
        assert not gone or not left or max(gone) <= min(left)


# --- layers ---


def test_a_layer_that_is_open_is_not_removed(store: LayerStore) -> None:
    key = LAYER.table.content_key
    stored = fill(store)
    assert store.remove([key]) == []
    stored.close()
    assert store.remove([key]) == [key]
    assert not stored.raw_path.exists()
    assert store.remove([key]) == []


def test_a_layer_that_the_kernel_has_open_is_not_removed(store: LayerStore) -> None:
    key = LAYER.table.content_key
    stored = fill(store)
    stored.close()
    with stored.raw_path.open("rb"):
        assert store.remove([key]) == []
    assert store.remove([key]) == [key]


def test_when_a_layer_was_used_last_outlives_the_process(store: LayerStore) -> None:
    stored = fill(store)
    directory = stored.raw_path.parent
    os.utime(directory, (5, 5))
    store.touch_open()
    assert directory.stat().st_mtime > 5
    os.utime(directory, (5, 5))
    stored.close()
    store.flush()
    assert directory.stat().st_mtime > 5
    os.utime(directory, (5, 5))
    store.open(LAYER.table).close()
    assert directory.stat().st_mtime > 5


# --- limits ---


def bounded(tmp_path: Path, chunks: int) -> LayerStore:
    limit = Amount(size=chunks * CHUNK_SIZE)
    return LayerStore(tmp_path / "store", Bounds(limit=limit, keep_free=Amount()))


def test_what_exceeds_the_limit_is_refused_until_there_is_room(tmp_path: Path) -> None:
    with bounded(tmp_path, 4) as store:
        stored = store.open(LAYER.table)
        for chunk in range(4):
            stored.write(chunk, LAYER.chunk(chunk))
        assert store.space.problem == ""
        with pytest.raises(StoreFullError, match="reached its limit"):
            stored.write(4, LAYER.chunk(4))
        assert stored.read(4) == LAYER.chunk(4), "it is served all the same"
        assert "not kept" in store.space.problem
        store.evict_chunks(CHUNK_SIZE)
        stored.write(4, LAYER.chunk(4))
        assert stored.missing(0, 4) == [0]


def test_fill_leaves_room_for_reads(tmp_path: Path) -> None:
    with bounded(tmp_path, 64) as store:
        space = store.space
        room = space.reserve(64 * CHUNK_SIZE, CHUNK_SIZE)
        assert room == space.marks.fill - space.used < 57 * CHUNK_SIZE
        assert space.reserve(CHUNK_SIZE, CHUNK_SIZE) == 0
        space.release(room)
        assert space.reserve(CHUNK_SIZE, CHUNK_SIZE) == CHUNK_SIZE


def test_what_is_written_during_a_measurement_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the store could grow beyond its limit until the next one."""
    with bounded(tmp_path, 6) as store:
        stored, space = store.open(LAYER.table), store.space
        look = space_module.tree_sizes

        def write_meanwhile(directory: Path) -> Iterator[int]:
            sizes = list(look(directory))
            if directory.name == "layers":
                stored.write(2, LAYER.chunk(2))
            return iter(sizes)

        def measure_first(data: bytes, offset: int) -> None:
            monkeypatch.setattr(stored, "_write_raw", write_raw)
            space.measure()
            write_raw(data, offset)

        monkeypatch.setattr(space_module, "tree_sizes", write_meanwhile)
        write_raw = stored._write_raw
        monkeypatch.setattr(stored, "_write_raw", measure_first)
        stored.write(1, LAYER.chunk(1))
        assert stored.missing(1, 2) == []
        assert space.used >= stored.disk_usage() == 2 * CHUNK_SIZE


@given(
    limit=st.integers(0, 1 << 50),
    keep_free=st.integers(0, 1 << 45),
    used=st.integers(0, 1 << 45),
    free=st.integers(0, 1 << 45),
    others=st.integers(0, 1 << 45),
)
def test_the_marks_are_in_order_and_keep_what_was_promised(
    limit: int, keep_free: int, used: int, free: int, others: int
) -> None:
    bounds = Bounds(limit=Amount(size=limit), keep_free=Amount(size=keep_free))
    found = marks(bounds, used=used, free=free, disk=used + free + others)
    order = (0, found.fill, found.target, found.trigger, found.most, limit)
    assert all(low <= high for low, high in pairwise(order))
    assert found.fill <= max(0, used + free - keep_free)
    assert found.most <= max(0, used + free - keep_free // 2)


def test_others_who_fill_the_disk_leave_reads_more_than_fill() -> None:
    bounds = Bounds(keep_free=Amount(share=0.1))
    found = marks(bounds, used=100 << 20, free=80 << 20, disk=1000 << 20)
    assert found.fill == 80 << 20  # 100 MiB should be free, 80 are
    assert found.most == 130 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50 GiB", 50 << 30),
        ("1.5TB", 1_500_000_000_000),
        ("512 MiB", 512 << 20),
        ("100 kB", 100_000),
        ("10%", 100),
        ("12.5 %", 125),
        ("0%", 0),
        ("7 B", 7),
    ],
)
def test_amounts_are_bytes_or_shares(text: str, size: int) -> None:
    assert Amount.parse(text).of(1000) == size


@pytest.mark.parametrize(
    "text", ["", "50", "50 G", "-1 GB", "101%", "1e9 B", "GiB", "5 gib", "1/2"]
)
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Amount.parse(text)


def test_without_bounds_the_disk_decides(store: LayerStore) -> None:
    found = store.space.marks
    assert found.most == min(
        UNBOUNDED.limit.of(store.space.disk), store.space.used + store.space.free
    )


WORKER = """
import random
import sys
from pathlib import Path
from snapshotter.store.layers import LayerStore
from tests.store.test_eviction import CHUNKS, LAYER

source = random.Random()
store = LayerStore(Path(sys.argv[1]))
stored = store.open(LAYER.table)
for turn in range(1 << 30):
    chunk = source.randrange(CHUNKS)
    stored.write(chunk, LAYER.chunk(chunk), remember=False)
    if turn % 3 == 0:
        store.flush()
    if turn % 2 == 0:
        stored.evict({source.randrange(CHUNKS), source.randrange(CHUNKS)})
    print(turn, flush=True)
"""


def test_whoever_is_killed_while_evicting_leaves_nothing_wrong(tmp_path: Path) -> None:
    for kill_after in (3, 17, 40):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert worker.stdout is not None
        for _ in range(kill_after):
            assert worker.stdout.readline()
        worker.kill()
        worker.stdout.close()
        worker.wait()
        with LayerStore(tmp_path) as store:
            stored = store.open(LAYER.table)
            here = [chunk for chunk in range(CHUNKS) if stored.has(chunk)]
            assert [stored.check(chunk) for chunk in here] == [LAYER.chunk(n) for n in here]
            stored.close()
