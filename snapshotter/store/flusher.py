"""The background task that makes written chunks durable."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from snapshotter.store.errors import StoreError

if TYPE_CHECKING:
    from snapshotter.store.layers import LayerStore

log = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds of work that a crash may cost."""

POLL = 0.25
"""Seconds between two looks at the amount of dirty data."""

MAX_DIRTY = 64 << 20
"""Bytes after which a flush does not wait for the interval: keeps each sync short (a guess)."""


async def keep_flushed(store: LayerStore) -> None:
    """Flush `store` every INTERVAL, or as soon as MAX_DIRTY bytes wait. Runs until cancelled.

    A disk that refuses is reported, and tried again.
    """
    last = trio.current_time()
    while True:
        await trio.sleep(POLL)
        now = trio.current_time()
        if now - last < INTERVAL and store.dirty_bytes < MAX_DIRTY:
            continue
        try:
            await trio.to_thread.run_sync(store.flush)
        except StoreError as error:
            log.error("%s", error)
        last = trio.current_time()
