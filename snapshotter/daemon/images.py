"""The images that are open on this node: opened, shared, restored, closed.

One image is open once, however many directories and containers show it: they share view, page cache
and fetches. It is keyed by its file index's digest and not by its manifest's or its chain of
diffIDs, because those are only what an image says of itself until all of it is here: an image that
lies about its layers is shown where no honest one is.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import trio

from index.errors import FirstByteError
from snapshotter.daemon.completion import Completion
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.lookup import Lookup
from snapshotter.daemon.opener import Opener
from snapshotter.daemon.room import Room
from snapshotter.daemon.showing import Mode, Showing, Shown
from snapshotter.daemon.spool import Spool
from snapshotter.daemon.startups import Expected, Startups
from snapshotter.fetch.startup import StartupRecorder
from snapshotter.fetch.trace import StartTrace
from snapshotter.images.prefix import build_prefix
from snapshotter.nursery import open_nursery
from snapshotter.store.collection import InUse

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from pathlib import Path

    from snapshotter.daemon.knowledge import Knowledge
    from snapshotter.daemon.open_image import OpenImage
    from snapshotter.daemon.places import Places
    from snapshotter.daemon.protocol import Progress
    from snapshotter.daemon.records import Records, ViewRecord
    from snapshotter.fetch.scheduler import Scheduler
    from snapshotter.fetch.stats import FetchStats
    from snapshotter.fuse.view import Views
    from snapshotter.images.discovery import FoundIndex, Trust
    from snapshotter.registry.image import ImageSource, ResolvedImage
    from snapshotter.registry.locations import Locations
    from snapshotter.store.layers import LayerStore

log = logging.getLogger(__name__)

_TRIM_SECONDS = 10.0
"""What is read again meanwhile is in the page cache, 64 KiB a fault; a guess."""


class Images:
    """All open images of the daemon, by their file index's digest. For the trio thread."""

    def __init__(
        self,
        places: Places,
        views: Views,
        records: Records,
        store: LayerStore,
        knowledge: Knowledge,
        scheduler: Scheduler,
        locate: Callable[[bool | None], Locations],
        nursery: trio.Nursery,
        *,
        trusted: Collection[Trust],
        mode: Mode | None,
    ) -> None:
        """`locate` opens registries, given `plain_http`. Indexes are believed if they come in one
        of the `trusted` ways. `mode` is how images are shown to who does not say; None is the best
        there is. Background work runs in `nursery`.
        """
        self._root = places.root
        self._records = records
        self._store = store
        self._scheduler = scheduler
        self._locate = locate
        self._nursery = nursery
        self._mode = mode
        self._knowledge = knowledge
        self._showing = Showing(places, views, records, write_tree=self._knowledge.tree_of)
        self._completion = Completion(self._knowledge, self._showing)
        self._startups = Startups(
            places.root, scheduler, nursery, trusted=trusted, files_of=self._files_of
        )
        self.claims: list[Callable[[], Iterable[str]]] = []
        """Those who tell which images are in use, open or not, by their manifests' digests."""

        self.room = Room()
        """Where room comes from when the disk is full and an image is to be opened."""

        self._lookup = Lookup(knowledge, self.room, trusted)
        self._opener = Opener(store, self._showing, scheduler, self._completion, self.room)
        self._open: dict[tuple[bytes, bool], OpenImage] = {}  # index digest, whether all layers
        self._closed = False  # whether an image was, lately
        self._restored: list[OpenImage] = []
        self._opening: WeakValueDictionary[object, trio.Lock] = WeakValueDictionary()

    @property
    def stats(self) -> FetchStats:
        """What fetching has cost since the daemon's start."""
        return self._scheduler.stats

    @property
    def fuse_requests(self) -> int:
        """What the kernel has asked of this process."""
        return self._showing.fuse_requests

    def hold_fill(self) -> None:
        """A pull goes on: background downloads wait for its next step, which is near."""
        self._scheduler.hold_fill()

    def release_fill(self) -> None:
        """The pull is over."""
        self._scheduler.release_fill()

    def expect_start(self) -> None:
        """The pull of an image is over: a container is about to start."""
        self._scheduler.expect_start()

    async def acquire(
        self,
        reference: str,
        platform: str = "",
        *,
        plain_http: bool = False,
        index: Path | None = None,
        may_build: bool = True,
        report: Callable[[Progress], None] = lambda _: None,
    ) -> tuple[OpenImage, ResolvedImage]:
        """Open an image, or share it if it is open already; `release` it once. Returns, too, what
        the reference stands for: several images may be open as one.

        `platform` "" is the host's. `plain_http` false leaves the choice to the configuration of
        hosts. `index` is a file with the image's index; None looks for one and, if `may_build`,
        builds one. Raises NoIndexError if there is none, other FirstByteErrors if the image cannot
        be found or read.
        """
        source = self._locate(plain_http or None).source(reference)
        trace, began = StartTrace(), trio.current_time()
        named = await self._lookup.resolve(source, reference, platform)
        began = trace.step("resolve", began)
        digest = named.manifest.descriptor.digest
        async with self._one_at_a_time(digest):
            image = self.having(digest)
            if image is not None:
                image.users += 1
                return image, replace(image.manifests[digest], name=source.name)
            spool = Spool(self._root, self._store.space)
            expected = Expected(self._startups, source)
            try:
                resolved, found = await self._lookup.find(
                    source,
                    named,
                    given=index,
                    may_build=may_build,
                    on_pack=expected.expect,
                    on_raw=spool.writer,
                    report=report,
                )
                began = trace.step("file index", began)
                image = await self._share(
                    resolved,
                    source,
                    found,
                    spool,
                    trace,
                    plain_http=plain_http,
                    starts=True,
                    expected=expected,
                )
                trace.step("open", began)
            except BaseException:
                spool.close()
                raise
            finally:
                expected.close()
            return image, resolved

    async def acquire_lower(self, digest: str, depth: int) -> OpenImage:
        """Open the lower `depth` layers of an image that this node has had, merged; `release` it
        once. The image itself need not be open, and is not downloaded for it.

        The first time on this node the layers' headers are read, which may mean fetching them.
        Raises FirstByteError.
        """
        async with self._one_at_a_time((digest, depth)):
            if await self._knowledge.recall(digest, depth) is None:
                await self._build_lower(digest, depth)
            return await self._reopen(digest, depth, plain_http=False)

    async def _build_lower(self, digest: str, depth: int) -> None:
        image = self.having(digest)
        if image is None:
            image = await self._reopen(digest, None, plain_http=False, fill=False)
        else:
            image.users += 1
        try:
            built = await build_prefix(image.found.index, image.layers, depth)
            await self.room.written(partial(self._knowledge.keep_prefix, digest, depth, built))
        finally:
            with trio.CancelScope(shield=True):
                await self.release(image)

    async def _reopen(
        self,
        digest: str,
        depth: int | None,
        *,
        plain_http: bool,
        fill: bool = True,
        starts: bool = False,
    ) -> OpenImage:
        """Open the lower `depth` layers (None: all) of an image that this node has had.

        Raises DaemonError if what is needed for that is gone from the disk.
        """
        recalled = await self._knowledge.recall(digest, depth)
        if recalled is None:
            raise DaemonError(
                f"what this node knew of {digest} is gone from its disk",
                hint="remove the image and pull it again",
            )
        resolved, found = recalled
        source = self._locate(plain_http or None).source(resolved.name)
        spool = Spool(self._root, self._store.space)
        return await self._share(
            resolved,
            source,
            found,
            spool,
            StartTrace(),
            plain_http=plain_http,
            fill=fill,
            starts=starts,
        )

    async def open_known(self, digest: str) -> OpenImage:
        """Open an image that this node has had before, without any network; `release` it once.

        Raises DaemonError if it is gone from the disk.
        """
        async with self._one_at_a_time(digest):
            return await self._reopen(digest, None, plain_http=False, starts=True)

    async def restore(self) -> None:
        """Open, without any network, what a predecessor had open, in the same slots. Nobody uses it
        yet; `close_unused` closes what nobody has asked for meanwhile. `fill_restored` goes on with
        their downloads.
        """

        async def restore_one(record: ViewRecord) -> None:
            try:
                image = await self._reopen(
                    record.image, record.depth, plain_http=record.plain_http, fill=False
                )
                image.users -= 1
                self._restored.append(image)
            except FirstByteError as error:
                log.error("an image that was shown is lost: %s", error)
                await trio.to_thread.run_sync(self._records.close_view, record.names[0])

        # Half of the time goes by in waits for threads, during which another one is opened.
        async with open_nursery() as nursery:
            for record in self._records.views:
                nursery.start_soon(restore_one, record)

    async def settle(self) -> None:
        """To be called when the FUSE mount is served, before anything else asks it."""
        await self._showing.kernel.settle()
        await self._nursery.start(self._showing.kernel.clear)

    async def prepare(self) -> None:
        """Do what else the first image to be shown would wait for."""
        if self._mode is not Mode.FUSE:
            await self._showing.kernel.prepare()

    def fill_restored(self) -> None:
        """Go on with the background downloads of what was restored: readers come before."""
        for image in self._restored:
            self._nursery.start_soon(
                self._completion.run, image, Spool(self._root, self._store.space)
            )
            if image.is_whole:
                self._startups.begin(image, None, replay=True)
        self._restored.clear()

    async def keep_small(self) -> None:
        """Give back, from time to time, the memory that reading file indexes has taken, and the
        mappings of those of closed images: somebody's error may still hold them, in a circle."""
        while True:
            await trio.sleep(_TRIM_SECONDS)
            for image in self._open.values():
                image.found.index.trim()
            if self._closed:
                self._closed = False
                gc.collect()

    def all(self) -> list[OpenImage]:
        """The images that are open, those of lower layers alone left out."""
        return [image for image in self._open.values() if image.is_whole]

    @property
    def none_open(self) -> bool:
        """Whether nothing is shown."""
        return not self._open

    async def close_unused(self) -> None:
        """Close the images that were restored and that nobody uses."""
        for image in list(self._open.values()):
            if not image.users:
                await self._close(image)

    async def directory(self, image: OpenImage, wanted: Mode | None = None) -> tuple[Mode, Path]:
        """Where to find an open image, in the mode that is `wanted`, else as it is configured.

        Raises MountError, and what made the image unfit to be read.
        """
        if image.view.refusal is not None:
            raise image.view.refusal
        return await self._showing.directory(
            image.shown,
            local=image.local,
            seen=await self._startups.must_see(image),
            wanted=wanted or self._mode,
        )

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

    def in_use(self) -> InUse:
        """What must not be deleted. For a plan from what was on the disk before this is asked."""
        images = {digest for image in self._open.values() for digest in image.manifests}
        return InUse(
            images=images.union(*(claimed() for claimed in self.claims)),
            indexes={digest for digest, _ in self._open} | self._knowledge.unrecorded,
            layers=self._store.open_keys(),
        )

    def diminish(self, keys: Collection[bytes]) -> None:
        """Chunks of layers with these content keys were evicted."""
        lost = set(keys)
        for image in self._open.values():
            if not image.quarantined and any(one.stored.key in lost for one in image.layers):
                image.diminish()

    def disk_usage(self, content_key: bytes) -> int:
        """Bytes of disk that a layer's data takes now. Blocks."""
        return self._store.usage_of(content_key)

    async def release(self, image: OpenImage) -> None:
        """One user less; the last one closes it. Nothing of it may be bound anywhere then."""
        image.users -= 1
        if not image.users:
            await self._close(image)

    async def _close(self, image: OpenImage) -> None:
        """Close an image that nobody uses; not, if somebody does by the time it is our turn."""
        key = image.found.index.digest, image.is_whole
        async with self._one_at_a_time(key):
            if image.users or self._open.get(key) is not image:
                return
            del self._open[key]
            image.scope.cancel()
            image.starting.cancel()
            await self._showing.remove(image.shown)
            for layer in image.layers:
                layer.close()
            image.found.index.trim()  # the mapping itself stays until `keep_small` comes
            self._closed = True
            for digest in image.manifests:
                self._knowledge.touch(digest)
            log.info("closed %s", image.view.reference)

    async def forget(self, digest: str) -> None:
        """Delete an image from this node, unless it is open, with the data that is no other's.

        Raises StoreError.
        """
        async with self._one_at_a_time(digest):
            if digest not in self.in_use().images:
                in_use = [index_digest for index_digest, _ in self._open]
                await self._knowledge.forget(digest, self._store, in_use)

    async def forget_index(self, digest: bytes) -> None:
        """Delete an index that no image has, unless it is in use. Raises StoreError."""
        if digest not in self.in_use().indexes:
            await trio.to_thread.run_sync(self._knowledge.forget_index, digest)

    async def trim(self, digest: str, depth: int) -> None:
        """Delete what only the layers above the lower `depth` ones of an image need, unless it is
        open. Raises StoreError.
        """
        async with self._one_at_a_time(digest):
            if self.having(digest) is None:
                await self._knowledge.trim(digest, depth, self._store)

    async def _files_of(self, shown: Shown) -> Sequence[Path]:
        return () if self._mode is Mode.FUSE else await self._showing.flat_files(shown)

    def _one_at_a_time(self, name: object) -> trio.Lock:
        lock = self._opening.get(name)
        if lock is None:
            lock = self._opening[name] = trio.Lock()
        return lock

    async def _share(
        self,
        resolved: ResolvedImage,
        source: ImageSource,
        found: FoundIndex,
        spool: Spool,
        trace: StartTrace,
        *,
        plain_http: bool,
        fill: bool = True,
        starts: bool = False,
        expected: Expected | None = None,
    ) -> OpenImage:
        """The open image of an index, opened if it is not. Owns the spool from then on.

        `starts` tells that its next reads are those of a start, for which packs are `expected`.
        """
        index = found.index
        whole = len(index.layers) == len(resolved.manifest.layers)
        key = index.digest, whole
        async with self._one_at_a_time(key):
            image = self._open.get(key)
            if image is None:
                recorder = StartupRecorder() if starts and whole else None
                image = self._open[key] = await self._opener.open(
                    resolved, source, found, recorder, trace, plain_http=plain_http
                )
                if whole:
                    await self._completion.keep(image)  # a successor must be able to open it
                if fill:
                    self._nursery.start_soon(self._completion.run, image, spool)
                if fill and whole:
                    pack = expected.claim(found) if expected is not None else None
                    # A spool that was not poured yet has all that could be brought.
                    self._startups.begin(image, pack, replay=spool.empty)
                return image
            image.users += 1
        spool.close()
        if whole:
            image.manifests[resolved.descriptor.digest] = resolved
            await self._completion.keep(image)
        return image
