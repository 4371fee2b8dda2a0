"""What a startup pack has brought goes into the kernel's page cache, before a container reads it.

Under the kernel's EROFS a start reads many small pieces, and each that is not in the page cache
of the layers' flat files is a request to this process that the start waits for. What a pack has
brought will probably be read, so the kernel is told to read it ahead while the container is still
being made: in requests of a chunk each that nobody waits for. The kernel's own guesses no longer
reach for what is next to it, either. See "Page cache" in docs/benchmarks.md.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

import trio

from index.tables import CHUNK_SIZE

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Sequence
    from pathlib import Path

    from index.pack import Place


async def read_ahead(files: Sequence[Path], arrivals: AsyncIterable[Sequence[Place]]) -> None:
    """Have the kernel read chunks ahead as they arrive, until there are no more.

    `files` are the flat files of an image's layers, in the FUSE mount, which must be served.
    Raises OSError.
    """
    opened: dict[int, BinaryIO] = {}
    try:
        async for places in arrivals:
            advise = partial(_advise, files, opened, places)
            # It waits for this process to answer the kernel, which it may not do any more.
            await trio.to_thread.run_sync(advise, abandon_on_cancel=True)
    finally:
        for file in list(opened.values()):
            file.close()


def _advise(files: Sequence[Path], opened: dict[int, BinaryIO], places: Sequence[Place]) -> None:
    for layer, chunk in places:
        if layer not in opened:
            opened[layer] = files[layer].open("rb", buffering=0)
        # One by one: of a longer range the kernel reads no more than its read-ahead has.
        os.posix_fadvise(
            opened[layer].fileno(), chunk * CHUNK_SIZE, CHUNK_SIZE, os.POSIX_FADV_WILLNEED
        )
