"""Keeps the store within its bounds, and clean: what goes, when it goes, and who is told.

What nobody uses goes as a whole, longest unused first; when that is not enough, the coldest chunks
of what is in use (`store/space.py` has the marks). Everything that is in use is known to `Images`,
or the kernel has it open (`store/leases.py`).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import trio

from snapshotter.daemon import protocol
from snapshotter.daemon.usage import disk_usage, listed, remove_leftover
from snapshotter.store.collection import Plan, Why, plan
from snapshotter.store.errors import StoreError
from snapshotter.store.inventory import Inventory, is_temporary, kernel_uses, survey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from snapshotter.daemon.images import Images
    from snapshotter.store.layers import LayerStore

log = logging.getLogger(__name__)

_POLL = 0.25
"""Seconds between two looks at the counters: no disk is asked for them."""

_MEASURE = 30.0
"""Seconds between two measurements when little happens. Others fill the disk, too."""

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 10.0
"""Seconds between two attempts to make room, doubled while there is nothing to free: each one looks
at the whole store."""

_LITTLE = 16 << 20
"""Bytes that are freed for an image that is being opened: the file index of most is smaller."""

_TOUCH = 3600.0
"""Seconds between two notes on disk that what is open is used."""


class Housekeeping:
    """For all of the daemon's store, and the trio thread."""

    def __init__(self, store: LayerStore, images: Images) -> None:
        self._store = store
        self._images = images
        self._space = store.space
        self._working = trio.Lock()
        self._can_drop_chunks = True
        images.room.make = self._squeeze

    async def run(self) -> None:
        """Keep house until cancelled. What the disk refuses is logged, and tried again."""
        measured = touched = trio.current_time()
        pause, over = _FIRST_PAUSE, False
        await self._attempt(first=True)
        while True:
            await trio.sleep(_POLL)
            self._space.tick()
            now = trio.current_time()
            if now - touched >= _TOUCH:
                touched = now
                await trio.to_thread.run_sync(self._store.touch_open)
            if self._space.over_trigger and not over:
                pause = _FIRST_PAUSE  # reads need room, and not just fill
            over = self._space.over_trigger
            pressed = over or self._space.wanted
            if now - measured >= (pause if pressed else _MEASURE):
                freed = await self._attempt()
                pause = _FIRST_PAUSE if freed else min(_LONGEST_PAUSE, 2 * pause)
                measured = trio.current_time()

    async def _attempt(self, *, first: bool = False) -> bool:
        """Whether anything was freed."""
        before = self._space.evicted_bytes
        try:
            await self.make_room(collect=first)
        except StoreError as error:
            log.error("%s", error)
        return self._space.evicted_bytes > before

    async def make_room(self, *, collect: bool = False) -> None:
        """Free what the marks ask for, as far as that is possible; with `collect` also what nothing
        names. Raises StoreError.
        """
        async with self._working:
            space = self._space
            wanted, space.wanted = space.wanted, 0
            await trio.to_thread.run_sync(space.measure)
            excess = space.used - max(0, space.marks.fill - wanted)
            if excess > 0 or collect:
                await self._carry_out(*await self._plan(excess))
            if space.over_trigger and self._can_drop_chunks:
                await self._drop_chunks(space.used - space.marks.target)

    async def _squeeze(self) -> None:
        """Free a little, on a disk that is full, for who opens an image and has locked it: no image
        is forgotten here. Raises StoreError."""
        self._space.note_full()
        inventory, found = await self._plan(_LITTLE)
        removed = await trio.to_thread.run_sync(self._store.remove, list(found.layers))
        self._space.evicted_bytes += sum(inventory.layers[key].disk for key in removed)
        if not removed and self._can_drop_chunks:
            await self._drop_chunks(_LITTLE)

    async def collect(self, *, everything: bool, dry_run: bool) -> protocol.Collected:
        """Delete what nothing names, and what the bounds ask for; with `everything` all that is not
        in use. With `dry_run` only say what would go. Raises StoreError.
        """
        async with self._working:
            await trio.to_thread.run_sync(self._space.measure)
            before = self._space.used
            excess = None if everything else before - self._space.marks.fill
            inventory, found = await self._plan(excess)
            if not dry_run:
                await self._carry_out(inventory, found)
            return protocol.Collected(
                garbage=listed(inventory, found), freed=before - self._space.used
            )

    async def usage(self, users: Mapping[str, Sequence[str]]) -> protocol.DiskUsage:
        """What takes how much; `users` are those of images, by digest. Raises StoreError."""
        async with self._working:
            await trio.to_thread.run_sync(self._space.measure)
            inventory = await trio.to_thread.run_sync(survey, self._store.root)
            return await trio.to_thread.run_sync(
                disk_usage, inventory, self._images.in_use(), users, self._space
            )

    def status(self) -> protocol.StoreStatus:
        """How it is."""
        space = self._space
        return protocol.StoreStatus(
            used=space.used,
            limit=space.marks.most,
            free=space.free,
            evicted=space.evicted_bytes,
            problem=space.problem,
        )

    async def _plan(self, excess: int | None) -> tuple[Inventory, Plan]:
        root = self._store.root
        inventory = await trio.to_thread.run_sync(survey, root)
        in_use = self._images.in_use()  # asked last: what came meanwhile is in no inventory
        found = await trio.to_thread.run_sync(
            partial(
                plan,
                inventory,
                in_use,
                excess,
                kernel_uses=partial(kernel_uses, root),
                leftover=lambda path: not is_temporary(path),  # it may be ours, just now
            )
        )
        return inventory, found

    async def _carry_out(self, inventory: Inventory, found: Plan) -> None:
        """Delete what goes, unless somebody has begun to use it meanwhile."""
        names = {one.record.manifest_digest: one.record.reference for one in inventory.images}
        for path in found.leftovers:
            await trio.to_thread.run_sync(remove_leftover, path)
        removed = await trio.to_thread.run_sync(self._store.remove, list(found.layers))
        for key in removed:
            log.info("layer %s is deleted: %s", key.hex(), found.layers[key].value)
            self._space.evicted_bytes += inventory.layers[key].disk
        for digest, why in found.images.items():
            await self._images.forget(digest)
            log.info("%s is forgotten: %s", names[digest], why.value)
        for index, why in found.indexes.items():
            if why is Why.UNNAMED:
                await self._images.forget_index(index)
        if found:
            await trio.to_thread.run_sync(self._space.measure)

    async def _drop_chunks(self, size: int) -> None:
        try:
            lost = await trio.to_thread.run_sync(self._store.evict_chunks, size)
        except StoreError as error:
            log.error("only whole layers can be evicted from now on: %s", error)
            self._can_drop_chunks = False
            return
        if lost:
            log.info("chunks of %d layers that were in use have been evicted", len(lost))
        self._images.diminish(lost)
