"""Images as containerd's snapshots see them: which can be lazy, where they are shown, how long.

An image is open while it is pulled and for as long as there is a snapshot of its topmost layer. It
is deleted from the node with the last snapshot of any of its layers: those that other images are
based on may stay for long. After a restart images are opened again, from what is on disk.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError, IntegrityError, UnsupportedError
from snapshotter.containerd.lazy import LayerPlace, Refused
from snapshotter.daemon.errors import NoIndexError
from snapshotter.registry.chain import chain_ids
from snapshotter.registry.errors import RegistryError
from snapshotter.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from snapshotter.containerd.labels import ImageLabels
    from snapshotter.daemon.config import ImagesConfig
    from snapshotter.daemon.images import Images
    from snapshotter.daemon.open_image import OpenImage

log = logging.getLogger(__name__)

_REMEMBERED = {"no-index": 60.0, "policy": 60.0, "unsupported": 60.0, "network": 15.0}
"""For how many seconds it is remembered that an image cannot be lazy, by the kind of refusal, so
that its other layers need not find out again. Guessed: longer than a pull takes from one layer to
the next, shorter than people wait after they have attached a file index. A registry that does not
answer is asked for some 5 s before it is given up, so each layer that takes containerd less than
three times as long would be held up by that; what a registry says at once is not remembered."""

_REOPEN_AT_ONCE = 4  # images that are opened side by side after a restart: it is mostly disk


class _Image:
    """One image that containerd knows, by its manifest's digest.

    `layers` counts the snapshots by depth. `whole` is None until it is opened, `chains` are its
    layers' chain IDs, once they were needed; `lowers` are the parts of it that are shown, by depth.
    The lock is held by whoever changes any of that.
    """

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.layers: Counter[int] = Counter()
        self.whole: OpenImage | None = None
        self.chains: Sequence[str] = ()
        self.lowers: dict[int, OpenImage] = {}
        self.refusal: Refused | None = None
        self.refused_until = 0.0


class LazySnapshots:
    """What the containerd room asks the daemon. For the trio thread."""

    def __init__(self, images: Images, policy: ImagesConfig) -> None:
        self._images = images
        self._policy = policy
        self._known: dict[str, _Image] = {}

    @asynccontextmanager
    async def placing(self, labels: ImageLabels) -> AsyncIterator[LayerPlace | Refused]:
        """Where a layer is in its image, which is open then; or why it cannot be lazy.

        Whoever makes a snapshot of it calls `retain` within the block: the image cannot go
        meanwhile.
        """
        image = self._known.setdefault(labels.manifest_digest, _Image())
        async with image.lock:
            try:
                yield await self._place(image, labels)
            finally:
                if not image.layers:
                    with trio.CancelScope(shield=True):
                        await self._forget(labels.manifest_digest, image)

    def retain(self, digest: str, depth: int) -> None:
        """There is one snapshot more of the layer `depth` of an image."""
        self._known.setdefault(digest, _Image()).layers[depth] += 1

    async def release(self, digest: str, depth: int) -> None:
        """There is one snapshot less. With the last one the image is deleted from this node."""
        image = self._known[digest]
        async with image.lock:
            image.layers[depth] -= 1
            image.layers += Counter()  # drops what counts zero
            with trio.CancelScope(shield=True):
                if image.layers:
                    await self._close_unneeded(digest, image)
                else:
                    await self._forget(digest, image)

    async def lower(self, digest: str, depth: int) -> Path:
        """The directory that shows the lower `depth` layers of an image, merged.

        Raises FirstByteError. Needs no network if it was shown before on this node.
        """
        image = self._known[digest]
        async with image.lock:
            whole = image.whole
            if whole is not None and whole.view.refusal is not None:
                raise whole.view.refusal
            shown = whole if whole is not None and depth == len(whole.layers) else None
            if shown is None:
                shown = image.lowers.get(depth)
            if shown is None:
                shown = image.lowers[depth] = await self._images.acquire_lower(digest, depth)
            _, directory = await self._images.directory(shown)
        return directory

    async def disk_usage(self, content_key: str) -> int:
        """Bytes of disk that a layer takes now."""
        return await trio.to_thread.run_sync(self._images.disk_usage, bytes.fromhex(content_key))

    async def open_all(self) -> None:
        """Open the images that there are snapshots of: their download goes on, without waiting for
        a container. One that cannot be opened is logged; it is tried again when it is asked for.
        """
        limit = trio.CapacityLimiter(_REOPEN_AT_ONCE)

        async def open_one(digest: str, image: _Image) -> None:
            async with limit, image.lock:
                try:
                    if image.whole is None:
                        image.whole = await self._images.open_known(digest)
                    await self._close_unneeded(digest, image)
                except FirstByteError as error:
                    log.error("%s has snapshots, but cannot be opened: %s", digest, error)

        async with trio.open_nursery() as nursery:
            for digest, image in list(self._known.items()):
                nursery.start_soon(open_one, digest, image)

    async def close(self) -> None:
        """Close every image; the snapshots stay."""
        for image in self._known.values():
            await self._close(image)

    def claimed(self) -> dict[str, int]:
        """The images that there are snapshots of, and how many."""
        return {
            digest: image.layers.total() for digest, image in self._known.items() if image.layers
        }

    def open_images(self) -> Iterator[tuple[OpenImage, int]]:
        """What is shown for containerd, and how many snapshots there are of each image's layers."""
        for image in self._known.values():
            if image.whole is not None:
                yield image.whole, image.layers.total()

    # --- one image ---

    async def _place(self, image: _Image, labels: ImageLabels) -> LayerPlace | Refused:
        if image.whole is None:
            if image.refusal is not None and trio.current_time() < image.refused_until:
                return image.refusal
            # containerd asks for one layer after the other. A download that begins with the first
            # one takes from the pull what that needs: 1.7 s for 127 layers instead of 0.9.
            self._images.hold_fill()
            image.refusal = await self._try_to_open(image, labels)
            if image.refusal is not None:
                self._images.release_fill()
                remembered = _REMEMBERED.get(image.refusal.kind, 0.0)
                image.refused_until = trio.current_time() + remembered
                return image.refusal
        whole = image.whole
        assert whole is not None
        if whole.view.refusal is not None:
            return _refused(labels, "quarantined", str(whole.view.refusal))
        if not image.chains:
            image.chains = chain_ids(whole.resolved.config.rootfs.diff_ids)
        chains = image.chains
        if labels.target not in chains:
            reason = f"the image has no chain {labels.target}: its configuration says otherwise"
            return _refused(labels, "unsupported", reason)
        number = chains.index(labels.target)
        if whole.resolved.manifest.layers[number].digest != labels.layer_digest:
            reason = f"{labels.target} is not the chain of layer {labels.layer_digest}"
            return _refused(labels, "unsupported", reason)
        top = number + 1 == len(chains)
        if top:
            self._images.expect_start()
        else:
            self._images.hold_fill()
        return LayerPlace(
            image=labels.manifest_digest,
            depth=number + 1,
            content_key=whole.layers[number].table.content_key.hex(),
            top=top,
        )

    async def _try_to_open(self, image: _Image, labels: ImageLabels) -> Refused | None:
        if any(fnmatchcase(labels.reference, pattern) for pattern in self._policy.never):
            return _refused(labels, "policy", "images.never in the configuration excludes it")
        try:
            name = Reference.parse(labels.reference).name
            image.whole, _ = await self._images.acquire(
                f"{name}@{labels.manifest_digest}", may_build=self._policy.build
            )
            await self._images.keep(image.whole)
        except NoIndexError as error:
            return _refused(labels, "no-index", str(error))
        except UnsupportedError as error:
            return _refused(labels, "unsupported", str(error))
        except RegistryError as error:
            return _refused(labels, "network" if error.transient else "registry", str(error))
        except IntegrityError as error:
            return _refused(labels, "damaged", str(error))
        except FirstByteError as error:
            return _refused(labels, "other", str(error))
        return None

    async def _close_unneeded(self, digest: str, image: _Image) -> None:
        """Close what no snapshot shows: lower layers alone, or all if only lower ones are left.

        In that case what the layers above have on disk goes, too.
        """
        for depth in image.lowers.keys() - image.layers.keys():
            await self._images.release(image.lowers.pop(depth))
        whole = image.whole
        if whole is not None and len(whole.layers) not in image.layers:
            image.whole = None
            await self._images.release(whole)
            try:
                await self._images.trim(digest, max(image.layers))
            except FirstByteError as error:
                log.warning("not all of %s could be deleted: %s", digest, error)

    async def _forget(self, digest: str, image: _Image) -> None:
        """Delete from the node what there is no snapshot of any more."""
        had_it = image.whole is not None or image.refusal is None
        await self._close(image)
        try:
            if had_it:
                await self._images.forget(digest)
        except FirstByteError as error:
            log.warning("not all of %s could be deleted: %s", digest, error)
        if trio.current_time() >= image.refused_until and not image.lock.statistics().tasks_waiting:
            del self._known[digest]

    async def _close(self, image: _Image) -> None:
        while image.lowers:
            await self._images.release(image.lowers.popitem()[1])
        if image.whole is not None:
            whole, image.whole = image.whole, None
            await self._images.release(whole)


def _refused(labels: ImageLabels, kind: str, reason: str) -> Refused:
    return Refused(
        reference=labels.reference, image=labels.manifest_digest, kind=kind, reason=reason
    )
