"""What the layer store keeps on disk of layers: their trees, and blobs that were read whole.

A layer's tree is made from the headers of the tars up to it, once a node; its blob is fetched when
podman first reads it, to push or save the image. Both are there for as long as the image is held.
"""

from __future__ import annotations

import logging
import mmap
from typing import TYPE_CHECKING

import trio

from index.erofs.reader import Image as Tree
from index.layertree import OPAQUE, USER_OPAQUE
from snapshotter.images.layer_trees import build_layer_trees
from snapshotter.podman import rootless
from snapshotter.store.durable import make_directory, remove_file, write_file
from snapshotter.store.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from snapshotter.daemon.additional_layers import LayeredImage
    from snapshotter.daemon.open_image import OpenImage

log = logging.getLogger(__name__)


class LayerFiles:
    """Those of all images, in two directories. For the trio thread."""

    def __init__(self, folder: Path) -> None:
        """Raises StoreError."""
        self._trees = folder / "trees"
        self._blobs = folder / "blobs"
        for directory in (self._trees, self._blobs):
            make_directory(directory)
        self._changing = trio.Lock()

    def blob(self, digest: str) -> Path:
        """Where a layer's blob is, if it was read."""
        return self._blobs / digest.removeprefix("sha256:")

    async def trees(self, image: OpenImage) -> list[Tree]:
        """The layers' trees, lowest first, made if they are not there: headers may have to be
        fetched for that. Raises FirstByteError."""
        paths = self._trees_of(image)
        async with self._changing:
            mapped = await trio.to_thread.run_sync(_map, paths)
        if mapped is not None:
            return mapped
        opaque = USER_OPAQUE if rootless.user() else OPAQUE
        made = await build_layer_trees(image.found.index, image.layers, opaque=opaque)
        async with self._changing:
            for path, tree in zip(paths, made, strict=True):
                await trio.to_thread.run_sync(write_file, path, [tree])
            mapped = await trio.to_thread.run_sync(_map, paths)
        assert mapped is not None
        return mapped

    async def remove(self, image: LayeredImage, others: Iterable[LayeredImage]) -> None:
        """Remove what is of an image, and of no other that is open. Raises StoreError."""
        gone = self._of(image).difference(*map(self._of, others))
        await self._remove(gone)

    async def keep_only(self, images: Iterable[LayeredImage]) -> None:
        """Remove what is of none of these images, as a daemon that died may have left it, or one
        that was stopped while it held more."""
        kept = {path for image in images for path in self._of(image)}
        there = {path for folder in (self._trees, self._blobs) for path in folder.iterdir()}
        try:
            await self._remove(there - kept)
        except StoreError as error:
            log.warning("what no image needs any more stays: %s", error)

    async def _remove(self, paths: Iterable[Path]) -> None:
        async with self._changing:
            for path in paths:
                await trio.to_thread.run_sync(remove_file, path)

    def _of(self, image: LayeredImage) -> set[Path]:
        blobs = (self.blob(layer.digest) for layer in image.resolved.manifest.layers)
        return {*self._trees_of(image.open), *blobs}

    def _trees_of(self, image: OpenImage) -> list[Path]:
        digest = image.found.index.digest.hex()
        return [self._trees / f"{digest}.{number}" for number in range(len(image.layers))]


def _map(paths: Iterable[Path]) -> list[Tree] | None:
    """What these files hold; None if one of them is not there. Removed later, they stay mapped."""
    mapped = []
    for path in paths:
        try:
            with path.open("rb") as file:
                mapped.append(Tree(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)))
        except FileNotFoundError:
            return None
    return mapped
