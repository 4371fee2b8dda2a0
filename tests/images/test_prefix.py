"""The index of an image's lower layers is made of what their headers say, and reads little else."""

from __future__ import annotations

import gzip
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from index.builder import build
from index.errors import FirstByteError, TarError
from index.tables import CHUNK_SIZE, Codec
from snapshotter.images import prefix
from snapshotter.images.prefix import INLINE, LAYERS_AT_ONCE, build_prefix
from tests.support.awkward import awkward_layers, huge_layers, layers_beyond_umoci
from tests.support.blobs import MadeLayer, make_layer, sample_bytes
from tests.support.sources import Fault
from tests.support.tars import directory, file, tar, whiteout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from index.file import FileIndex
    from tests.support.fetching import Node


def index_of(layers: Sequence[MadeLayer]) -> FileIndex:
    return build([layer.blob] for layer in layers)


def many_files(number: int, *, size: int = 10) -> bytes:
    return tar(
        directory(b"many"), *(file(b"many/%d" % n, sample_bytes(size, n)) for n in range(number))
    )


def large_file(name: bytes, chunks: int) -> bytes:
    return tar(file(name, sample_bytes(chunks * CHUNK_SIZE)))


# --- through layers that are fetched ------------------------------------------------------------


@pytest.mark.parametrize("codec", list(Codec), ids=lambda codec: codec.name)
async def test_every_depth_is_the_index_that_a_build_gives(node: Node, codec: Codec) -> None:
    raw = [
        *awkward_layers(),
        *layers_beyond_umoci(),
        many_files(2000),
        tar(whiteout(b"many"), whiteout(b"usr")),
        large_file(b"large", 9),
        *huge_layers(),  # the last: each index that has it takes a third of a second
    ]
    made = [make_layer(layer, codec, frame=CHUNK_SIZE if layer else 0) for layer in raw]
    image = index_of(made)
    layers = [node.mount(layer)[0] for layer in made]
    for depth in range(1, len(layers) + 1):
        lower = await build_prefix(image, layers, depth)
        assert lower.digest == index_of(made[:depth]).digest
    assert lower.digest == image.digest
    for layer in layers:
        layer.close()


async def test_contents_of_large_files_are_not_fetched(node: Node) -> None:
    members = [file(b"%d" % n, sample_bytes(10 * CHUNK_SIZE)) for n in range(5)]
    made = make_layer(tar(*members), Codec.PLAIN)
    layer, source = node.mount(made)
    lower = await build_prefix(index_of([made]), [layer], 1)
    assert lower.digest == index_of([made]).digest
    # One header is in each, and the end of the archive in the last.
    chunks = {number * (10 * CHUNK_SIZE + 512) // CHUNK_SIZE for number in range(6)}
    assert {start // CHUNK_SIZE for start, _ in source.requests} == chunks
    assert source.served <= len(chunks) * CHUNK_SIZE
    layer.close()


async def test_upper_layers_are_not_read(node: Node) -> None:
    made = [make_layer(many_files(5)), make_layer(tar(file(b"upper"))), make_layer(many_files(9))]
    mounted = [node.mount(layer) for layer in made]
    await build_prefix(index_of(made), [layer for layer, _ in mounted], 2)
    assert [bool(source.requests) for _, source in mounted] == [True, True, False]
    for layer, _ in mounted:
        layer.close()


async def test_what_follows_the_archive_is_not_fetched(node: Node) -> None:
    made = make_layer(tar(file(b"f")) + sample_bytes(20 * CHUNK_SIZE), Codec.PLAIN)
    layer, source = node.mount(made)
    lower = await build_prefix(index_of([made]), [layer], 1)
    assert lower.digest == index_of([made]).digest
    assert source.requests == [(0, CHUNK_SIZE)]
    layer.close()


async def test_bytes_that_are_not_the_layers_are_not_believed(node: Node) -> None:
    made = make_layer(tar(file(b"f")), Codec.PLAIN)
    forged = Fault(change=lambda _, data: bytes(data).replace(b"f", b"g", 1))
    layer, source = node.mount(made, *[forged] * 10)
    with pytest.raises(FirstByteError, match="chunk 0"):
        await build_prefix(index_of([made]), [layer], 1)
    assert source.requests
    layer.close()


# --- through layers that misbehave --------------------------------------------------------------


@dataclass
class MemoryLayer:
    """Raw space in memory. `error` is raised by every read, `hangs` lets it wait; `on_read` is
    called before that."""

    raw: bytes
    error: FirstByteError | None = None
    hangs: bool = False
    on_read: Callable[[], None] = lambda: None
    reads: list[tuple[int, int]] = field(default_factory=list)

    async def read(self, raw_offset: int, length: int) -> bytes:
        assert 0 <= raw_offset < raw_offset + length <= len(self.raw)
        assert raw_offset // CHUNK_SIZE == (raw_offset + length - 1) // CHUNK_SIZE
        self.reads.append((raw_offset, length))
        self.on_read()
        if self.hangs:
            await trio.sleep_forever()
        if self.error is not None:
            raise self.error
        return self.raw[raw_offset : raw_offset + length]


def image_of(raw: Sequence[bytes]) -> tuple[FileIndex, list[MemoryLayer]]:
    return build([gzip.compress(layer)] for layer in raw), [MemoryLayer(layer) for layer in raw]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, INLINE - 512, INLINE, CHUNK_SIZE - 1024])
async def test_members_may_end_anywhere_in_a_chunk(size: int) -> None:
    index, layers = image_of(
        [many_files(40, size=size), many_files(600_000 // (size + 512), size=size)]
    )
    assert (await build_prefix(index, layers, 2)).digest == index.digest
    offsets = [raw_offset for raw_offset, _ in layers[1].reads]
    assert offsets == sorted(set(offsets))


async def test_a_layer_that_is_no_archive_is_an_error_with_its_digest() -> None:
    index, layers = image_of([tar(file(b"f")), tar(file(b"g"))])
    layers[1].raw = b"x" * len(layers[1].raw)
    with pytest.raises(TarError) as caught:
        await build_prefix(index, layers, 2)
    assert index.layers[1].digest.hex() in caught.value.message
    assert "an octal number belongs" in caught.value.message


async def test_a_layer_that_cannot_be_read_is_its_own_error_and_ends_the_others() -> None:
    index, layers = image_of([tar(file(b"f")), tar(file(b"g")), tar(file(b"h"))])
    layers[0].hangs = layers[2].hangs = True
    layers[1].error = FirstByteError("the registry is away")
    with pytest.raises(FirstByteError, match="the registry is away"):
        await build_prefix(index, layers, 3)


async def test_layers_are_read_side_by_side_but_not_all_at_once() -> None:
    index, layers = image_of([tar(file(b"%d" % n)) for n in range(LAYERS_AT_ONCE + 3)])
    for layer in layers:
        layer.hangs = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(build_prefix, index, layers, len(layers))
        await wait_all_tasks_blocked()
        assert sum(bool(layer.reads) for layer in layers) == LAYERS_AT_ONCE
        nursery.cancel_scope.cancel()


async def _is_cancelled_by_read(number: int) -> bool:
    index, layers = image_of([many_files(600), many_files(600, size=300)])
    scope = trio.CancelScope()
    for layer in layers:
        layer.on_read = lambda: (
            scope.cancel() if sum(len(layer.reads) for layer in layers) == number else None
        )
    with scope:
        await build_prefix(index, layers, 2)
    return scope.cancelled_caught


async def test_it_can_be_cancelled_while_it_scans() -> None:
    number = 1
    while await _is_cancelled_by_read(number):
        number += 1
    assert number > 3


async def test_it_can_be_cancelled_while_it_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    index, layers = image_of([tar(file(b"f"))])
    end, ended = threading.Event(), threading.Event()

    def merge(*_: object) -> None:
        end.wait()
        ended.set()

    monkeypatch.setattr(prefix, "cut", merge)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(build_prefix, index, layers, 1)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert not ended.is_set()
    end.set()
    ended.wait()


@pytest.mark.parametrize("depth", [0, 3])
async def test_an_image_has_no_such_depth(depth: int) -> None:
    index, layers = image_of([tar(file(b"f")), tar(file(b"g"))])
    with pytest.raises(ValueError, match=f"{depth} layers of an image that has 2"):
        await build_prefix(index, layers, depth)
