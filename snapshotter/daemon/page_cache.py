"""What a startup pack has brought goes into the kernel's page cache, before a container reads it.

Under the kernel's EROFS a start reads many small pieces, and each that is not in the page cache
of the layers' flat files is a request to this process that the start waits for. What a pack has
brought will probably be read, so the kernel is told to read it ahead while the container is still
being made: in requests of up to 1 MiB that nobody waits for. The kernel's own guesses no longer
reach for what is next to it, either. See "Page cache" in docs/benchmarks.md.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from index.tables import CHUNK_SIZE

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterator, Sequence
    from pathlib import Path

    from index.pack import Place


async def read_ahead(files: Sequence[Path], arrivals: AsyncIterable[Sequence[Place]]) -> None:
    """Have the kernel read chunks ahead as they arrive, until there are no more.

    `files` are the flat files of an image's layers, in the FUSE mount, which must be served.
    Raises OSError.
    """
    async for places in arrivals:
        # It waits for this process to answer the kernel, which it may not do any more.
        await trio.to_thread.run_sync(_advise, files, places, abandon_on_cancel=True)


def _advise(files: Sequence[Path], places: Sequence[Place]) -> None:
    for layer, first, count in _runs(places):
        with files[layer].open("rb", buffering=0) as file:
            offset, length = first * CHUNK_SIZE, count * CHUNK_SIZE
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)


def _runs(places: Sequence[Place]) -> Iterator[tuple[int, int, int]]:
    """(layer, first chunk, how many) of chunks that follow each other."""
    layer, first, count = -1, 0, 0
    for place in places:
        if place == (layer, first + count):
            count += 1
            continue
        if count:
            yield layer, first, count
        layer, first, count = *place, 1
    if count:
        yield layer, first, count
