"""Room on a full disk for what an image needs to be opened."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

import trio

from snapshotter.store.errors import StoreFullError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Room:
    """For all images of the daemon, and the trio thread."""

    def __init__(self) -> None:
        self.make: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """What to do when the disk is full."""

    async def written(self, write: Callable[[], Awaitable[_T]]) -> _T:
        """The result of what writes to the store. On a full disk room is made for it, once."""
        try:
            return await write()
        except StoreFullError as error:
            log.warning("making room: %s", error)
            await self.make()
            return await write()
