"""Reading whole blobs that are too large for memory, through failures of the network."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio

from snapshotter.registry.errors import RegistryError
from snapshotter.registry.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from snapshotter.registry.image import ImageSource
    from snapshotter.registry.manifest import Descriptor


async def read_blob(
    source: ImageSource,
    descriptor: Descriptor,
    consume: Callable[[bytes], Awaitable[None]],
    policy: RetryPolicy = RetryPolicy(),  # noqa: B008  (frozen)
) -> None:
    """Hand every byte of a blob to `consume`, in order, each once; nothing is verified here.

    After a transient failure it goes on where it stopped; attempts are counted anew whenever
    bytes arrive. Raises RegistryError when `policy` gives up, and whatever `consume` raises.
    """
    rng = random.Random()  # noqa: S311  (spreads load, guards nothing)
    position = attempt = 0
    while position < descriptor.size:
        try:
            async with source.open_range(descriptor, position, descriptor.size) as pieces:
                async for piece in pieces:
                    await consume(piece)
                    position += len(piece)
                    attempt = 0
        except RegistryError as error:
            attempt += 1
            delay = policy.delay(attempt, error, rng=rng)
            if delay is None:
                raise
            await trio.sleep(delay)
