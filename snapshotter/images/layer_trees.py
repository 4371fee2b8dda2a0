"""Making the tree of each layer of an image, for those who stack layers themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from index.erofs import writer
from index.layertree import OPAQUE, layer_trees
from snapshotter.images.prefix import scan_headers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from index.entry import Entry
    from index.file import FileIndex
    from snapshotter.images.prefix import Readable


async def build_layer_trees(
    index: FileIndex, layers: Sequence[Readable], *, opaque: bytes = OPAQUE
) -> list[bytes]:
    """An EROFS image for each layer, with the whiteouts of overlayfs; devices are the image's
    layers, from the lowest on. `opaque` is as of `layer_trees`.

    The headers of the layers are read, which means fetching those that are not here. Raises what
    that does, and TarError or UnsupportedError.
    """
    entries = await scan_headers(index, layers, len(index.layers))
    return await trio.to_thread.run_sync(_write, index, entries, opaque, abandon_on_cancel=True)


def _write(index: FileIndex, entries: list[list[Entry]], opaque: bytes) -> list[bytes]:
    sizes = [table.raw_size for table in index.layers]
    return [
        writer.write(root, sizes[: number + 1])
        for number, root in enumerate(layer_trees(entries, opaque))
    ]
