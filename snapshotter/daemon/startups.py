"""The start of an image: what earlier ones touched is brought, what it touches is recorded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError
from index.profile import Profile
from snapshotter.registry.chain import chain_ids
from snapshotter.store.profiles import ProfileStore

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.daemon.open_image import OpenImage
    from snapshotter.fetch.scheduler import Scheduler
    from snapshotter.fetch.startup import StartupRecorder

log = logging.getLogger(__name__)


class Startups:
    """For all images of the daemon, and the trio thread."""

    def __init__(self, root: Path, scheduler: Scheduler) -> None:
        """Raises StoreError."""
        self._profiles = ProfileStore(root)
        self._scheduler = scheduler

    async def run(self, image: OpenImage, recorder: StartupRecorder | None) -> None:
        """Help an image that was opened to start, until it has, or until it is closed."""
        chains = chain_ids(image.resolved.config.rootfs.diff_ids)
        if not chains:
            return
        try:
            with image.starting:
                await self._replay(image, chains[-1])
                if recorder is not None:
                    await recorder.settled()
        finally:
            if recorder is not None:
                recorder.stop()
                with trio.CancelScope(shield=True):
                    await self._keep(image, chains[-1], recorder)

    async def _replay(self, image: OpenImage, chain_id: str) -> None:
        """Ask for what earlier starts on this node touched."""
        if image.local:
            return
        profile = await trio.to_thread.run_sync(self._profiles.get, chain_id)
        tables = [layer.table for layer in image.layers]
        if profile is None or [table.diff_id for table in tables] != [*profile.diff_ids]:
            return
        known = [touch for touch in profile.likely if touch.chunk < tables[touch.layer].chunk_count]
        self._scheduler.replay((image.layers[touch.layer].origin, touch.chunk) for touch in known)
        log.info("%s: asked for %d chunks of earlier starts", image.view.reference, len(known))

    async def _keep(self, image: OpenImage, chain_id: str, recorder: StartupRecorder) -> None:
        """Add a run to the image's profile. An image is served whether this works or not."""
        if not recorder.touches:
            return
        run = Profile(
            tuple(layer.table.diff_id for layer in image.layers),
            tuple(recorder.touches),
            name=image.view.reference,
        )
        try:
            await trio.to_thread.run_sync(self._profiles.add, chain_id, run)
        except FirstByteError as error:
            log.warning("the startup profile of %s is not kept: %s", image.view.reference, error)
            return
        log.info("%s: its start touched %d chunks", image.view.reference, len(recorder.touches))
