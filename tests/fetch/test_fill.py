"""Background fill makes an image fully local, and proves it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch import fill as fill_module
from snapshotter.fetch import hold, transfer
from snapshotter.fetch.fill import HELD_BACK, ImageFill
from snapshotter.fetch.hold import Hold
from snapshotter.fetch.layer import LazyLayer
from snapshotter.fetch.pacing import FIRST_WINDOW
from snapshotter.fetch.startup import StartupRecorder
from snapshotter.registry.errors import NotFoundError
from snapshotter.store.layer import StoredLayer
from snapshotter.store.space import UNBOUNDED, Amount, Bounds
from tests.support.blobs import MadeLayer, make_layer, sample_bytes, table_for
from tests.support.fetching import open_node
from tests.support.sources import Fault, MemorySource

if TYPE_CHECKING:
    import hashlib
    from pathlib import Path

    from index.errors import IntegrityError
    from tests.support.fetching import Node

LAYERS = [
    make_layer(sample_bytes(30 * CHUNK_SIZE + 11, 1), Codec.GZIP),
    make_layer(sample_bytes(9 * CHUNK_SIZE, 2), Codec.ZSTD),
    make_layer(sample_bytes(7 * CHUNK_SIZE + 5, 3), Codec.ZSTD, frame=0),
    make_layer(sample_bytes(300_000, 4), Codec.PLAIN),
    make_layer(b"", Codec.PLAIN),
]


def must_not_quarantine(layer: LazyLayer, error: IntegrityError) -> None:
    raise AssertionError(error)


def must_not_hash(stored: StoredLayer, hasher: hashlib._Hash, start: int, end: int) -> None:
    raise AssertionError(stored)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fill_module, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(fill_module, "ROOM_POLL", 0.01)


async def test_every_layer_becomes_local_and_is_proven(node: Node) -> None:
    mounts = [node.mount(layer) for layer in LAYERS]
    fill = ImageFill([lazy for lazy, _ in mounts], node.scheduler, quarantine=must_not_quarantine)
    assert (fill.done_bytes, fill.total_bytes) == (0, sum(len(layer.raw) for layer in LAYERS))
    await fill.run()
    assert fill.fully_local.is_set()
    assert fill.done_bytes == fill.total_bytes
    for (lazy, source), layer in zip(mounts, LAYERS, strict=True):
        assert lazy.stored.raw_path.read_bytes()[: len(layer.raw)] == layer.raw
        assert lazy.stored.proven_diff_id == layer.table.diff_id
        assert source.served <= len(layer.blob) * 1.02 + (128 << 10)
        assert source.most_open <= 4


async def test_without_a_start_a_big_layer_is_fetched_over_several_connections(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "QUIET", 0)
    layer = make_layer(sample_bytes(200 * CHUNK_SIZE, 9), Codec.ZSTD)
    lazy, source = node.mount(layer)
    fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
    await fill.run()
    assert 2 <= source.most_open <= 4
    assert source.served == len(layer.blob)


async def test_on_an_unknown_link_fill_asks_for_little_at_first(node: Node) -> None:
    layer = make_layer(sample_bytes(250 * CHUNK_SIZE, 9), Codec.PLAIN)
    lazy, source = node.mount(layer)
    source.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
        nursery.start_soon(fill.run)
        await wait_all_tasks_blocked()
        assert len(source.requests) == 4
        assert sum(end - start for start, end in source.requests) == FIRST_WINDOW
        source.gate.set()


async def test_fill_waits_for_a_pull_that_goes_on(node: Node) -> None:
    lazy, source = node.mount(LAYERS[0])
    fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
    node.scheduler.hold_fill()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill.run)
        await wait_all_tasks_blocked(cushion=0.02)
        assert source.requests == []
        assert await lazy.read(0, 9) == LAYERS[0].raw[:9], "readers do not"
        node.scheduler.release_fill()
    assert fill.fully_local.is_set()


async def test_a_pull_that_does_not_end_is_forgotten(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "HELD_BACK", 0.01)
    lazy, _ = node.mount(LAYERS[0])
    fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
    node.scheduler.hold_fill()
    await fill.run()
    assert fill.fully_local.is_set()


async def test_fill_waits_for_a_start_that_is_helped(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "BEFORE_START", 60)
    lazy, source = node.mount(LAYERS[0])
    fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill.run)
        node.scheduler.expect_start()
        await wait_all_tasks_blocked(cushion=0.02)
        assert source.requests == []
        assert await lazy.read(0, 9) == LAYERS[0].raw[:9]
        await wait_all_tasks_blocked(cushion=0.02)
        assert not lazy.stored.complete
        node.scheduler.release_fill()
    assert fill.fully_local.is_set()


async def test_when_no_start_comes_fill_has_the_link_for_itself(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for more at once than it would if somebody was about to read."""
    monkeypatch.setattr(hold, "BEFORE_START", 0.01)
    monkeypatch.setattr(hold, "LONGEST_COMPUTING", 0)
    lazy, source = node.mount(make_layer(sample_bytes(64 * CHUNK_SIZE, 9), Codec.PLAIN))
    link = node.scheduler.begin_exchange(source.site, 50_000_000)
    began = trio.current_time()
    link.answered(began + 0.001)
    link.received(began + 0.001, 1)
    link.received(began + 0.201, 49_999_999)
    link.ended(began + 0.201)
    source.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        node.scheduler.expect_start()
        nursery.start_soon(node.scheduler.fill, lazy.origin, range(64))
        await trio.sleep(0.05)
        await wait_all_tasks_blocked()
        assert sum(end - start for start, end in source.requests) > 4 << 20
        source.gate.set()


@pytest.mark.parametrize("bound", [None, "SETTLED", "LONGEST_START"])
async def test_a_start_that_goes_on_is_waited_for_but_not_for_ever(
    node: Node, monkeypatch: pytest.MonkeyPatch, bound: str | None
) -> None:
    monkeypatch.setattr(hold, "BEFORE_START", 0)
    monkeypatch.setattr(hold, "SETTLED", 0.01 if bound == "SETTLED" else 60)
    monkeypatch.setattr(hold, "LONGEST_START", 0.01 if bound == "LONGEST_START" else 60)
    source, stored = MemorySource(LAYERS[0]), node.store.open(LAYERS[0].table)
    recorder = StartupRecorder()
    lazy = LazyLayer(LAYERS[0].table, stored, source, node.scheduler, recorder=recorder)
    stored.start_chunks.add(0)  # or its neighbours would be fetched, too
    fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
    node.scheduler.expect_start()
    assert await lazy.read(0, 9) == LAYERS[0].raw[:9]
    before = len(source.requests)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill.run)
        if bound is None:
            await wait_all_tasks_blocked(cushion=0.02)
            assert len(source.requests) == before
            node.scheduler.release_fill()
    assert fill.fully_local.is_set()


async def test_a_hold_that_ends_just_when_fill_has_asked_about_it_is_not_for_ever(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Hold.holds

    def slow(self: Hold) -> bool:
        held = real(self)
        if held:
            time.sleep(max(0, self.until - trio.current_time()) + 0.001)
        return held

    monkeypatch.setattr(Hold, "holds", slow)
    monkeypatch.setattr(hold, "BEFORE_START", 0.2)
    monkeypatch.setattr(hold, "LONGEST_COMPUTING", 0)
    monkeypatch.setattr(transfer, "QUIET", 0)
    lazy, _ = node.mount(make_layer(sample_bytes(1000), Codec.PLAIN))
    node.scheduler.expect_start()
    with trio.fail_after(20):
        await node.scheduler.fill(lazy.origin, [0])
    assert lazy.stored.complete
    lazy.close()


async def test_layers_are_hashed_while_the_rest_is_on_its_way(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no byte twice."""
    (first, _), (last, source) = node.mount(LAYERS[1]), node.mount(LAYERS[0])
    hashed: list[tuple[bytes, int, int]] = []
    all_of_first = trio.Event()
    hash_raw = StoredLayer.hash_raw

    def note(stored: StoredLayer, hasher: hashlib._Hash, start: int, end: int) -> None:
        hashed.append((stored.key, start, end))
        hash_raw(stored, hasher, start, end)
        if (stored.key, end) == (first.stored.key, 9 * CHUNK_SIZE):
            trio.from_thread.run_sync(all_of_first.set)

    monkeypatch.setattr(StoredLayer, "hash_raw", note)
    monkeypatch.setattr(fill_module, "HASH_PIECE", 5 * CHUNK_SIZE)
    source.gate = trio.Event()
    fill = ImageFill([first, last], node.scheduler, quarantine=must_not_quarantine)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill.run)
        await all_of_first.wait()
        assert not fill.fully_local.is_set()
        assert last.stored.key not in {key for key, _, _ in hashed}
        source.gate.set()
    assert fill.fully_local.is_set()
    assert len(hashed) == len(set(hashed)) == 2 + 7


async def test_what_is_local_already_is_neither_fetched_nor_hashed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy, source = node.mount(LAYERS[1])
    await lazy.read(3 * CHUNK_SIZE, 1)
    before = source.served
    await ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine).run()
    assert source.served <= len(LAYERS[1].blob)
    assert source.served > before
    again, source = node.mount(LAYERS[1])
    fill = ImageFill([again], node.scheduler, quarantine=must_not_quarantine)
    monkeypatch.setattr(StoredLayer, "hash_raw", must_not_hash)
    await fill.run()
    assert fill.fully_local.is_set()
    assert source.requests == []


async def test_fill_outlives_a_registry_that_is_away(node: Node) -> None:
    lazy, _ = node.mount(LAYERS[0], *[Fault(good=0)] * 40)
    fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
    await fill.run()
    assert fill.fully_local.is_set()


async def test_what_holds_fill_up_can_be_told(node: Node) -> None:
    lazy, _ = node.mount(LAYERS[3], *[Fault(good=0, error=NotFoundError("it is gone"))] * 1000)
    fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill.run)
        await wait_all_tasks_blocked()
        assert "it is gone" in fill.problem
        assert not fill.fully_local.is_set()
        nursery.cancel_scope.cancel()


async def test_an_index_that_lies_is_noticed(node: Node) -> None:
    """Its chunk digests fit the blob's bytes, but the layer is not the one the image names."""
    honest = LAYERS[1]
    lying = MadeLayer(
        honest.raw,
        honest.blob,
        table_for(honest.raw, honest.blob, Codec.ZSTD, (), diff_id=bytes(32)),
        {},
    )
    object.__setattr__(lying.table, "raw_offsets", honest.table.raw_offsets)
    object.__setattr__(lying.table, "bit_offsets", honest.table.bit_offsets)
    object.__setattr__(lying.table, "window_flags", honest.table.window_flags)
    lazy, _ = node.mount(lying)
    accused: list[tuple[LazyLayer, IntegrityError]] = []
    fill = ImageFill(
        [lazy], node.scheduler, quarantine=lambda layer, error: accused.append((layer, error))
    )
    await fill.run()
    assert [layer for layer, _ in accused] == [lazy]
    assert "instead of sha256:" + "00" * 32 in str(accused[0][1])
    assert not fill.fully_local.is_set()
    assert fill.problem


async def test_a_disk_that_lies_is_not_the_indexs_fault(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    layer = LAYERS[1]
    lazy, _ = node.mount(layer)
    await node.scheduler.fill(lazy.origin, range(9))
    with lazy.stored.raw_path.open("r+b") as file:
        file.seek(4 * CHUNK_SIZE)
        file.write(b"????")
    fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
    await fill.run()
    assert fill.fully_local.is_set()
    assert "chunk 4 of layer" in caplog.text
    assert lazy.stored.raw_path.read_bytes() == layer.raw


async def test_a_full_disk_holds_fill_up_until_there_is_room(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy, _ = node.mount(LAYERS[1])
    write = lazy.stored._write_raw
    refusals = 0

    def full(data: bytes, offset: int) -> None:
        nonlocal refusals
        if refusals < 20:
            refusals += 1
            raise OSError(28, "No space left on device")
        write(data, offset)

    async def keep_house() -> None:
        while True:
            await trio.sleep(0.02)
            node.store.space.measure()

    monkeypatch.setattr(lazy.stored, "_write_raw", full)
    fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_house)
        await fill.run()
        nursery.cancel_scope.cancel()
    assert refusals == 20
    assert fill.fully_local.is_set()


async def test_an_image_that_the_store_has_no_room_for_waits_for_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layer = make_layer(sample_bytes(60 * CHUNK_SIZE, 5), Codec.ZSTD)
    bounds = Bounds(limit=Amount(size=40 * CHUNK_SIZE), keep_free=Amount())
    async with open_node(tmp_path, bounds=bounds) as node, trio.open_nursery() as nursery:
        lazy, source = node.mount(layer)
        fill = ImageFill([lazy], node.scheduler, quarantine=must_not_quarantine)
        nursery.start_soon(fill.run)
        while fill.problem != HELD_BACK:  # noqa: ASYNC110  (there is no event for it)
            await trio.sleep(0.01)
        space = node.store.space
        assert 30 * CHUNK_SIZE <= fill.done_bytes <= space.marks.fill
        assert space.wanted
        served = source.served
        assert await lazy.read(59 * CHUNK_SIZE, 10) == layer.raw[59 * CHUNK_SIZE :][:10]
        assert lazy.stored.has(59), "reads have some room left"
        assert source.served > served
        space._bounds = UNBOUNDED
        space.measure()
        await fill.fully_local.wait()
        assert fill.problem == ""
    assert "not kept" not in caplog.text
