"""Building the file index of an image from wherever its layers are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from index.builder import IndexBuilder
from index.errors import IntegrityError, about
from index.layer import LayerScanner
from snapshotter.nursery import open_nursery
from snapshotter.registry.reading import read_blob

if TYPE_CHECKING:
    from collections.abc import Callable

    from index.entry import Entry
    from index.file import FileIndex
    from index.layer import LayerScan
    from snapshotter.registry.image import ImageSource, ResolvedImage
    from snapshotter.registry.manifest import Descriptor

LAYERS_AT_ONCE = 3  # one more than a small machine has cores: while two decode, one fetches
BATCH = 1 << 20  # compressed bytes a thread is given at a time: a hop to it costs 0.1 ms
BATCHES_WAITING = 4  # for each layer, so that the network need not wait for a core


@dataclass(frozen=True, slots=True)
class _Scanned:
    scan: LayerScan
    entries: list[Entry]


async def build_index(
    source: ImageSource,
    image: ResolvedImage,
    *,
    on_progress: Callable[[int], None] = lambda _: None,
    on_raw: Callable[[int], Callable[[bytes], None] | None] = lambda _: None,
) -> FileIndex:
    """Read all layers of `image` once and build its file index.

    `on_progress` gets the compressed bytes read so far, of all layers. `on_raw(n)` may give a
    function that gets layer n's raw space in order, in worker threads. Raises IntegrityError if a
    layer is not what the manifest or configuration says, and TarError, CodecError,
    UnsupportedError or RegistryError if it cannot be read.
    """
    scanned: list[_Scanned | None] = [None] * len(image.manifest.layers)
    done = 0
    places = trio.CapacityLimiter(LAYERS_AT_ONCE)
    cores = trio.CapacityLimiter(os.cpu_count() or 1)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done)

    async def scan(number: int) -> None:
        layer = image.manifest.layers[number]
        with about(f"layer {layer.digest} of {image.name}"):
            async with places:
                scanner = LayerScanner(on_raw=on_raw(number))
                entries = await _scan(source, layer, scanner, cores, advance)
            result = scanner.finish()
        try:
            _check(result, layer, image.config.rootfs.diff_ids[number], image.name)
        except IntegrityError:
            source.doubt(layer)
            raise
        scanned[number] = _Scanned(result, entries)

    async with open_nursery() as nursery:
        for number in range(len(scanned)):
            nursery.start_soon(scan, number)
    return await trio.to_thread.run_sync(_merge, scanned, image)


async def _scan(
    source: ImageSource,
    layer: Descriptor,
    scanner: LayerScanner,
    cores: trio.CapacityLimiter,
    advance: Callable[[int], None],
) -> list[Entry]:
    """Read one blob in one task while its scanner works in threads."""
    entries: list[Entry] = []
    sender, receiver = trio.open_memory_channel[bytes](BATCHES_WAITING)

    async def work() -> None:
        with receiver:
            async for batch in receiver:
                entries.extend(await trio.to_thread.run_sync(scanner.feed, batch, limiter=cores))

    async def read() -> None:
        batch = bytearray()

        async def consume(piece: bytes) -> None:
            advance(len(piece))
            batch.extend(piece)
            if len(batch) >= BATCH:
                await sender.send(bytes(batch))
                batch.clear()

        with sender:
            await read_blob(source, layer, consume)
            await sender.send(bytes(batch))

    async with open_nursery() as nursery:
        nursery.start_soon(work)
        nursery.start_soon(read)
    return entries


def _check(scan: LayerScan, layer: Descriptor, diff_id: str, name: str) -> None:
    if f"sha256:{scan.table.digest.hex()}" != layer.digest:
        raise IntegrityError(f"a layer of {name} came with other bytes than {layer.digest}")
    if f"sha256:{scan.table.diff_id.hex()}" != diff_id:
        raise IntegrityError(
            f"layer {layer.digest} of {name} does not unpack to {diff_id}",
            hint="the image's configuration and layers contradict each other; build it again",
        )


def _merge(scanned: list[_Scanned | None], image: ResolvedImage) -> FileIndex:
    builder = IndexBuilder()
    for number, layer in enumerate(scanned):
        assert layer is not None
        with about(f"layer {image.manifest.layers[number].digest} of {image.name}"):
            builder.add(layer.scan, layer.entries)
        scanned[number] = None  # entries are the larger part of what a build holds
    return builder.finish()
