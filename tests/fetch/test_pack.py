"""A startup pack brings its chunks with one request; whatever goes wrong, reads get right bytes."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel
from trio.testing import wait_all_tasks_blocked

from index.errors import FirstByteError, FormatError, IntegrityError
from index.pack import PackWriter, read_table
from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch import pack as packs
from snapshotter.fetch import stream
from snapshotter.fetch.pack import PackDelivery
from snapshotter.fetch.wants import Priority
from snapshotter.registry.errors import ProtocolError
from snapshotter.registry.retry import RetryPolicy
from snapshotter.store.errors import StoreFullError
from tests.support.blobs import MadeLayer, make_layer, sample_bytes
from tests.support.sources import Fault, MemorySource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from index.pack import Place
    from snapshotter.fetch.layer import LazyLayer
    from tests.support.fetching import Node

DIGEST = bytes(range(32))
LAYERS = [
    make_layer(sample_bytes(size, seed), Codec.PLAIN)
    for seed, size in enumerate((30 * CHUNK_SIZE, 5 * CHUNK_SIZE + 9, 40 * CHUNK_SIZE))
]
EVERYWHERE = [
    (n, chunk) for n, layer in enumerate(LAYERS) for chunk in range(layer.table.chunk_count)
]
ORDER = random.Random(1).sample(EVERYWHERE, 48)
"""Six frames of some 1 MiB each."""


def write(places: Sequence[Place], *, index_digest: bytes = DIGEST) -> bytes:
    writer = PackWriter(index_digest, level=1, threads=2)
    for layer, chunk in places:
        writer.add(layer, chunk, LAYERS[layer].chunk(chunk))
    return writer.finish()


PACK = write(ORDER)
TABLE = read_table(PACK, len(PACK))
assert TABLE is not None
FRAMES = TABLE.frames


class PackInMemory(MemorySource):
    """A pack that can be told to misbehave."""

    def __init__(self, blob: bytes, *faults: Fault | None) -> None:
        super().__init__(MadeLayer(b"", blob, LAYERS[0].table, {}), faults=list(faults))

    @property
    def size(self) -> int:
        return len(self.layer.blob)


@dataclass
class Image:
    """All layers, as one image has them, and a pack on its way."""

    node: Node
    layers: list[LazyLayer]
    sources: list[MemorySource]
    pack: PackInMemory
    delivery: PackDelivery
    arrived: list[Place] = field(default_factory=list)

    async def deliver(self, delivery: PackDelivery | None = None) -> None:
        origins = [layer.origin for layer in self.layers]
        await (delivery or self.delivery).deliver(DIGEST, origins, self.arrived.extend)

    async def read(self, place: Place) -> None:
        layer, chunk = place
        length = LAYERS[layer].table.chunk_length(chunk)
        data = await self.layers[layer].read(chunk * CHUNK_SIZE, length)
        assert data == LAYERS[layer].chunk(chunk)

    def stored(self) -> set[Place]:
        return {
            (layer, chunk) for layer, chunk in EVERYWHERE if self.layers[layer].stored.has(chunk)
        }

    def requests(self) -> int:
        """How many the layers got."""
        return sum(len(source.requests) for source in self.sources)


@asynccontextmanager
async def image(node: Node, *faults: Fault | None, pack: bytes = PACK) -> AsyncIterator[Image]:
    mounted = [node.mount(layer) for layer in LAYERS]
    source = PackInMemory(pack, *faults)
    delivery = PackDelivery(source, node.scheduler)
    made = Image(node, [layer for layer, _ in mounted], [s for _, s in mounted], source, delivery)
    yield made
    await node.quiet()
    assert not node.scheduler.wants.layers(), "something is wanted for ever"
    for layer in made.layers:
        layer.close()


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "RETRIES", RetryPolicy(attempts=5, base=0.001))


async def test_all_of_it_comes_with_one_request(node: Node) -> None:
    async with image(node) as made:
        await made.deliver()
        assert made.stored() == {*ORDER}
        assert made.pack.requests == [(0, len(PACK))]
        assert made.arrived == ORDER
        for place in ORDER:
            await made.read(place)
        assert made.requests() == 0
        for number, layer in enumerate(made.layers):  # the last to be evicted
            assert layer.stored.start_chunks == {chunk for n, chunk in ORDER if n == number}
        assert node.scheduler.stats.received_bytes[Priority.STARTUP] == len(PACK)


async def test_it_may_be_asked_for_before_the_index_is_here(node: Node) -> None:
    async with image(node) as made, trio.open_nursery() as nursery:
        made.delivery.start(nursery)
        await wait_all_tasks_blocked(cushion=0.05)
        assert made.pack.requests == [(0, len(PACK))]
        assert made.pack.served == 0  # the index has the link
        made.delivery.release()
        await wait_all_tasks_blocked(cushion=0.05)
        assert 0 < made.pack.served <= (stream.WAITING + 2) * made.pack.piece  # bounded memory
        await made.deliver()
        assert made.stored() == {*ORDER}
        assert len(made.pack.requests) == 1


async def test_one_that_nobody_claims_is_asked_for_no_more(node: Node) -> None:
    async with image(node) as made:
        async with trio.open_nursery() as nursery:
            made.delivery.start(nursery)
            await wait_all_tasks_blocked()
            made.delivery.close()
        assert made.pack.open == 0


async def test_readers_wait_for_what_comes_soon_and_for_nothing_else(node: Node) -> None:
    """A chunk at the front costs no request of its own; one at the far end does."""
    async with image(node) as made, trio.open_nursery() as nursery:
        made.pack.gate = trio.Event()
        nursery.start_soon(made.deliver)
        await wait_all_tasks_blocked()
        made.pack.piece = 16 << 10
        gate, made.pack.gate = made.pack.gate, None
        made.pack.delay = 0.001
        gate.set()
        while not made.delivery._lanes:
            await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as readers:
            readers.start_soon(made.read, ORDER[0])
            readers.start_soon(made.read, ORDER[1])
            readers.start_soon(made.read, ORDER[-1])
        layer, chunk = ORDER[-1]
        span = LAYERS[layer].table.span(chunk, chunk)
        assert made.sources[layer].requests == [(span.start, span.end)]
        assert made.requests() == 1
    assert made.stored() >= {*ORDER}


async def test_fill_fetches_nothing_that_the_pack_brings(node: Node) -> None:
    async with image(node) as made, trio.open_nursery() as nursery:
        made.pack.delay = 0.001
        nursery.start_soon(made.deliver)
        while not made.delivery._lanes:
            await trio.lowlevel.checkpoint()
        mine = [chunk for layer, chunk in ORDER if layer == 0]
        await node.scheduler.fill(made.layers[0].origin, mine)
        assert made.requests() == 0


@pytest.mark.parametrize("good", [0, 10, 3000, 300_000, len(PACK) - 1])
@pytest.mark.parametrize("ends", [False, True])
async def test_it_goes_on_where_a_request_failed(node: Node, good: int, ends: bool) -> None:
    async with image(node, Fault(good=good, ends=ends), Fault(good=500_000, ends=ends)) as made:
        await made.deliver()
        assert made.stored() == {*ORDER}
        assert made.pack.served == len(PACK)
        starts = [start for start, _ in made.pack.requests]
        assert starts == sorted({0, good, min(good + 500_000, len(PACK))} - {len(PACK)}) or (
            good == 0 and starts[0] == starts[1] == 0
        )


async def test_readers_do_not_wait_for_a_pack_that_has_stopped(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "STALLED", 0.05)
    hangs = Fault(good=FRAMES[2].start, hangs=True)
    async with image(node, hangs) as made, trio.open_nursery() as nursery:
        nursery.start_soon(made.deliver)
        while not made.delivery._lanes:
            await trio.lowlevel.checkpoint()
        for place in FRAMES[2].places[:3]:
            await made.read(place)
        assert len(made.pack.requests) == 1
        assert made.pack.open == 1
        assert made.requests() == 3
        nursery.cancel_scope.cancel()


async def test_what_a_broken_pack_leaves_is_fetched_from_the_layers(node: Node) -> None:
    refusal = Fault(good=0, error=ProtocolError("the pack is gone"))
    async with image(node, Fault(good=FRAMES[1].start), refusal) as made:
        with pytest.raises(ProtocolError):
            await made.deliver()
        await node.quiet()
        assert made.stored() >= {*ORDER}
        assert made.requests() > 0


def flip(at: int) -> Fault:
    """One byte of the pack is wrong."""

    def change(position: int, data: bytes) -> bytes:
        if not position <= at < position + len(data):
            return data
        damaged = bytearray(data)
        damaged[at - position] ^= 0x10
        return bytes(damaged)

    return Fault(change=change)


@pytest.mark.parametrize("frame", [0, 3, len(FRAMES) - 1])
async def test_a_damaged_frame_is_asked_for_again(node: Node, frame: int) -> None:
    at = (FRAMES[frame].start + FRAMES[frame].end) // 2
    async with image(node, flip(at)) as made:
        await made.deliver()
        assert made.stored() == {*ORDER}
        assert made.pack.requests == [(0, len(PACK)), (FRAMES[frame].start, len(PACK))]
        assert made.pack.doubts == 1
        assert node.scheduler.stats.damaged == 1


async def test_a_frame_that_is_damaged_twice_comes_from_the_layers(node: Node) -> None:
    at = (FRAMES[1].start + FRAMES[1].end) // 2
    async with image(node, flip(at), flip(at)) as made:
        with pytest.raises(IntegrityError, match="1 frames"):
            await made.deliver()
        await node.quiet()
        assert made.stored() >= {*ORDER}
        assert made.requests() > 0
        for place in ORDER:
            await made.read(place)


async def test_a_table_that_names_other_chunks_gets_nothing_into_the_store(node: Node) -> None:
    """Every frame is refused; what it was to bring comes from the layers."""
    lying = PackWriter(DIGEST, level=1)
    for layer, chunk in ORDER:
        other = ORDER[(ORDER.index((layer, chunk)) + 1) % len(ORDER)]
        data = LAYERS[other[0]].chunk(other[1])
        size = LAYERS[layer].table.chunk_length(chunk)
        lying.add(layer, chunk, data[:size].ljust(size, b"\0"))
    async with image(node, pack=lying.finish()) as made:
        with pytest.raises(IntegrityError):
            await made.deliver()
        await node.quiet()
        for place in ORDER:
            await made.read(place)
        assert made.requests() > 0


@pytest.mark.parametrize(
    "pack",
    [
        pytest.param(write(ORDER, index_digest=bytes(32)), id="of another index"),
        pytest.param(PACK[:-1], id="cut"),
        pytest.param(b"x" * 5000, id="something else"),
        pytest.param(PACK[:20], id="not even a table"),
    ],
)
async def test_a_pack_of_no_use_costs_no_more_than_its_first_bytes(node: Node, pack: bytes) -> None:
    async with image(node, pack=pack) as made:
        with pytest.raises((FormatError, FirstByteError)):
            await made.deliver()
        assert made.stored() == set()
        await made.read(ORDER[0])


async def test_only_frames_with_something_missing_are_asked_for(node: Node) -> None:
    async with image(node) as made:
        await made.deliver()
        for layer, chunk in (*FRAMES[0].places[:1], *FRAMES[-1].places[3:5]):
            made.layers[layer].stored.drop(chunk, "is dropped by a test")
        await made.deliver(PackDelivery(made.pack, node.scheduler))
        assert made.stored() == {*ORDER}
        assert made.pack.requests[1:] == [
            (0, packs.HEAD),
            (FRAMES[0].start, FRAMES[0].end),
            (FRAMES[-1].start, FRAMES[-1].end),
        ]


async def test_nothing_is_asked_for_when_all_is_here(node: Node) -> None:
    async with image(node) as made:
        await made.deliver()
        await made.deliver(PackDelivery(made.pack, node.scheduler))
        assert made.pack.requests[1:] == [(0, packs.HEAD)]


async def test_an_image_that_is_unmounted_ends_its_pack_and_nobody_elses_read(
    node: Node,
) -> None:
    async with image(node) as made:
        made.pack.delay = 0.002
        others = [node.attach(layer, MemorySource(layer)) for layer in LAYERS]
        place = FRAMES[0].places[0]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.deliver)
            while not made.delivery._lanes:
                await trio.lowlevel.checkpoint()
            async with trio.open_nursery() as readers:
                readers.start_soon(others[place[0]].read, place[1] * CHUNK_SIZE, 10)
                await wait_all_tasks_blocked()
                for layer in made.layers:
                    layer.close()
                nursery.cancel_scope.cancel()
        assert made.pack.open == 0
        for other in others:
            other.close()


async def test_two_images_with_one_pack_fetch_it_once(node: Node) -> None:
    async with image(node) as first, image(node) as second:
        first.pack.delay = 0.001
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.deliver)
            while not first.delivery._lanes:
                await trio.lowlevel.checkpoint()
            await second.deliver()
            for place in ORDER[:8]:
                await second.read(place)
        assert second.pack.served < 8 * second.pack.piece
        assert first.stored() == second.stored() == {*ORDER}


async def test_a_full_disk_ends_it_and_readers_are_served(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with image(node) as made:
        for layer in made.layers:
            monkeypatch.setattr(layer.stored, "_write_raw", _full)
        with pytest.raises(StoreFullError):
            await made.deliver()
        await made.read(ORDER[0])
        node.scheduler.detach(made.layers[0].origin)
        for layer in made.layers:
            node.scheduler.detach(layer.origin)


def _full(data: bytes, offset: int) -> None:
    raise OSError(28, "No space left on device")
