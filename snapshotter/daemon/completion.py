"""How an open image becomes fully local: the background download, and the proof at its end."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError, IntegrityError
from snapshotter.images.discovery import Trust
from snapshotter.images.proof import prove_tree

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
        """Make an image local in the background. It is served whatever becomes of this."""
        try:
            with image.scope:
                for number, layer in enumerate(image.layers):
                    await trio.to_thread.run_sync(spool.pour, number, layer.stored)
                if image.local:
                    return
                await image.fill.run()
                if image.fill.fully_local.is_set():
                    await self._prove(image)
        except Exception:
            log.exception("the background download of %s has ended", image.view.reference)
        finally:
            spool.close()
            image.settled.set()

    async def _prove(self, image: OpenImage) -> None:
        """The layers are the image's; is the tree theirs? Only a stranger's index is asked.

        The index of lower layers was made here from their bytes, which are proven by now.
        """
        if image.found.trust is not Trust.LOCAL and image.is_whole:
            try:
                path = self._knowledge.path_of(image.found.index)
                raw_paths = [layer.stored.raw_path for layer in image.layers]
                async with self._proofs:
                    await prove_tree(path, raw_paths, image.view.reference)
            except IntegrityError as error:
                log.error("%s", error)
                self.quarantine(image.shown, image.manifests, error)
                return
            except FirstByteError as error:
                log.warning("%s", error)
                image.fill.problem = str(error)
                return
            image.found = replace(image.found, trust=Trust.LOCAL)
            await self.keep(image)
        image.local = True
        log.info("all of %s is on this node", image.view.reference)

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
