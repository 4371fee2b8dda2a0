"""What a node knows of its images survives that several tasks learn something at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from index.builder import build
from snapshotter.daemon.knowledge import Knowledge
from snapshotter.images.discovery import FoundIndex, Trust
from snapshotter.registry.image import resolve
from snapshotter.registry.layout import Layout
from snapshotter.registry.platform import Platform
from snapshotter.store.layers import LayerStore
from tests.support.layouts import write_layout
from tests.support.tars import file, tar

if TYPE_CHECKING:
    from pathlib import Path

    from index.file import FileIndex
    from snapshotter.registry.image import ResolvedImage

LAYERS = [tar(file(b"name-%d" % number, b"x")) for number in range(6)]


async def an_image(path: Path, author: str = "") -> ResolvedImage:
    write_layout(path, LAYERS, compress="none", config={"author": author})
    return await resolve(Layout(path), Platform.host())


def lower(depth: int) -> FileIndex:
    return build([layer] for layer in LAYERS[:depth])


@pytest.mark.parametrize("changes", ["trust", "data"])
async def test_lower_layers_are_recorded_while_the_image_is_recorded_anew(
    tmp_path: Path, changes: str
) -> None:
    """A proof of the image ends, or its upper layers go, while containers are built on lower
    ones."""
    image = await an_image(tmp_path / "layout")
    digest = image.descriptor.digest
    with LayerStore(tmp_path / "store") as store:
        knowledge = Knowledge(tmp_path / "store")
        found = FoundIndex(await knowledge.keep_index(lower(len(LAYERS))), Trust.REFERRER)
        await knowledge.remember(image, found)

        async def change() -> None:
            if changes == "data":
                await knowledge.trim(digest, 3, store)
                return
            for trust in [Trust.LOCAL, Trust.REFERRER] * 5:
                await knowledge.remember(image, replace(found, trust=trust))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            for depth in range(1, len(LAYERS)):
                nursery.start_soon(knowledge.keep_prefix, digest, depth, lower(depth))
        for depth in range(1, len(LAYERS) + 1):
            assert await knowledge.recall(digest, depth) is not None, depth


async def test_an_index_that_is_about_to_be_recorded_stays_when_another_image_goes(
    tmp_path: Path,
) -> None:
    """Two images have all their layers, and so the index of them, in common."""
    first = await an_image(tmp_path / "first", "one")
    second = await an_image(tmp_path / "second", "another")
    with LayerStore(tmp_path / "store") as store:
        knowledge = Knowledge(tmp_path / "store")
        shared = await knowledge.keep_index(lower(len(LAYERS)))
        await knowledge.remember(second, FoundIndex(shared, Trust.LOCAL))
        # The first one is opened just now.
        kept = await knowledge.keep_index(lower(len(LAYERS)))
        await knowledge.forget(second.descriptor.digest, store, in_use=[])
        await knowledge.remember(first, FoundIndex(kept, Trust.LOCAL))
        assert await knowledge.recall(first.descriptor.digest, None) is not None
