"""A layer as podman and CRI-O have it from our additional layer store: its tree, its blob, and
what containers/storage wants to know of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from typing import TYPE_CHECKING

import trio

from index.errors import IntegrityError
from index.tables import Codec
from snapshotter.fuse.flat import FlatFile
from snapshotter.fuse.view import View
from snapshotter.registry.reading import read_blob
from snapshotter.store.durable import sync_file

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.daemon.layer_files import LayerFiles
    from snapshotter.daemon.open_image import OpenImage
    from snapshotter.podman.held import HeldImage
    from snapshotter.registry.image import ResolvedImage
    from snapshotter.registry.manifest import Descriptor

log = logging.getLogger(__name__)

TOC_ANNOTATIONS = (
    "containerd.io/snapshot/stargz/toc.digest",
    "io.github.containers.zstd-chunked.manifest-checksum",
)
"""Where an image names the tables of contents of its layers, which podman 5.1 and later ask for."""

COMPRESSIONS = {Codec.PLAIN: 0, Codec.GZIP: 2, Codec.ZSTD: 4}
"""containers/storage `pkg/archive` Compression."""


class AdditionalLayer:
    """One layer of a held image, as `podman.layer_store.StoredLayer`."""

    def __init__(self, image: LayeredImage, number: int, tree: View, blob_slot: int) -> None:
        self._image = image
        self._number = number
        self._descriptor = image.resolved.manifest.layers[number]
        self._fetching = trio.Lock()
        self.tree = tree
        self.blob = View(
            name=tree.name + b".blob",
            slot=blob_slot,
            reference=tree.reference,
            image=FlatFile(self._descriptor.size, whole_blocks=False),
            layers=[self],
            raw_size=0,
        )

    @property
    def names(self) -> list[str]:
        """The digests that podman may ask for."""
        return [self._descriptor.digest, *tables_of(self._descriptor)]

    def info(self, digest: str) -> bytes:
        """containers/storage's Layer: with the layer's digest as it wants it before 1.54, else with
        that of the table of contents."""
        table = self._image.open.layers[self._number].table
        diff_id = self._image.resolved.config.rootfs.diff_ids[self._number]
        fields: dict[str, object] = {
            "compressed-size": self._descriptor.size,
            "diff-size": table.raw_size,
            "compression": COMPRESSIONS.get(table.codec, 0),
        }
        if digest == self._descriptor.digest:
            fields |= {"compressed-diff-digest": digest, "diff-digest": diff_id}
        else:
            fields |= {"toc-digest": digest, "flags": {"expected-layer-diffid": diff_id}}
        return json.dumps(fields).encode()

    def read_now(self, offset: int, length: int) -> None:
        """As of `RawSpace`, of the blob."""

    async def read(self, offset: int, length: int) -> bytes:
        """From a copy that is fetched, whole and verified, when somebody first reads it."""
        async with self._fetching:
            path = self._image.files.blob(self._descriptor.digest)
            if not await trio.Path(path).exists():
                await self._fetch(path)
        return await trio.to_thread.run_sync(_read, path, offset, length)

    async def _fetch(self, path: Path) -> None:
        log.info("fetching layer %s whole, to be pushed or saved", self._descriptor.digest)
        unfinished = path.with_suffix(".new")
        try:
            await self._download(unfinished)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.Path(unfinished).unlink(missing_ok=True)
            raise
        # What has its name is never verified again.
        await trio.to_thread.run_sync(sync_file, unfinished)
        await trio.Path(unfinished).rename(path)

    async def _download(self, path: Path) -> None:
        hasher = hashlib.sha256()
        async with await trio.open_file(path, "wb") as file:

            async def consume(piece: bytes) -> None:
                hasher.update(piece)
                await file.write(piece)

            await read_blob(self._image.open.source, self._descriptor, consume)
        if f"sha256:{hasher.hexdigest()}" != self._descriptor.digest:
            self._image.open.source.doubt(self._descriptor)
            raise IntegrityError(f"layer {self._descriptor.digest} came with other bytes")


class LayeredImage:
    """A held image that is open. `idle` counts the sweeps that found nobody using it."""

    def __init__(
        self, held: HeldImage, resolved: ResolvedImage, image: OpenImage, files: LayerFiles
    ) -> None:
        self.held = held
        self.resolved = resolved
        self.open = image
        self.files = files
        self.layers: list[AdditionalLayer] = []
        self.idle = 0

    def number_of(self, digest: str) -> int | None:
        """Where a layer is; not if it is there twice, since overlayfs takes no directory twice."""
        numbers = [number for number, layer in enumerate(self.layers) if digest in layer.names]
        return numbers[0] if len(numbers) == 1 else None


def tables_of(layer: Descriptor) -> list[str]:
    """The digests of a layer's tables of contents."""
    annotations = layer.annotations or {}
    return [annotations[key] for key in TOC_ANNOTATIONS if key in annotations]


def _read(path: Path, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
