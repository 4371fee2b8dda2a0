"""A store and a scheduler, and layers to read through them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio.testing import wait_all_tasks_blocked

from snapshotter.fetch.layer import LazyLayer
from snapshotter.fetch.scheduler import Patience, Scheduler, open_scheduler
from snapshotter.store.layers import LayerStore
from snapshotter.store.space import UNBOUNDED, Bounds
from tests.support.sources import Fault, MemorySource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from snapshotter.fetch.trace import StartTrace
    from tests.support.blobs import MadeLayer


@dataclass
class Node:
    store: LayerStore
    scheduler: Scheduler

    def mount(self, layer: MadeLayer, *faults: Fault | None) -> tuple[LazyLayer, MemorySource]:
        """The layer as an image of its own has it, with a source of its own."""
        source = MemorySource(layer, faults=list(faults))
        return self.attach(layer, source), source

    def attach(
        self, layer: MadeLayer, source: MemorySource, trace: StartTrace | None = None
    ) -> LazyLayer:
        stored = self.store.open(layer.table)
        return LazyLayer(layer.table, stored, source, self.scheduler, trace=trace)

    async def quiet(self) -> None:
        """Let runs end that nobody waits for: a thread may still be decoding for one."""
        for _ in range(1000):
            if not self.scheduler.wants.layers():
                break
            await wait_all_tasks_blocked(cushion=0.005)


@asynccontextmanager
async def open_node(
    root: Path, patience: Patience | None = None, bounds: Bounds = UNBOUNDED
) -> AsyncIterator[Node]:
    with LayerStore(root, bounds) as store:
        async with open_scheduler(patience or Patience()) as scheduler:
            yield Node(store, scheduler)
