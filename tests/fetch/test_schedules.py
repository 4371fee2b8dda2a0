"""Whatever readers, faults and cancellations there are: right bytes, bounded, nothing left over."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch import transfer
from snapshotter.fetch.errors import FetchError
from snapshotter.fetch.fill import ImageFill
from snapshotter.fetch.pacing import LARGEST_FAN
from snapshotter.fetch.scheduler import RESERVED, Patience
from snapshotter.fetch.wants import Priority
from snapshotter.registry.errors import NetworkError, NotFoundError
from snapshotter.registry.retry import RetryPolicy
from snapshotter.store.layer import StoredLayer
from tests.support.blobs import make_layer, sample_bytes
from tests.support.fetching import open_node
from tests.support.sources import Fault

if TYPE_CHECKING:
    from snapshotter.fetch.layer import LazyLayer
    from snapshotter.fetch.scheduler import Scheduler

RAW = sample_bytes(14 * CHUNK_SIZE + 321)
LAYERS = {
    "plain": make_layer(RAW, Codec.PLAIN),
    "frames": make_layer(RAW, Codec.ZSTD),
    "odd frames": make_layer(RAW, Codec.ZSTD, frame=700_001),
    "gzip": make_layer(RAW, Codec.GZIP),
    "one frame": make_layer(RAW, Codec.ZSTD, frame=0),
}

faults = st.one_of(
    st.none(),
    st.builds(Fault, good=st.integers(0, 400_000)),
    st.builds(Fault, good=st.integers(0, 400_000), ends=st.just(True)),
    st.builds(Fault, good=st.integers(0, 400_000), error=st.just(NotFoundError("404"))),
    st.builds(
        lambda seed: Fault(change=lambda at, data: _mangled(data, random.Random(seed * 977 + at))),
        st.integers(0, 100),
    ),
)
reads = st.tuples(
    st.integers(0, len(RAW) - 1),
    st.integers(1, 600_000),
    st.integers(0, 6).map(lambda n: n / 2000),  # starts after so many seconds
    st.sampled_from([None, None, None, 0, 0.001, 0.004]),  # is cancelled after so many
)


def _mangled(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 + rng.randrange(255)
    return bytes(changed)


def quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transfer, "FOR_READERS", RetryPolicy(attempts=1 << 30, base=0.0001))
    patch.setattr(transfer, "IN_BACKGROUND", RetryPolicy(attempts=5, base=0.0001))


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    script=st.lists(faults, max_size=10),
    work=st.lists(reads, min_size=1, max_size=12),
    advice=st.lists(
        st.tuples(st.integers(0, 14), st.sampled_from([Priority.STARTUP, Priority.READAHEAD])),
        max_size=4,
    ),
    fill=st.booleans(),
    unmount=st.booleans(),
)
async def test_any_schedule(
    kind: str,
    script: list[Fault | None],
    work: list[tuple[int, int, float, float | None]],
    advice: list[tuple[int, Priority]],
    fill: bool,
    unmount: bool,
) -> None:
    layer = LAYERS[kind]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        quick(patch)
        async with open_node(Path(directory), Patience(read=60, give_way=0.01)) as node:
            lazy, source = node.mount(layer, *script)
            other, other_source = node.mount(layer)

            async def reader(
                image: LazyLayer, offset: int, length: int, start: float, leave: float | None
            ) -> None:
                length = min(length, len(RAW) - offset)
                await trio.sleep(start)
                with trio.move_on_after(60 if leave is None else leave):
                    try:
                        data = await image.read(offset, length)
                    except FetchError:
                        assert image is lazy, "the other image's source has no faults"
                        return
                    assert data == RAW[offset : offset + length]

            async with trio.open_nursery() as nursery:
                for number, job in enumerate(work):
                    nursery.start_soon(reader, (lazy, other)[number % 2], *job)
                for chunk, priority in advice:
                    node.scheduler.advise(lazy.origin, [chunk], priority)
                if fill:
                    nursery.start_soon(_fill_if_possible, node.scheduler, lazy)
                if unmount:
                    await trio.sleep(0.002)
                    lazy.close()
            most = LARGEST_FAN + RESERVED[Priority.BLOCKED]
            assert source.most_open + other_source.most_open <= 2 * most

            source.faults.clear()
            last = ImageFill([other], node.scheduler, quarantine=_unexpected)
            with trio.fail_after(60):
                await last.run()
            assert last.fully_local.is_set()
            found = other.stored.raw_path.read_bytes()[: len(RAW)]  # then padding
            assert found == RAW
            lazy.close()
            other.close()
            await node.quiet()
            assert node.scheduler.wants.layers() == []
            assert source.open == other_source.open == 0


async def _fill_if_possible(scheduler: Scheduler, layer: LazyLayer) -> None:
    with suppress(FetchError):
        await scheduler.fill(layer.origin, range(layer.table.chunk_count))


def _unexpected(layer: LazyLayer, error: Exception) -> None:
    raise AssertionError(error)


@settings(max_examples=25)
@given(kind=st.sampled_from(["plain", "frames", "one frame"]), work=st.lists(reads, min_size=1))
async def test_without_faults_a_chunk_is_stored_once_whoever_wants_it(
    kind: str, work: list[tuple[int, int, float, float | None]]
) -> None:
    writes: Counter[int] = Counter()
    write = StoredLayer.write

    def counted(self: StoredLayer, chunk: int, data: bytes, *, remember: bool = True) -> None:
        writes[chunk] += 1
        write(self, chunk, data, remember=remember)

    layer = LAYERS[kind]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(StoredLayer, "write", counted)
        async with open_node(Path(directory)) as node:
            lazy, source = node.mount(layer)
            async with trio.open_nursery() as nursery:
                for offset, length, start, _ in work:

                    async def reader(offset: int, length: int, start: float) -> None:
                        await trio.sleep(start)
                        length = min(length, len(RAW) - offset)
                        assert await lazy.read(offset, length) == RAW[offset : offset + length]

                    nursery.start_soon(reader, offset, length, start)
            lazy.close()
            await node.quiet()
            assert set(writes.values()) == {1}
            assert source.served <= len(layer.blob)


async def test_blocked_reads_are_served_while_fill_is_endless(tmp_path: Path) -> None:
    """Nobody starves: neither readers among fill, nor fill among readers."""
    big = make_layer(sample_bytes(120 * CHUNK_SIZE, 8), Codec.PLAIN)
    async with open_node(tmp_path, Patience(give_way=0.005)) as node:
        filled, _ = node.mount(big)
        lazy, source = node.mount(LAYERS["plain"])
        source.delay = 0.002
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.scheduler.fill, filled.origin, range(120))

            async def blocked(worker: int) -> None:
                while not filled.stored.complete:
                    chunk = (worker * 5 + 3) % 14
                    assert await lazy.read(chunk * CHUNK_SIZE, 9) == RAW[chunk * CHUNK_SIZE :][:9]
                    node.store._cache._chunks.clear()
                    lazy.stored.drop(chunk, "is dropped by a test")

            for worker in range(3):
                nursery.start_soon(blocked, worker)
        assert filled.stored.complete


async def test_an_error_is_forgotten_by_the_next_read(tmp_path: Path) -> None:
    async with open_node(tmp_path) as node:
        fault = Fault(good=0, error=NetworkError("refused"))
        fault.error.transient = False  # type: ignore[union-attr]
        lazy, _ = node.mount(LAYERS["frames"], fault, fault, fault)
        failed = 0
        for _ in range(4):
            try:
                data = await lazy.read(0, 9)
            except FetchError:
                failed += 1
        assert failed == 3
        assert data == RAW[:9]
