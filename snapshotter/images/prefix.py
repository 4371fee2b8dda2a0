"""Making the file index of an image's lower layers, when only the image's own is at hand.

The tar headers of the layers are read through the layers themselves, which fetch and verify what
is not on this node. The contents of files are passed over: a chunk that holds no header is not
read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio

from index.errors import about
from index.prefix import cut
from index.tables import CHUNK_SIZE
from index.tar import TarScanner
from snapshotter.nursery import open_nursery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from index.entry import Entry
    from index.file import FileIndex
    from index.tables import LayerTable

LAYERS_AT_ONCE = 8
"""Guessed. A layer has one read at a time, for its headers tell where its next header lies."""

INLINE = 8 << 10
"""Bytes of a chunk that are scanned in the event loop: sixteen headers at most, 0.2 ms. A hop to a
thread costs 0.1 ms, and in a layer of large files most chunks that are read hold fewer headers."""


class Readable(Protocol):
    """A layer's raw space."""

    async def read(self, raw_offset: int, length: int) -> bytes | memoryview:
        """These bytes, verified. Raises FirstByteError."""


async def build_prefix(index: FileIndex, layers: Sequence[Readable], depth: int) -> FileIndex:
    """The file index of the lowest `depth` layers of an image, whose layers are `layers`.

    Raises what reading them does, and TarError, UnsupportedError or FormatError with the digest of
    the layer.
    """
    if not 0 < depth <= len(index.layers):
        raise ValueError(f"{depth} layers of an image that has {len(index.layers)}")
    entries = await scan_headers(index, layers, depth)
    return await trio.to_thread.run_sync(cut, index, entries, abandon_on_cancel=True)


async def scan_headers(
    index: FileIndex, layers: Sequence[Readable], depth: int
) -> list[list[Entry]]:
    """The entries of the lowest `depth` layers' tars. Raises as `build_prefix`."""
    entries: list[list[Entry]] = [[] for _ in range(depth)]
    places = trio.CapacityLimiter(LAYERS_AT_ONCE)
    # A second thread would not make Python faster, but the event loop wait longer for its turn.
    thread = trio.CapacityLimiter(1)

    async def scan(number: int) -> None:
        async with places:
            with about(str(index.layers[number])):
                await _scan(layers[number], index.layers[number], entries[number], thread)

    async with open_nursery() as nursery:
        for number in range(depth):
            nursery.start_soon(scan, number)
    return entries


async def _scan(
    layer: Readable, table: LayerTable, entries: list[Entry], thread: trio.CapacityLimiter
) -> None:
    """Append the layer's entries to `entries`."""
    scanner = TarScanner()
    position = 0
    while True:
        step = min(scanner.skippable, table.raw_size - position)
        scanner.skip(step)
        position += step
        if position == table.raw_size:
            break
        end = min(position + CHUNK_SIZE - position % CHUNK_SIZE, table.raw_size)
        data = memoryview(await layer.read(position, end - position))
        await trio.lowlevel.checkpoint()  # reading is none if the bytes are at hand
        entries += scanner.feed(data[:INLINE])
        rest = data[INLINE:]
        if scanner.skippable < len(rest):
            entries += await trio.to_thread.run_sync(scanner.feed, rest, limiter=thread)
        else:
            scanner.skip(len(rest))
        position = end
    scanner.finish()
