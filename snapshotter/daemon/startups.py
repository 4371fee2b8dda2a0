"""The start of an image: what earlier ones touched is brought, what it touches is recorded."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError
from index.profile import Profile
from snapshotter.daemon.page_cache import read_ahead
from snapshotter.fetch.pack import PackDelivery
from snapshotter.fetch.source import ImagePackSource
from snapshotter.images.discovery import Trust, find_pack
from snapshotter.images.foresight import Foresight
from snapshotter.registry.chain import chain_ids
from snapshotter.store.profiles import ProfileStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence
    from pathlib import Path

    from index.pack import Place
    from snapshotter.daemon.open_image import OpenImage
    from snapshotter.daemon.showing import Shown
    from snapshotter.fetch.scheduler import Scheduler
    from snapshotter.fetch.startup import StartupRecorder
    from snapshotter.images.discovery import FoundIndex
    from snapshotter.registry.image import ImageSource
    from snapshotter.registry.manifest import Descriptor

log = logging.getLogger(__name__)


class Startups:
    """For all images of the daemon, and the trio thread."""

    def __init__(
        self,
        root: Path,
        scheduler: Scheduler,
        nursery: trio.Nursery,
        *,
        trusted: Collection[Trust],
        files_of: Callable[[Shown], Awaitable[Sequence[Path]]],
    ) -> None:
        """Packs are `trusted` as indexes are. `files_of` tells which files an image's layers are in
        to the kernel; none if it reads an image in other ways. Work that goes on after an image is
        open runs in `nursery`. Raises StoreError.
        """
        self._profiles = ProfileStore(root)
        self._trusted = trusted
        self._files_of = files_of
        self._scheduler = scheduler
        self._nursery = nursery

    def expect(self, source: ImageSource, pack: Descriptor) -> PackDelivery:
        """Ask for the startup pack of an image that is only being opened."""
        delivery = PackDelivery(ImagePackSource(source, pack), self._scheduler)
        delivery.start(self._nursery)
        return delivery

    def begin(
        self,
        image: OpenImage,
        expected: PackDelivery | None,
        *,
        replay: bool,
    ) -> None:
        """Help an image that is open now to start, until it has, or until it is closed.

        `expected` is its startup pack if that is on its way. Nothing is brought without `replay`.
        """
        replay = replay and not image.local and bool(image.layers)
        if expected is not None and not replay:
            expected.close()
        if not image.layers:
            return
        if replay and image.found.pack is not None:
            self._scheduler.expect_start()
        self._nursery.start_soon(self._run, image, expected, replay)

    async def must_see(self, image: OpenImage) -> bool:
        """Whether every read of an image has to come to us, because what its starts touch is not
        known, and is being recorded.

        The kernel tells nobody what it reads from the disk. So a start without those reads is no
        run for the profile (`_keep`), and none is needed where a profile or a pack is there.
        """
        recorder = image.recorder
        if recorder is None or recorder.stopped or image.found.pack or not image.layers:
            return False
        profile = await trio.to_thread.run_sync(self._profiles.get, _chain_id(image))
        return profile is None or not _is_of(image, profile)

    async def _run(self, image: OpenImage, expected: PackDelivery | None, replay: bool) -> None:
        recorder = image.recorder
        try:
            with image.starting:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(self._help, image, expected, replay=replay))
                    if recorder is not None:
                        await recorder.settled()
                        await self._keep(image, recorder)
        except Exception:
            log.exception("helping %s to start failed in an unforeseen way", image.view.reference)
        finally:
            if recorder is not None and not recorder.stopped:  # it was closed before it settled
                with trio.CancelScope(shield=True):
                    await self._keep(image, recorder)

    async def _help(self, image: OpenImage, expected: PackDelivery | None, *, replay: bool) -> None:
        """Bring the startup pack, then what starts on this node touched and the pack has not.

        Without both, bring what can be foreseen.
        """
        delivery = None
        if replay:
            delivery = expected or await self._delivery(image)
            await self._deliver(image, delivery)
        profile = await trio.to_thread.run_sync(self._profiles.get, _chain_id(image))
        if profile is None or not _keep_longest(image, profile):
            if replay and delivery is None:
                await self._foresee(image)
            return
        if replay:
            origins = [layer.origin for layer in image.layers]
            self._scheduler.replay((origins[t.layer], t.chunk) for t in profile.likely)

    async def _foresee(self, image: OpenImage) -> None:
        config = image.resolved.config.config
        if config is not None:
            await Foresight(image.found.index.tree, image.layers, config).look()

    async def _deliver(self, image: OpenImage, delivery: PackDelivery | None) -> None:
        """An image starts without a pack as well."""
        if delivery is None:
            return
        name = image.view.reference
        lots: trio.MemorySendChannel[Sequence[Place]]
        lots, arrivals = trio.open_memory_channel(math.inf)  # of one pack, so not for ever
        with arrivals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_ahead, image, arrivals)
                try:
                    with lots:
                        origins = [layer.origin for layer in image.layers]
                        await delivery.deliver(image.found.index.digest, origins, lots.send_nowait)
                    log.info("%s: its startup pack is here", name)
                except FirstByteError as error:
                    log.warning("%s starts without all of its startup pack: %s", name, error)

    async def _read_ahead(
        self, image: OpenImage, arrivals: trio.MemoryReceiveChannel[Sequence[Place]]
    ) -> None:
        try:
            if files := await self._files_of(image.shown):
                await read_ahead(files, arrivals)
        except (FirstByteError, OSError, trio.TooSlowError) as error:
            log.warning("%s has nothing read ahead for it: %s", image.view.reference, error)

    async def _delivery(self, image: OpenImage) -> PackDelivery | None:
        """The startup pack of an image whose index was not found with one just now."""
        found = image.found
        if (
            found.pack is None
            and not found.unpacked
            and found.trust is Trust.ANNOTATION
            and Trust.REFERRER in self._trusted
        ):
            pack = await find_pack(image.source, image.digest, found.index.digest)
            found = image.found = replace(image.found, pack=pack)
        if found.pack is None:
            return None
        return PackDelivery(ImagePackSource(image.source, found.pack), self._scheduler)

    async def _keep(self, image: OpenImage, recorder: StartupRecorder) -> None:
        """Add a run to the image's profile. An image is served whether this works or not."""
        recorder.stop()
        if not recorder.touches or image.shown.from_disk:
            return
        run = Profile(
            tuple(layer.table.diff_id for layer in image.layers),
            tuple(recorder.touches),
            name=image.view.reference,
        )
        try:
            merged = await trio.to_thread.run_sync(self._profiles.add, _chain_id(image), run)
        except FirstByteError as error:
            log.warning("the startup profile of %s is not kept: %s", image.view.reference, error)
            return
        _keep_longest(image, merged)
        log.info("%s: its start touched %d chunks", image.view.reference, len(recorder.touches))


def _chain_id(image: OpenImage) -> str:
    """Of all layers of an image, which has some."""
    return chain_ids(image.resolved.config.rootfs.diff_ids)[-1]


def _is_of(image: OpenImage, profile: Profile) -> bool:
    tables = [layer.table for layer in image.layers]
    return [table.diff_id for table in tables] == [*profile.diff_ids] and all(
        touch.chunk < tables[touch.layer].chunk_count for touch in profile.likely
    )


def _keep_longest(image: OpenImage, profile: Profile) -> bool:
    """Have what starts need evicted last. False if the profile is not of this image."""
    if not _is_of(image, profile):
        return False
    likely = profile.likely
    for number, layer in enumerate(image.layers):
        layer.stored.start_chunks |= {t.chunk for t in likely if t.layer == number}
    return True


class Expected:
    """The startup packs that are on their way while an image is being opened."""

    def __init__(self, startups: Startups, source: ImageSource) -> None:
        self._startups = startups
        self._source = source
        self._deliveries: dict[str, PackDelivery] = {}

    def expect(self, pack: Descriptor) -> Callable[[], None]:
        """Ask for a pack; it may turn out to be of an index that is not used. Call what is returned
        when the index has come, which has the link first."""
        if pack.digest not in self._deliveries:
            self._deliveries[pack.digest] = self._startups.expect(self._source, pack)
        return self._deliveries[pack.digest].release

    def claim(self, found: FoundIndex) -> PackDelivery | None:
        """The pack that goes with an index, if it is on its way."""
        return None if found.pack is None else self._deliveries.pop(found.pack.digest, None)

    def close(self) -> None:
        """Ask no more for packs that nobody has claimed."""
        for delivery in self._deliveries.values():
            delivery.close()
