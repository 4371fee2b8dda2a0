"""How an open image becomes fully local: the background download, and the proof at its end."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError, IntegrityError
from snapshotter.images.discovery import Trust
from snapshotter.images.proof import prove_tree
from snapshotter.store.layer import held

if TYPE_CHECKING:
    from collections.abc import Iterable

    from snapshotter.daemon.knowledge import Knowledge
    from snapshotter.daemon.open_image import OpenImage
    from snapshotter.daemon.showing import Showing, Shown
    from snapshotter.daemon.spool import Spool

log = logging.getLogger(__name__)


class Completion:
    """For all images of the daemon, and the trio thread."""

    def __init__(self, knowledge: Knowledge, showing: Showing) -> None:
        self._knowledge = knowledge
        self._showing = showing
        self._proofs = trio.CapacityLimiter(1)  # each takes a core for up to seconds

    async def run(self, image: OpenImage, spool: Spool) -> None:
        """Make an image local in the background, and again when some of it was evicted. It is
        served whatever becomes of this."""
        try:
            with image.scope:
                for number, layer in enumerate(image.layers):
                    await trio.to_thread.run_sync(spool.pour, number, layer.stored)
                spool.close()
                while True:
                    if not image.local:
                        await image.fill.run()
                        if image.fill.fully_local.is_set() and not await self._prove(image):
                            continue
                    diminished = image.diminished
                    image.settled.set()
                    await diminished.wait()
        except Exception:
            log.exception("the background download of %s has ended", image.view.reference)
        finally:
            spool.close()
            image.settled.set()
            image.diminished.set()

    async def _prove(self, image: OpenImage) -> bool:
        """The layers are the image's; is the tree theirs? Only a stranger's index is asked. False
        if some of it was evicted before it could be.

        The index of lower layers was made here from their bytes, which are proven by now.
        """
        if image.found.trust is not Trust.LOCAL and image.is_whole:
            try:
                path = self._knowledge.path_of(image.found.index)
                raw_paths = [layer.stored.raw_path for layer in image.layers]
                async with self._proofs:
                    with held(layer.stored for layer in image.layers):
                        if not all(layer.stored.complete for layer in image.layers):
                            return False
                        await prove_tree(path, raw_paths, image.view.reference)
            except IntegrityError as error:
                log.error("%s", error)
                self.quarantine(image.shown, image.manifests, error)
                return True
            except FirstByteError as error:
                log.warning("%s", error)
                image.fill.problem = str(error)
                return True
            image.found = replace(image.found, trust=Trust.LOCAL)
            await self.keep(image)
        image.become_local()
        log.info("all of %s is on this node", image.view.reference)
        return True

    async def keep(self, image: OpenImage) -> None:
        """An image that cannot be recorded is served all the same."""
        try:
            for resolved in list(image.manifests.values()):
                await self._knowledge.remember(resolved, image.found)
        except FirstByteError as error:
            log.warning("%s is open, but not recorded: %s", image.view.reference, error)

    def quarantine(self, shown: Shown, manifests: Iterable[str], error: IntegrityError) -> None:
        """Serve nothing of an image any more whose file index has lied about it."""
        self._showing.refuse(shown, error)
        for digest in manifests:
            self._knowledge.disown(digest, shown.index.digest)
