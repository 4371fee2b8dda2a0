"""From a reference to an image and its file index: known here, given, found, or built."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from index.errors import about
from snapshotter.daemon.errors import NoIndexError
from snapshotter.daemon.protocol import Progress
from snapshotter.images.discovery import FoundIndex, OnPack, Trust, accept, ask, look_up
from snapshotter.images.indexing import build_index
from snapshotter.nursery import open_nursery
from snapshotter.registry.image import configure, find_manifest
from snapshotter.registry.platform import Platform

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from snapshotter.daemon.knowledge import Knowledge
    from snapshotter.daemon.room import Room
    from snapshotter.registry.image import ImageSource, ResolvedImage
    from snapshotter.registry.manifest import Descriptor, Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference stands for; the image, if this node has had it; and the artifacts with its
    file indexes, if they were `asked` for."""

    manifest: Manifest
    known: ResolvedImage | None = None
    asked: Sequence[Descriptor] | None = None


class Lookup:
    """For all images of the daemon, and the trio thread."""

    def __init__(self, knowledge: Knowledge, room: Room, trusted: Collection[Trust]) -> None:
        """Indexes are believed if they come in one of the `trusted` ways."""
        self._knowledge = knowledge
        self._room = room
        self._trusted = trusted

    async def resolve(self, source: ImageSource, reference: str, platform: str) -> Resolved:
        """The manifest that a reference stands for. `platform` "" is the host's.

        Who names a manifest by its digest saves a round trip: its file indexes are asked for at
        the same time. Raises FirstByteError.
        """
        wanted = Platform.parse(platform) if platform else Platform.host()
        known = await self._knowledge.resolve(reference)
        if known is not None:
            return Resolved(known.manifest, known)
        _, _, digest = reference.partition("@")
        if not digest or Trust.REFERRER not in self._trusted:
            return Resolved(await find_manifest(source, wanted))
        asked: Sequence[Descriptor] | None = None

        async def ask_for_indexes() -> None:
            nonlocal asked
            asked = await ask(source, digest)

        async with open_nursery() as nursery:
            nursery.start_soon(ask_for_indexes)
            manifest = await find_manifest(source, wanted)
        if manifest.descriptor.digest != digest:  # it was a list of platforms
            asked = None
        return Resolved(manifest, asked=asked)

    async def find(
        self,
        source: ImageSource,
        resolved: Resolved,
        *,
        given: Path | None,
        may_build: bool,
        on_pack: OnPack,
        on_raw: Callable[[int], Callable[[bytes], None]],
        report: Callable[[Progress], None],
    ) -> tuple[ResolvedImage, FoundIndex]:
        """The image of a manifest with its index, which is on this node from then on.

        `given` is a file with the index; None takes the one that was used last, else looks for one
        in the registry and, if `may_build`, builds one. `on_pack` is told of startup packs;
        `on_raw` makes, for a layer, what takes its raw space while an index is built. Raises
        NoIndexError if there is none, other FirstByteErrors if the image cannot be read.
        """
        manifest = resolved.manifest
        if given is not None:
            image = resolved.known or await configure(source, manifest)
            found = await self._given(image, given)
        else:
            recalled = await self._knowledge.recall(manifest.descriptor.digest, None)
            if recalled is not None:
                return replace(recalled[0], name=source.name), recalled[1]
            image, published = await look_up(
                source, manifest, self._trusted, asked=resolved.asked, on_pack=on_pack
            )
            if published is None and not may_build:
                raise NoIndexError(f"{image.name} has no file index that can be used")
            found = published or await self._build(source, image, on_raw, report)
        kept = await self._room.written(partial(self._knowledge.keep_index, found.index))
        return image, replace(found, index=kept)

    async def _given(self, image: ResolvedImage, path: Path) -> FoundIndex:
        data = await trio.Path(path).read_bytes()
        with about(str(path)):
            index = await trio.to_thread.run_sync(accept, data, image)
        return FoundIndex(index, Trust.GIVEN)

    async def _build(
        self,
        source: ImageSource,
        image: ResolvedImage,
        on_raw: Callable[[int], Callable[[bytes], None]],
        report: Callable[[Progress], None],
    ) -> FoundIndex:
        """An index that is built here, by reading every layer."""
        size = sum(layer.size for layer in image.manifest.layers)
        log.info("%s has no file index: reading all %d bytes of it to build one", image.name, size)
        index = await build_index(
            source,
            image,
            on_progress=lambda done: report(Progress("building the file index", done, size)),
            on_raw=on_raw,
        )
        return FoundIndex(index, Trust.LOCAL)
