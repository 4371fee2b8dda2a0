"""The images that are open on this node: resolved, indexed, shown, filled, closed.

One image is open once, however many directories show it: the mounts share view, page cache and
fetches. It is named by its manifest's digest.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError, IntegrityError, about
from snapshotter.daemon.knowledge import Knowledge
from snapshotter.daemon.protocol import Progress
from snapshotter.daemon.spool import Spool
from snapshotter.fetch.fill import ImageFill
from snapshotter.fetch.layer import LazyLayer
from snapshotter.fetch.source import ImageLayerSource
from snapshotter.fuse import session
from snapshotter.fuse.view import View
from snapshotter.images.discovery import FoundIndex, Trust, accept, find_index
from snapshotter.images.indexing import build_index
from snapshotter.images.proof import prove_tree
from snapshotter.registry.credentials import CredentialStore
from snapshotter.registry.locations import Locations
from snapshotter.registry.platform import Platform

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from index.file import FileIndex
    from snapshotter.daemon.records import Records
    from snapshotter.fetch.scheduler import Scheduler
    from snapshotter.fetch.stats import FetchStats
    from snapshotter.fuse.view import Views
    from snapshotter.registry.image import ImageSource, ResolvedImage
    from snapshotter.registry.transport import Transport
    from snapshotter.store.layers import LayerStore

log = logging.getLogger(__name__)


class OpenImage:
    """An image that is shown in the FUSE mount. Made and closed by `Images` alone.

    `settled` is set when the background fill has ended: all of the image is here, or it is in
    quarantine, or it was closed.
    """

    def __init__(self, digest: str, view: View, layers: list[LazyLayer], fill: ImageFill) -> None:
        self.digest = digest
        self.view = view
        self.layers = layers
        self.fill = fill
        self.users = 1
        self.settled = trio.Event()
        self.scope = trio.CancelScope()

        self.local = False
        """Whether every chunk is here, and layers and tree are proven to be the image's."""

    @property
    def quarantined(self) -> bool:
        """Whether the image turned out not to be what its file index says."""
        return self.view.refusal is not None


class Images:
    """All open images of the daemon, by digest. For the trio thread."""

    def __init__(
        self,
        root: Path,
        views: Views,
        records: Records,
        store: LayerStore,
        scheduler: Scheduler,
        transport: Transport,
        nursery: trio.Nursery,
    ) -> None:
        """Background work runs in `nursery`. Raises StoreError."""
        self._root = root
        self._views = views
        self._records = records
        self._store = store
        self._scheduler = scheduler
        self._transport = transport
        self._nursery = nursery
        self._credentials = CredentialStore()
        self._knowledge = Knowledge(root)
        self._open: dict[str, OpenImage] = {}
        self._opening: defaultdict[str, trio.Lock] = defaultdict(trio.Lock)

    @property
    def stats(self) -> FetchStats:
        """What fetching has cost since the daemon's start."""
        return self._scheduler.stats

    async def acquire(
        self,
        reference: str,
        platform: str,
        *,
        plain_http: bool,
        index: Path | None,
        report: Callable[[Progress], None],
    ) -> OpenImage:
        """Open an image, or share it if it is open already; `release` it once.

        `plain_http` false leaves the choice to the custom of container tools. `index` is a file
        with the image's index; None looks for one. Raises
        FirstByteError if the image cannot be found, or not be read.
        """
        wanted = Platform.parse(platform) if platform else Platform.host()
        locations = Locations(self._transport, self._credentials, plain_http=plain_http or None)
        source = locations.source(reference)
        resolved = await self._knowledge.resolve(reference)
        if resolved is None:
            resolved = await source.resolve(wanted)
        digest = resolved.descriptor.digest
        async with self._opening[digest]:
            image = self._open.get(digest)
            if image is None:
                image = self._open[digest] = await self._make(source, resolved, index, report)
            else:
                image.users += 1
        return image

    async def release(self, image: OpenImage) -> None:
        """One user less; the last one closes it. Nothing of it may be bound anywhere then."""
        image.users -= 1
        if image.users:
            return
        del self._open[image.digest]
        self._views.remove(image.view)
        image.scope.cancel()
        for layer in image.layers:
            layer.close()
        await session.forget_name(image.view.name)
        log.info("closed %s", image.view.reference)

    async def _make(
        self,
        source: ImageSource,
        resolved: ResolvedImage,
        index_file: Path | None,
        report: Callable[[Progress], None],
    ) -> OpenImage:
        """Find or build the index, open the layers, show the view, start to fill."""
        digest = resolved.descriptor.digest
        spool = Spool(self._root)
        try:
            if index_file is not None:
                found = await self._given(resolved, index_file)
            else:
                found = await self._knowledge.index_of(resolved) or await self._find(
                    source, resolved, spool, report
                )
            index = found.index
            slot = await trio.to_thread.run_sync(self._records.take_slot)
        except BaseException:
            spool.close()
            raise
        layers: list[LazyLayer] = []
        try:
            for number, table in enumerate(index.layers):
                blob = ImageLayerSource(source, resolved.manifest.layers[number], index, number)
                stored = await trio.to_thread.run_sync(self._store.open, table)
                layers.append(LazyLayer(table, stored, blob, self._scheduler))
        except BaseException:
            spool.close()
            for layer in layers:
                layer.close()
            raise
        view = View(
            name=digest.removeprefix("sha256:").encode(),
            slot=slot,
            reference=resolved.name,
            image=index.tree,
            layers=layers,
            raw_size=sum(table.raw_size for table in index.layers),
        )

        fill = ImageFill(
            layers,
            self._scheduler,
            quarantine=lambda _, error: self._quarantine(view, digest, index, error),
        )
        image = OpenImage(digest, view, layers, fill)
        self._views.add(view)
        self._nursery.start_soon(self._fill, image, resolved, found, spool)
        log.info(
            "opened %s: %s, %d layers, %d inodes, file index sha256:%s (%s)",
            resolved.name,
            digest,
            len(layers),
            index.tree.inode_count,
            index.digest.hex(),
            found.trust.value,
        )
        return image

    async def _given(self, resolved: ResolvedImage, path: Path) -> FoundIndex:
        data = await trio.Path(path).read_bytes()
        with about(str(path)):
            index = await trio.to_thread.run_sync(accept, data, resolved)
        return FoundIndex(await self._knowledge.keep_index(index), Trust.GIVEN)

    async def _find(
        self,
        source: ImageSource,
        resolved: ResolvedImage,
        spool: Spool,
        report: Callable[[Progress], None],
    ) -> FoundIndex:
        """The index from the registry, or one that is built here by reading every layer."""
        found = await find_index(source, resolved)
        if found is None:
            size = sum(layer.size for layer in resolved.manifest.layers)
            log.info(
                "%s has no file index: reading all %d bytes of it to build one", resolved.name, size
            )
            index = await build_index(
                source,
                resolved,
                on_progress=lambda done: report(Progress("building the file index", done, size)),
                on_raw=spool.writer,
            )
            found = FoundIndex(index, Trust.LOCAL)
        return FoundIndex(await self._knowledge.keep_index(found.index), found.trust)

    async def _fill(
        self,
        image: OpenImage,
        resolved: ResolvedImage,
        found: FoundIndex,
        spool: Spool,
    ) -> None:
        """Make an image local in the background. It is served whatever becomes of this."""
        try:
            with image.scope:
                for number, layer in enumerate(image.layers):
                    await trio.to_thread.run_sync(spool.pour, number, layer.stored)
                await self._knowledge.remember(resolved, found)
                await image.fill.run()
                if image.fill.fully_local.is_set():
                    await self._prove(image, resolved, found)
        except Exception:
            log.exception("the background download of %s has ended", resolved.name)
        finally:
            spool.close()
            image.settled.set()

    async def _prove(self, image: OpenImage, resolved: ResolvedImage, found: FoundIndex) -> None:
        """The layers are the image's; is the tree theirs? Only a stranger's index is asked."""
        if found.trust is not Trust.LOCAL:
            try:
                path = self._knowledge.path_of(found.index)
                raw_paths = [layer.stored.raw_path for layer in image.layers]
                await prove_tree(path, raw_paths, resolved.name)
            except IntegrityError as error:
                log.error("%s", error)
                self._quarantine(image.view, image.digest, found.index, error)
                return
            except FirstByteError as error:
                log.warning("%s", error)
                image.fill.problem = str(error)
                return
            await self._knowledge.remember(resolved, FoundIndex(found.index, Trust.LOCAL))
        image.local = True
        log.info("all of %s is on this node", resolved.name)

    def _quarantine(self, view: View, digest: str, index: FileIndex, error: IntegrityError) -> None:
        """Serve nothing of an image any more whose file index has lied about it."""
        view.refusal = error
        self._knowledge.disown(digest, index.digest)
