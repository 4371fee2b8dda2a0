"""What an open image is made of: layers of the store that fetch what is missing, and a view."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import trio

from snapshotter.daemon.open_image import OpenImage
from snapshotter.daemon.records import ViewRecord
from snapshotter.fetch.fill import ImageFill
from snapshotter.fetch.layer import LazyLayer
from snapshotter.fetch.source import ImageLayerSource
from snapshotter.images.discovery import FoundIndex, Trust

if TYPE_CHECKING:
    from snapshotter.daemon.completion import Completion
    from snapshotter.daemon.room import Room
    from snapshotter.daemon.showing import Showing
    from snapshotter.fetch.scheduler import Scheduler
    from snapshotter.fetch.startup import StartupRecorder
    from snapshotter.fetch.trace import StartTrace
    from snapshotter.registry.image import ImageSource, ResolvedImage
    from snapshotter.store.layers import LayerStore

log = logging.getLogger(__name__)

_LOWER = ".lower"  # ends the names of views that show only the lower layers of an image


class Opener:
    """For all images of the daemon, and the trio thread."""

    def __init__(
        self,
        store: LayerStore,
        showing: Showing,
        scheduler: Scheduler,
        completion: Completion,
        room: Room,
    ) -> None:
        self._store = store
        self._showing = showing
        self._scheduler = scheduler
        self._completion = completion
        self._room = room

    async def open(
        self,
        resolved: ResolvedImage,
        source: ImageSource,
        found: FoundIndex,
        recorder: StartupRecorder | None,
        trace: StartTrace,
        *,
        plain_http: bool,
    ) -> OpenImage:
        """An image, or its lower layers if that is what the index is of, shown and served, and used
        by one. First touches go to `recorder`. Raises FirstByteError.
        """
        index = found.index
        stored = await self._room.written(
            partial(trio.to_thread.run_sync, self._store.open_all, index.layers)
        )
        layers = [
            LazyLayer(
                table,
                stored[number],
                ImageLayerSource(source, resolved.manifest.layers[number], index, number),
                self._scheduler,
                recorder=recorder,
                trace=trace,
                number=number,
            )
            for number, table in enumerate(index.layers)
        ]
        whole = len(layers) == len(resolved.manifest.layers)
        try:
            shown = await self._showing.add(
                index.digest.hex() + ("" if whole else _LOWER),
                resolved.name,
                index,
                layers,
                lambda names: ViewRecord(
                    image=resolved.descriptor.digest,
                    depth=len(layers),
                    plain_http=plain_http,
                    names=names,
                ),
            )
        except BaseException:
            for layer in layers:
                layer.close()
            raise
        manifests = {resolved.descriptor.digest: resolved}
        fill = ImageFill(
            layers,
            self._scheduler,
            # Not of the image, which has this: files of a closed one would stay open, and on the
            # disk although deleted, until the garbage collector looks for cycles.
            quarantine=lambda _, error: self._completion.quarantine(shown, manifests, error),
        )
        local = found.trust is Trust.LOCAL and await trio.to_thread.run_sync(
            lambda: all(layer.stored.proven for layer in layers)
        )
        if local and recorder is not None:
            recorder.stop()  # the kernel reads from the disk, and we see next to nothing
        image = OpenImage(
            manifests,
            source,
            found,
            shown,
            layers,
            fill,
            trace,
            recorder,
            plain_http=plain_http,
            local=local,
        )
        if recorder is not None:
            trace.touches = recorder.touches
        log.info(
            "opened %s: %s, %d of %d layers, %d inodes, file index sha256:%s (%s)",
            resolved.name,
            image.digest,
            len(layers),
            len(resolved.manifest.layers),
            index.tree.inode_count,
            index.digest.hex(),
            found.trust.value,
        )
        return image
