"""The daemon as containerd's snapshotter: socket, snapshots and lazy images, put together."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from snapshotter.containerd import server
from snapshotter.containerd.counters import CallCounters
from snapshotter.containerd.snapshotter import Snapshotter
from snapshotter.daemon import protocol
from snapshotter.daemon.door import keep_door
from snapshotter.daemon.lazies import LazySnapshots
from snapshotter.daemon.places import Places
from snapshotter.mounts.idmap import IdmapSupport, can_idmap
from snapshotter.nursery import open_nursery

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from snapshotter.daemon.config import Config
    from snapshotter.daemon.handover import Inheritance
    from snapshotter.daemon.images import Images
    from snapshotter.daemon.open_image import OpenImage
    from snapshotter.daemon.process import Stop


class Containerd:
    """The snapshotter of this daemon, for those who ask how it is."""

    def __init__(
        self,
        config: Config,
        snapshotter: Snapshotter,
        lazies: LazySnapshots,
        counters: CallCounters,
        idmapped: IdmapSupport,
    ) -> None:
        self._config = config
        self._snapshotter = snapshotter
        self._lazies = lazies
        self._counters = counters
        self._idmapped = idmapped

    def snapshots(self) -> dict[str, int]:
        """How many snapshots there are of images' layers, by the images' digests."""
        return self._lazies.claimed()

    async def status(self) -> protocol.ContainerdStatus:
        """What there is, and what could not be lazy and why."""
        stats = await self._snapshotter.stats()
        return protocol.ContainerdStatus(
            address=str(self._config.socket),
            lazy_layers=stats.lazy_layers,
            ordinary_layers=stats.ordinary_layers,
            containers=stats.containers,
            views=stats.views,
            without_labels=stats.fallbacks.get("no-labels", 0),
            idmapped=self._idmapped.reason,
            images=[_image(*shown) for shown in self._lazies.open_images()],
            fallbacks=[
                protocol.Fallback(
                    reference=fallback.reference,
                    image=fallback.image,
                    kind=fallback.kind,
                    reason=fallback.reason,
                    count=fallback.layers,
                    at_ns=fallback.latest_ns,
                )
                for fallback in await self._snapshotter.fallbacks()
            ],
            calls=[
                protocol.Calls(
                    method=call.method, code=call.code, count=call.count, seconds=call.seconds
                )
                for call in self._counters.snapshot()
            ],
        )


@asynccontextmanager
async def serve_containerd(
    config: Config, images: Images, inheritance: Inheritance, stop: Stop
) -> AsyncIterator[Containerd]:
    """Answer containerd on its socket for as long as the block runs. Raises FirstByteError.

    What an earlier daemon has left half done is cleaned up first. At the end `stop` says whether
    socket and images stay for a successor.
    """
    places = Places(config.root, config.state)
    lazies = LazySnapshots(images, config.images)
    snapshotter = await trio.to_thread.run_sync(
        Snapshotter, config.root, lazies, places.state / "idmapped"
    )
    counters = CallCounters()
    try:
        await snapshotter.recover()
        images.claims.append(lazies.claimed)
        idmapped = await trio.to_thread.run_sync(can_idmap, places.mount)
        listener = await trio.to_thread.run_sync(inheritance.containerd_listener, config.socket)
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(_open_images, lazies, images)
                await nursery.start(
                    lambda task_status: server.serve(
                        snapshotter, places.grpc, counters=counters, task_status=task_status
                    )
                )
                nursery.start_soon(keep_door, listener, places.grpc)
                yield Containerd(config, snapshotter, lazies, counters, idmapped)
                nursery.cancel_scope.cancel()
        finally:
            if stop.leaves:
                listener.socket.close()
            else:
                inheritance.close_containerd_listener(listener, config.socket)
    finally:
        with trio.CancelScope(shield=True):
            if not stop.leaves:
                await trio.to_thread.run_sync(snapshotter.unmount)
                await lazies.close()
            await trio.to_thread.run_sync(snapshotter.close)


async def _open_images(lazies: LazySnapshots, images: Images) -> None:
    """Open what there are snapshots of; what else a predecessor had open is of no use."""
    await lazies.open_all()
    await images.close_unused()


def _image(image: OpenImage, snapshots: int) -> protocol.ImageStatus:
    state = "local" if image.local else "serving"
    return protocol.ImageStatus(
        reference=image.resolved.name,
        digest=image.digest,
        state="quarantined" if image.quarantined else state,
        layers=len(image.layers),
        snapshots=snapshots,
        mode=image.shown.mode.value,
        why=image.shown.why,
        local_bytes=image.fill.done_bytes,
        total_bytes=image.fill.total_bytes,
        problem=image.fill.problem,
    )
