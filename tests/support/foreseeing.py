"""Images, and what a start of them is expected to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from index.builder import build
from index.extents import FileExtents
from index.tables import CHUNK_SIZE, Codec
from snapshotter.images.foresight import Foresight
from snapshotter.registry.manifest import RunConfig
from tests.support.blobs import make_layer
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.fetching import Node
    from tests.support.sources import Fault

HEADER = 512  # bytes before a file in a tar


def entries(files: dict[str, bytes]) -> Iterator[bytes]:
    """Each file has chunks of its own, so that these tell files."""
    for name, content in files.items():
        yield file(name.encode(), content + bytes(-(len(content) + HEADER) % CHUNK_SIZE))


async def foreseen(
    node: Node,
    files: dict[str, bytes],
    *links: bytes,
    faults: list[Fault | None] | None = None,
    **config: list[str] | str,
) -> list[str]:
    """The files that a start of an image with this configuration is expected to read."""
    layer = make_layer(tar(*entries(files), *links), Codec.PLAIN)
    index = build([[layer.blob]])
    lazy, _ = node.mount(layer, *(faults or ()))
    run = RunConfig(**config)  # type: ignore[arg-type]
    await Foresight(index.tree, [lazy], run).look()
    lazy.close()
    extents = FileExtents(index.tree)
    found = {extents.at(0, chunk * CHUNK_SIZE + 4096, 1) for chunk in lazy.foreseen}
    return sorted(path.decode() for path in found if path is not None)
