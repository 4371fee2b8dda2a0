"""The images whose layers podman and CRI-O have from our additional layer store.

An image is open from the moment somebody asks for one of its layers until nobody uses any. It is
found under the reference that podman pulls; what was found is on disk, and is served again after a
restart without network.
"""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import trio

from index.errors import FirstByteError
from snapshotter.daemon.additional_layers import AdditionalLayer, LayeredImage, tables_of
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.layer_files import LayerFiles
from snapshotter.fuse.view import MAX_SLOT, View
from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.table import mount_at
from snapshotter.nursery import open_nursery
from snapshotter.podman.graph_root import GraphRoot
from snapshotter.podman.held import HeldImages
from snapshotter.podman.layer_store import LayerStoreView, decode_reference, encode_reference
from snapshotter.podman.storage_conf import find_storage_conf, read_storage_conf, usual_graph_root
from snapshotter.podman.users import layers_below
from snapshotter.podman.versions import may_answer_tables
from snapshotter.store.durable import make_directory
from snapshotter.store.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from index.erofs.reader import Image as Tree
    from snapshotter.daemon.images import Images
    from snapshotter.daemon.open_image import OpenImage
    from snapshotter.daemon.places import Places
    from snapshotter.daemon.process import Stop
    from snapshotter.fuse.live import Call
    from snapshotter.fuse.view import Views
    from snapshotter.podman.graph_root import Image
    from snapshotter.podman.held import HeldImage
    from snapshotter.registry.image import ResolvedImage

log = logging.getLogger(__name__)

VIEW_NAME = "podman-layers"
"""The store's directory in the root of the FUSE mount."""

# Slots from the last one downwards; those that images get by themselves come from below.
_STORE_SLOT = MAX_SLOT
_LAYER_SLOT = MAX_SLOT - 1

_REFUSED_SECONDS = 15.0
"""For so long it is remembered that an image has no such layer for us: a pull asks for each of its
layers. Guessed; a registry that does not answer is given up after some 5 s."""

_SWEEP_SECONDS = 60.0  # an image that nobody uses stays for one to two of these; guessed


class PodmanLayers:
    """All of them. For the trio thread; it is what `podman.layer_store.Layers` asks for."""

    def __init__(
        self,
        places: Places,
        views: Views,
        images: Images,
        nursery: trio.Nursery,
        *,
        may_build: bool,
    ) -> None:
        """`may_build` as of `Images.acquire`. Raises StoreError."""
        self._store = places.podman_layers
        self._image_store = places.podman_images
        self._views = views
        self._images = images
        self._nursery = nursery
        self._may_build = may_build
        self._files = LayerFiles(places.podman_layer_files)
        self._held = HeldImages(places.podman_held)
        images.claims.append(self.claimed)
        self._open: list[LayeredImage] = []
        self._refused: dict[tuple[str, str], float] = {}
        self._locks: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._counting = trio.Lock()
        self._pinned: set[str] = set()
        self._view = LayerStoreView(name=VIEW_NAME.encode(), slot=_STORE_SLOT, layers=self)

    def claimed(self) -> dict[str, str]:
        """The images that are held, by their manifests' digests, and what podman calls them."""
        return {held.manifest: held.reference for held in self._held.images}

    async def restore(self, *, resumed: bool) -> None:
        """Show the store, and serve what podman holds of it; before the kernel asks for any.
        `resumed` says that the FUSE mount is a predecessor's that goes on."""
        self._views.add(self._view)
        if not resumed:
            await trio.to_thread.run_sync(self._held.begin_mount)
        pinned = await trio.to_thread.run_sync(self._in_image_store)
        all_open = True
        for held in self._held.images:
            unused = not any(held.counts) and held.reference not in pinned
            if unused and not resumed:  # else somebody may be about to use it
                await trio.to_thread.run_sync(self._held.remove, held)
                continue
            try:
                await self._serve_again(held)
            except FirstByteError as error:
                if unused:
                    await trio.to_thread.run_sync(self._held.remove, held)
                else:
                    all_open = False
                    log.error(
                        "%s has layers in podman that cannot be served: %s", held.reference, error
                    )
        if all_open:  # else nobody knows which files are of the others
            await self._files.keep_only(self._open)

    async def sweep_forever(self) -> None:
        """Close images that nobody uses any more."""
        while True:
            await trio.sleep(_SWEEP_SECONDS)
            for image in list(self._open):
                image.idle = 0 if self._is_used(image) else image.idle + 1
                if image.idle > 1:
                    await self._drop(image)

    async def pin(self, reference: str, resolved: ResolvedImage) -> Path:
        """Serve all layers of an image that is known on this node by this reference, which has its
        digest, until `unpin`. Returns the image's directory in the store. Raises FirstByteError."""
        if _twice(resolved):
            raise DaemonError(
                f"{resolved.name} has a layer twice, and overlayfs takes no directory twice",
                hint="add it without --layers",
            )
        async with self._lock(reference):
            if not any(image.held.reference == reference for image in self._open):
                await self._acquire(reference, resolved.manifest.layers[0].digest)
            self._pinned.add(reference)
        return self._store / encode_reference(reference).decode()

    def unpin(self, reference: str) -> None:
        """Serve them for as long as podman uses them, and a while."""
        self._pinned.discard(reference)

    def _is_used(self, image: LayeredImage) -> bool:
        return image.held.reference in self._pinned or any(image.held.counts)

    def _in_image_store(self) -> set[str]:
        """The references of what the image store is about to pin again."""
        try:
            images = GraphRoot(self._image_store).images()
            return {pinned_reference(image) for image in images if image.layers_at}
        except StoreError as error:
            log.warning("%s", error)
            return set()

    async def close(self) -> None:
        """Serve none of them any more; what podman holds stays on disk."""
        while self._open:
            await self._hide(self._open[-1])

    # --- what the store asks ---

    def known(self, reference: str, digest: str) -> AdditionalLayer | None:
        found = self._locate(reference, digest)
        return None if found is None else found[0].layers[found[1]]

    async def find(self, reference: str, digest: str) -> AdditionalLayer | None:
        async with self._lock(reference):
            layer = self.known(reference, digest)
            if layer is None and trio.current_time() >= self._refused.get((reference, digest), 0.0):
                try:
                    if not await self._acquire(reference, digest):
                        self._refuse(reference, digest, "the image has no such layer")
                except FirstByteError as error:
                    self._refuse(reference, digest, str(error))
                layer = self.known(reference, digest)
            return layer

    def ask_again(self) -> None:
        """What was refused may be had now: there are new credentials."""
        self._refused.clear()

    def has_counted(self, call: Call) -> bool:
        return self._held.has_counted(call)

    async def retain(self, reference: str, digest: str, call: Call) -> None:
        await self._count(reference, digest, 1, call)

    async def release(self, reference: str, digest: str, call: Call) -> None:
        await self._count(reference, digest, -1, call)

    async def _count(self, reference: str, digest: str, by: int, call: Call) -> None:
        found = self._locate(reference, digest)
        if found is None:
            log.warning("podman counts %s of %s, which is not served", digest, reference)
            return
        image, number = found
        with trio.CancelScope(shield=True):
            async with self._counting:
                image.held = await trio.to_thread.run_sync(
                    self._held.change, image.held, number, by, call
                )
                image.idle = 0

    def _locate(self, reference: str, digest: str) -> tuple[LayeredImage, int] | None:
        for image in reversed(self._open):
            if image.held.reference == reference:
                number = image.number_of(digest)
                if number is not None:
                    return image, number
        return None

    def _refuse(self, reference: str, digest: str, why: str) -> None:
        log.info("podman pulls %s of %s as ever: %s", digest, reference, why)
        now = trio.current_time()
        self._refused = {key: until for key, until in self._refused.items() if until > now}
        self._refused[reference, digest] = now + _REFUSED_SECONDS

    def _lock(self, reference: str) -> trio.Lock:
        lock = self._locks.get(reference)
        if lock is None:
            lock = self._locks[reference] = trio.Lock()
        return lock

    # --- one image ---

    async def _acquire(self, reference: str, digest: str) -> bool:
        """Open the image that a reference stands for now; tells if the layer is one of it."""
        image, resolved = await self._images.acquire(reference, may_build=self._may_build)
        try:
            if not await self._may_have(resolved, digest):
                await self._images.release(image)
                return False
            await self._images.keep(image)
            trees = await self._files.trees(image)
            with trio.CancelScope(shield=True):
                held = await trio.to_thread.run_sync(
                    self._held.add, reference, resolved.descriptor.digest, len(image.layers)
                )
                self._serve(held, resolved, image, trees)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._images.release(image)
            raise
        return True

    async def _may_have(self, resolved: ResolvedImage, digest: str) -> bool:
        if digest in _twice(resolved):
            raise DaemonError("the image has it twice, and overlayfs takes no directory twice")
        if any(digest == layer.digest for layer in resolved.manifest.layers):
            return True
        named = any(digest in tables_of(layer) for layer in resolved.manifest.layers)
        if named and not await trio.to_thread.run_sync(may_answer_tables):
            log.warning(
                "podman would forget the layers of %s that it gets from the layer store: it gets "
                "none, see docs/podman.md",
                resolved.name,
            )
            return False
        return named

    def _serve(
        self, held: HeldImage, resolved: ResolvedImage, image: OpenImage, trees: Sequence[Tree]
    ) -> LayeredImage:
        made = LayeredImage(held, resolved, image, self._files)
        for number, tree in enumerate(trees):
            slot = _LAYER_SLOT - 2 * (held.number + number)
            view = View(
                name=f"{VIEW_NAME}-{held.number + number}".encode(),
                slot=slot,
                reference=f"layer {number + 1} of {resolved.name}",
                image=tree,
                layers=image.layers,
                raw_size=0,
            )
            made.layers.append(AdditionalLayer(made, number, view, slot - 1))
        for layer in made.layers:
            self._views.add(layer.tree)
            self._views.add(layer.blob)
        self._open.append(made)
        self._nursery.start_soon(_pass_refusal, made)
        return made

    async def _serve_again(self, held: HeldImage) -> None:
        image = await self._images.open_known(held.manifest)
        try:
            trees = await self._files.trees(image)
        except BaseException:
            await self._images.release(image)
            raise
        made = self._serve(held, image.manifests[held.manifest], image, trees)
        self._view.expect(
            held.reference, [digest for layer in made.layers for digest in layer.names]
        )

    async def _drop(self, image: LayeredImage) -> None:
        """Serve an image no more, if podman has nothing of it."""
        prefix = self._store / encode_reference(image.held.reference).decode()
        below = await trio.to_thread.run_sync(lambda: layers_below(prefix, _graph_roots()))
        if any(self._locate(image.held.reference, name) for name in below):
            log.warning("podman still has layers of %s, which it has given up", image.resolved.name)
            return
        async with self._lock(image.held.reference), self._counting:
            if image not in self._open or self._is_used(image):
                return
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._held.remove, image.held)
                await self._hide(image)
                await self._files.remove(image, self._open)

    async def _hide(self, image: LayeredImage) -> None:
        self._open.remove(image)
        for layer in image.layers:
            self._views.remove(layer.tree)
            self._views.remove(layer.blob)
        await self._images.release(image.open)


@asynccontextmanager
async def show_layer_store(layers: PodmanLayers, places: Places, stop: Stop) -> AsyncIterator[None]:
    """Let podman find the store for as long as the block runs, and longer if `stop` leaves it to a
    successor. Raises MountError."""
    await trio.to_thread.run_sync(_bind, places)
    try:
        async with open_nursery() as nursery:
            nursery.start_soon(layers.sweep_forever)
            yield
            nursery.cancel_scope.cancel()
    finally:
        if not stop.leaves:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_unbind, places)
                await layers.close()


def pinned_reference(image: Image) -> str:
    """What `pin` was told of an image with its own layers. Raises StoreError."""
    reference = decode_reference(os.fsencode(os.path.basename(image.layers_at)))
    if reference is None:
        raise StoreError(f"{image.layers_at} is no directory of podman's layer store")
    return reference


def is_shown(places: Places) -> bool:
    """Whether a predecessor has left the store to us."""
    return mount_at(places.podman_layers) is not None


def _twice(resolved: ResolvedImage) -> set[str]:
    """The layers that an image has more than once."""
    digests = [layer.digest for layer in resolved.manifest.layers]
    return {digest for digest in digests if digests.count(digest) > 1}


def _bind(places: Places) -> None:
    make_directory(places.podman_layers)
    if not is_shown(places):
        syscalls.bind_writable(places.mount / VIEW_NAME, places.mount, places.podman_layers)


def _unbind(places: Places) -> None:
    try:
        syscalls.unmount(places.podman_layers, detach=True)
    except MountError as error:
        log.warning("%s", error)


async def _pass_refusal(image: LayeredImage) -> None:
    """An image that has lied is not read by its layers either."""
    await image.open.settled.wait()
    for layer in image.layers:
        layer.tree.refusal = image.open.view.refusal


def _graph_roots() -> set[Path]:
    try:
        return {usual_graph_root(), read_storage_conf(find_storage_conf()).graph_root}
    except FirstByteError as error:
        log.warning("%s", error)
        return {usual_graph_root()}
