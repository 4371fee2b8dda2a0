"""The images that podman and CRI-O find in our additional image store: they stay until removed.

The store is on disk and survives everything; that an image can be read needs this daemon, which
opens each of them again when it starts, without network. When an image is fully local, containers
that start from then on get it from the disk, without us.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError
from snapshotter.daemon import protocol
from snapshotter.daemon.additional_layers import COMPRESSIONS
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.podman_layers import PodmanLayers, pinned_reference
from snapshotter.daemon.showing import Mode
from snapshotter.nursery import open_nursery
from snapshotter.podman import rootless
from snapshotter.podman.graph_root import GraphRoot, Image, Layer, chain, link_name
from snapshotter.podman.merged import go_time
from snapshotter.podman.users import images_of, users_of
from snapshotter.registry.reference import LAYOUT_PREFIX, Reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from snapshotter.daemon.images import Images
    from snapshotter.daemon.open_image import OpenImage
    from snapshotter.registry.image import ResolvedImage

log = logging.getLogger(__name__)

_SHORTEST_ID = 4  # of what is taken for the beginning of an image's ID


@dataclass
class _Served:
    """An image of the store. `open` is None if it could not be opened; `problem` says why."""

    image: Image
    open: OpenImage | None = None
    mode: Mode | None = None
    problem: str = ""


class PodmanImages:
    """All of them, by ID. For the trio thread."""

    def __init__(
        self, store: Path, images: Images, layers: PodmanLayers | None, nursery: trio.Nursery
    ) -> None:
        """`layers` is the layer store, if there is one. Background work runs in `nursery`."""
        self._store = GraphRoot(store)
        self._images = images
        self._layers = layers
        self._nursery = nursery
        self._served: dict[str, _Served] = {}
        self._changing = trio.Lock()

    @property
    def none(self) -> bool:
        """Whether the store is empty."""
        return not self._served

    async def restore(self) -> None:
        """Make the store readable, and serve what is in it. Raises StoreError."""
        await trio.to_thread.run_sync(self._store.open)
        async with open_nursery() as nursery:
            for image in await trio.to_thread.run_sync(self._store.images):
                self._served[image.id] = _Served(image)
                nursery.start_soon(self._reopen, self._served[image.id])

    async def add(
        self, request: protocol.PodmanAddRequest, report: Callable[[protocol.Progress], None]
    ) -> protocol.PodmanImage:
        """Put an image into the store, or give one that is there another name. Raises
        FirstByteError."""
        name = podman_name(request.reference)
        if request.layers:
            self._require_layers(request.reference)
        image, resolved = await self._images.acquire(
            request.reference,
            request.platform,
            index=Path(request.index) if request.index else None,
            report=report,
        )
        served: _Served | None = None
        try:
            if request.layers:  # which may take long, and can be cancelled
                await self._pin(resolved)
            async with self._changing:
                with trio.CancelScope(shield=True):
                    await self._images.keep(image)
                    show = self._show_layers if request.layers else self._show
                    served = await show(name, image, resolved)
                    await self._drop_nameless(request.graph_roots)
        finally:
            if served is None:
                with trio.CancelScope(shield=True):
                    await self._images.release(image)
                if request.layers:
                    self._unpin(_pinned(resolved))
        assert served is not None
        return _status(served)

    async def remove(self, request: protocol.PodmanRemoveRequest) -> None:
        """Take an image out of the store, or one of several names from it. Raises DaemonError if
        something uses it, other FirstByteErrors."""
        async with self._changing:
            served, name = self._find(request.image)
            left = [one for one in served.image.names or [] if name is not None and one != name]
            with trio.CancelScope(shield=True):
                if left:
                    await trio.to_thread.run_sync(self._store.rename, served.image, left)
                elif users := await trio.to_thread.run_sync(
                    self._remove_unused, served.image, request.graph_roots
                ):
                    raise DaemonError(
                        f"{_name(served.image)} is in use by {', '.join(users)}",
                        hint="remove that first: podman rm, podman rmi",
                    )
                await self._refresh()

    def status(self) -> list[protocol.PodmanImage]:
        return [_status(served) for served in self._served.values()]

    def claimed(self) -> dict[str, str]:
        """The images in the store, by their manifests' digests, and what podman calls them."""
        return {served.image.original: _name(served.image) for served in self._served.values()}

    async def close(self) -> None:
        """Serve none of them any more; the store stays as it is."""
        for served in self._served.values():
            await self._close(served)

    # --- one image ---

    async def _show(self, name: str, image: OpenImage, resolved: ResolvedImage) -> _Served:
        mode, tree = await self._images.directory(image)
        size = sum(layer.table.raw_size for layer in image.layers)
        added = await trio.to_thread.run_sync(
            self._store.add, name, resolved.manifest.raw, resolved.raw_config, tree, size
        )
        return await self._added(added, image, mode)

    async def _pin(self, resolved: ResolvedImage) -> Path:
        """Have the layer store serve an image; returns the image's directory there."""
        assert self._layers is not None
        if not resolved.manifest.layers:
            raise DaemonError(f"{resolved.name} has no layers", hint="add it without --layers")
        return await self._layers.pin(_pinned(resolved), resolved)

    def _unpin(self, reference: str) -> None:
        """The layer store need not serve an image, unless another one is to be found there."""
        kept = {pinned_reference(one.image) for one in self._served.values() if one.image.layers_at}
        if self._layers is not None and reference not in kept:
            self._layers.unpin(reference)

    async def _show_layers(self, name: str, image: OpenImage, resolved: ResolvedImage) -> _Served:
        directory = await self._pin(resolved)  # again: it may have been removed meanwhile
        added = await trio.to_thread.run_sync(
            self._store.add_layers,
            name,
            resolved.manifest.raw,
            resolved.raw_config,
            layer_records(image, resolved),
            directory,
        )
        return await self._added(added, image, Mode.FUSE)

    def _require_layers(self, reference: str) -> None:
        if self._layers is None:
            raise DaemonError(
                "only a daemon that runs as a service shows podman an image's own layers",
                hint=rootless.how_to_start(),
            )
        if reference.startswith(LAYOUT_PREFIX):
            raise DaemonError(
                f"{reference} is in no registry, from which podman could push its layers on",
                hint="add it without --layers",
            )

    async def _added(self, added: Image, image: OpenImage, mode: Mode) -> _Served:
        served = self._served.setdefault(added.id, _Served(added))
        if served.open is image:
            await self._images.release(image)  # it has one user here, whatever its names are
        else:
            await self._close(served)
            self._serve(served, image, mode)
        await self._refresh()
        return served

    async def _reopen(self, served: _Served) -> None:
        try:
            image = await self._images.open_known(served.image.original)
            try:
                mode = await self._point(served.image, image)
            except BaseException:
                await self._images.release(image)
                raise
        except FirstByteError as error:
            served.problem = str(error)
            log.error("%s cannot be served to podman: %s", _name(served.image), error)
            return
        self._serve(served, image, mode)

    async def _point(self, record: Image, image: OpenImage) -> Mode:
        """Let containers to come find an image where it is shown now. Raises FirstByteError."""
        if record.layers_at:
            self._require_layers(_name(record))
            assert self._layers is not None
            resolved = image.manifests[record.original]
            await self._layers.pin(pinned_reference(record), resolved)
            return Mode.FUSE
        mode, tree = await self._images.directory(image)
        await trio.to_thread.run_sync(self._store.point, record, tree)
        return mode

    def _serve(self, served: _Served, image: OpenImage, mode: Mode) -> None:
        served.open, served.mode, served.problem = image, mode, ""
        if not served.image.layers_at:
            self._nursery.start_soon(self._improve, served, image)

    async def _improve(self, served: _Served, image: OpenImage) -> None:
        """When all of an image is here, containers to come get it without us."""
        await image.settled.wait()
        async with self._changing:
            if not image.local or served.open is not image:
                return
            try:
                served.mode = await self._point(served.image, image)
            except FirstByteError as error:
                log.warning("%s stays as it is shown: %s", _name(served.image), error)

    async def _refresh(self) -> None:
        """Take over what the store says now: names, and what is gone."""
        there = {image.id: image for image in await trio.to_thread.run_sync(self._store.images)}
        for image_id, served in list(self._served.items()):
            if image_id in there:
                served.image = there[image_id]
            else:
                del self._served[image_id]
                await self._close(served)
                if served.image.layers_at:
                    self._unpin(pinned_reference(served.image))

    async def _close(self, served: _Served) -> None:
        image, served.open, served.mode = served.open, None, None
        if image is not None:
            await self._images.release(image)

    def _find(self, text: str) -> tuple[_Served, str | None]:
        """The image of a name, or of an ID or its beginning; and the name, if it is one."""
        if re.fullmatch(f"[0-9a-f]{{{_SHORTEST_ID},64}}", text):
            found = [one for image_id, one in self._served.items() if image_id.startswith(text)]
            if len(found) == 1:
                return found[0], None
        name = podman_name(text)
        for served in self._served.values():
            if name in (served.image.names or []):
                return served, name
        raise DaemonError(
            f"no image {text} is in the store", hint="firstbyte podman ls lists what is"
        )

    async def _drop_nameless(self, graph_roots: list[str]) -> None:
        """Remove images whose names have gone over to newer ones, but those that are in use."""
        for served in list(self._served.values()):
            if not served.image.names:
                await trio.to_thread.run_sync(self._remove_unused, served.image, graph_roots)
        await self._refresh()

    def _remove_unused(self, image: Image, graph_roots: list[str]) -> list[str]:
        """Take an image out of the store, or tell who uses it. Blocks."""
        ids = [layer.id for layer in self._store.layers_of(image)]
        roots = [Path(root) for root in graph_roots]
        if users := _users_of(ids, roots):
            return users
        self._store.withdraw(image)
        if users := _users_of(ids, roots):  # they were faster
            self._store.restore(image)
            return users
        self._store.sweep()
        return []


def _pinned(resolved: ResolvedImage) -> str:
    """The reference of an image that never stands for another one."""
    return f"{Reference.parse(resolved.name).name}@{resolved.descriptor.digest}"


def layer_records(image: OpenImage, resolved: ResolvedImage) -> list[Layer]:
    """The layers of an image as containers/storage knows them, lowest first."""
    created = go_time(datetime.now(UTC))
    described = zip(
        resolved.manifest.layers, resolved.config.rootfs.diff_ids, image.layers, strict=True
    )
    return chain(
        Layer(
            id="",
            created=created,
            compressed_diff_digest=layer.digest,
            compressed_size=layer.size,
            diff_digest=diff_id,
            diff_size=opened.table.raw_size,
            compression=COMPRESSIONS.get(opened.table.codec, 0),
            uidset=[0],
            gidset=[0],
        )
        for layer, diff_id, opened in described
    )


def _users_of(layers: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """Who uses any of an image's layers, lowest first: mostly it is the topmost one."""
    links = [link_name(layer) for layer in reversed(layers)]
    users = [user for link in links for user in users_of(link, roots)]
    return list(dict.fromkeys([*users, *images_of(layers, roots)]))


def podman_name(reference: str) -> str:
    """What podman calls an image. Raises InvalidReferenceError."""
    if reference.startswith(LAYOUT_PREFIX):  # as podman does: the directory's name
        path, _, tag = reference.removeprefix(LAYOUT_PREFIX).partition(":")
        reference = f"localhost/{path.rstrip('/').rpartition('/')[2].lower()}:{tag or 'latest'}"
    parsed = Reference.parse(reference)
    return f"{parsed.name}@{parsed.digest}" if parsed.digest else f"{parsed.name}:{parsed.tag}"


def _name(image: Image) -> str:
    return next(iter(image.names or [image.id[:12]]))


def _status(served: _Served) -> protocol.PodmanImage:
    image = served.open
    state = protocol.UNSERVED if image is None else "local" if image.local else "serving"
    return protocol.PodmanImage(
        id=served.image.id,
        names=list(served.image.names or []),
        digest=served.image.original,
        state="quarantined" if image is not None and image.quarantined else state,
        mode=served.mode.value if served.mode else "",
        why=image.shown.why if image else "",
        local_bytes=image.fill.done_bytes if image else 0,
        total_bytes=image.fill.total_bytes if image else 0,
        problem=served.problem or (image.fill.problem if image else ""),
    )
