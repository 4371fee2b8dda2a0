"""The images that are open on this node: resolved, indexed, shown, filled, closed.

One image is open once, however many directories and containers show it: they share view, page cache
and fetches. It is keyed by its file index's digest and not by its manifest's or its chain of
diffIDs, because those are only what an image says of itself until all of it is here: an image that
lies about its layers is shown where no honest one is.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import trio

from index.errors import FirstByteError, IntegrityError, about
from snapshotter.daemon.errors import NoIndexError
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
from snapshotter.images.prefix import build_prefix
from snapshotter.images.proof import prove_tree
from snapshotter.registry.platform import Platform

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from snapshotter.daemon.records import Records
    from snapshotter.fetch.scheduler import Scheduler
    from snapshotter.fetch.stats import FetchStats
    from snapshotter.fuse.view import Views
    from snapshotter.registry.image import ImageSource, ResolvedImage
    from snapshotter.registry.locations import Locations
    from snapshotter.store.layers import LayerStore

log = logging.getLogger(__name__)

_LOWER = b".lower"  # ends the names of views that show only the lower layers of an image


class OpenImage:
    """An image, or the lower layers of one, shown in the FUSE mount. Made and closed by `Images`.

    `manifests` are those that it is the image of, by digest: they may differ in anything but their
    layers. `settled` is set when the background fill has ended: all of the image is here, or it is
    in quarantine, or it was closed.
    """

    def __init__(
        self,
        resolved: ResolvedImage,
        source: ImageSource,
        found: FoundIndex,
        view: View,
        layers: list[LazyLayer],
        fill: ImageFill,
    ) -> None:
        self.manifests = {resolved.descriptor.digest: resolved}
        self.source = source
        self.found = found
        self.view = view
        self.layers = layers
        self.fill = fill
        self.users = 1
        self.settled = trio.Event()
        self.scope = trio.CancelScope()

        self.local = False
        """Whether every chunk is here, and layers and tree are proven to be the image's."""

    @property
    def resolved(self) -> ResolvedImage:
        """The first of `manifests`."""
        return next(iter(self.manifests.values()))

    @property
    def digest(self) -> str:
        return self.resolved.descriptor.digest

    @property
    def is_whole(self) -> bool:
        """Whether these are all layers of the image."""
        return len(self.layers) == len(self.resolved.manifest.layers)

    @property
    def quarantined(self) -> bool:
        """Whether the image turned out not to be what its file index says."""
        return self.view.refusal is not None


class Images:
    """All open images of the daemon, by their file index's digest. For the trio thread."""

    def __init__(
        self,
        root: Path,
        views: Views,
        records: Records,
        store: LayerStore,
        scheduler: Scheduler,
        locate: Callable[[bool | None], Locations],
        nursery: trio.Nursery,
        *,
        trusted: Collection[Trust],
    ) -> None:
        """`locate` opens registries, given `plain_http`. Indexes are believed if they come in one
        of the `trusted` ways. Background work runs in `nursery`. Raises StoreError.
        """
        self._root = root
        self._views = views
        self._records = records
        self._store = store
        self._scheduler = scheduler
        self._locate = locate
        self._nursery = nursery
        self._trusted = trusted
        self._knowledge = Knowledge(root)
        self._open: dict[tuple[bytes, bool], OpenImage] = {}  # index digest, whether all layers
        self._opening: WeakValueDictionary[object, trio.Lock] = WeakValueDictionary()

    @property
    def stats(self) -> FetchStats:
        """What fetching has cost since the daemon's start."""
        return self._scheduler.stats

    async def acquire(
        self,
        reference: str,
        platform: str = "",
        *,
        plain_http: bool = False,
        index: Path | None = None,
        may_build: bool = True,
        report: Callable[[Progress], None] = lambda _: None,
    ) -> OpenImage:
        """Open an image, or share it if it is open already; `release` it once.

        `plain_http` false leaves the choice to the configuration of hosts. `index` is a file with
        the image's index; None looks for one and, if `may_build`, builds one. Raises
        NoIndexError if there is none, other FirstByteErrors if the image cannot be found or read.
        """
        wanted = Platform.parse(platform) if platform else Platform.host()
        source = self._locate(plain_http or None).source(reference)
        resolved = await self._knowledge.resolve(reference)
        if resolved is None:
            resolved = await source.resolve(wanted)
        digest = resolved.descriptor.digest
        async with self._one_at_a_time(digest):
            image = self.having(digest)
            if image is not None:
                image.users += 1
                return image
            spool = Spool(self._root)
            try:
                if index is not None:
                    found = await self._given(resolved, index)
                else:
                    found = await self._knowledge.index_of(resolved) or await self._find(
                        source, resolved, spool, report, may_build=may_build
                    )
                return await self._share(resolved, source, found, spool)
            except BaseException:
                spool.close()
                raise

    async def acquire_lower(self, image: OpenImage, depth: int) -> OpenImage:
        """Open the lower `depth` layers of an open image, merged; `release` it once.

        The first time on this node their headers are read, which may mean fetching them. Raises
        FirstByteError.
        """
        if depth == len(image.layers):
            image.users += 1
            return image
        async with self._one_at_a_time((image.digest, depth)):
            index = await self._knowledge.prefix_of(image.digest, depth)
            if index is None:
                built = await build_prefix(image.found.index, image.layers, depth)
                index = await self._knowledge.keep_prefix(image.digest, depth, built)
            found = FoundIndex(index, image.found.trust)
            return await self._share(image.resolved, image.source, found, Spool(self._root))

    def having(self, digest: str) -> OpenImage | None:
        """The open image of a manifest, all of it, if it is open."""
        for image in self._open.values():
            if digest in image.manifests and image.is_whole:
                return image
        return None

    async def keep(self, image: OpenImage) -> None:
        """Make what the node knows of an image durable: it can be opened without network then.

        Raises StoreError.
        """
        for resolved in list(image.manifests.values()):
            await self._knowledge.remember(resolved, image.found)

    async def reference_of(self, digest: str) -> str | None:
        """What to open an image by that this node has had before, or None if it has not."""
        return await self._knowledge.reference_of(digest)

    def disk_usage(self, content_key: bytes) -> int:
        """Bytes of disk that a layer's data takes now. Blocks."""
        return self._store.usage_of(content_key)

    async def release(self, image: OpenImage) -> None:
        """One user less; the last one closes it. Nothing of it may be bound anywhere then."""
        image.users -= 1
        if image.users:
            return
        del self._open[image.found.index.digest, image.is_whole]
        self._views.remove(image.view)
        image.scope.cancel()
        for layer in image.layers:
            layer.close()
        await session.forget_name(image.view.name)
        log.info("closed %s", image.view.reference)

    async def forget(self, digest: str) -> None:
        """Delete an image from this node, unless it is open, with the data that is no other's.

        Raises StoreError.
        """
        async with self._one_at_a_time(digest):
            if self.having(digest) is None:
                in_use = [index_digest for index_digest, _ in self._open]
                await self._knowledge.forget(digest, self._store, in_use)

    def _one_at_a_time(self, name: object) -> trio.Lock:
        lock = self._opening.get(name)
        if lock is None:
            lock = self._opening[name] = trio.Lock()
        return lock

    async def _share(
        self, resolved: ResolvedImage, source: ImageSource, found: FoundIndex, spool: Spool
    ) -> OpenImage:
        """The open image of an index, opened if it is not. Owns the spool from then on."""
        index = found.index
        whole = len(index.layers) == len(resolved.manifest.layers)
        key = index.digest, whole
        async with self._one_at_a_time(key):
            image = self._open.get(key)
            if image is None:
                image = self._open[key] = await self._make(resolved, source, found)
                self._views.add(image.view)
                self._nursery.start_soon(self._fill, image, spool)
                return image
        spool.close()
        image.users += 1
        if whole:
            image.manifests[resolved.descriptor.digest] = resolved
            await self._try_to_keep(image)
        return image

    async def _make(
        self, resolved: ResolvedImage, source: ImageSource, found: FoundIndex
    ) -> OpenImage:
        index = found.index
        slot = await trio.to_thread.run_sync(self._records.take_slot)
        stored = await trio.to_thread.run_sync(self._store.open_all, index.layers)
        layers = [
            LazyLayer(
                table,
                stored[number],
                ImageLayerSource(source, resolved.manifest.layers[number], index, number),
                self._scheduler,
            )
            for number, table in enumerate(index.layers)
        ]
        whole = len(layers) == len(resolved.manifest.layers)
        view = View(
            name=index.digest.hex().encode() + (b"" if whole else _LOWER),
            slot=slot,
            reference=resolved.name,
            image=index.tree,
            layers=layers,
            raw_size=sum(table.raw_size for table in index.layers),
        )
        fill = ImageFill(
            layers,
            self._scheduler,
            quarantine=lambda _, error: self._quarantine(image, error),
        )
        image = OpenImage(resolved, source, found, view, layers, fill)
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
        *,
        may_build: bool,
    ) -> FoundIndex:
        """The index from the registry, or one that is built here by reading every layer."""
        found = await find_index(source, resolved, self._trusted)
        if found is None:
            if not may_build:
                raise NoIndexError(f"{resolved.name} has no file index that can be used")
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

    async def _fill(self, image: OpenImage, spool: Spool) -> None:
        """Make an image local in the background. It is served whatever becomes of this."""
        try:
            with image.scope:
                for number, layer in enumerate(image.layers):
                    await trio.to_thread.run_sync(spool.pour, number, layer.stored)
                if image.is_whole:
                    await self._try_to_keep(image)
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
                await prove_tree(path, raw_paths, image.view.reference)
            except IntegrityError as error:
                log.error("%s", error)
                self._quarantine(image, error)
                return
            except FirstByteError as error:
                log.warning("%s", error)
                image.fill.problem = str(error)
                return
            image.found = FoundIndex(image.found.index, Trust.LOCAL)
            await self._try_to_keep(image)
        image.local = True
        log.info("all of %s is on this node", image.view.reference)

    async def _try_to_keep(self, image: OpenImage) -> None:
        """An image that cannot be recorded is served all the same."""
        try:
            await self.keep(image)
        except FirstByteError as error:
            log.warning("%s is open, but not recorded: %s", image.view.reference, error)

    def _quarantine(self, image: OpenImage, error: IntegrityError) -> None:
        """Serve nothing of an image any more whose file index has lied about it."""
        image.view.refusal = error
        for digest in image.manifests:
            self._knowledge.disown(digest, image.found.index.digest)
