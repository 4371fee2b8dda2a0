"""Finding the file index of an image: pinned by the image itself, or among its referrers."""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import trio

from index.erofs.validate import validate
from index.errors import FirstByteError, IntegrityError
from index.file import FileIndex
from snapshotter.images.artifact import (
    ARTIFACT_TYPE,
    DIGEST_ANNOTATION,
    LAYER_ANNOTATION,
    PACKED_ANNOTATION,
    blobs_of,
    check_belongs,
    listed_blobs,
    named_blob,
)
from snapshotter.registry.errors import RegistryError
from snapshotter.registry.image import configure
from snapshotter.registry.manifest import Descriptor, Manifest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from snapshotter.registry.image import ImageSource, ResolvedImage

log = logging.getLogger(__name__)

MAX_INDEX = 1 << 30
"""Bytes of the largest index blob that is fetched; 1 000 000 files take about 20 MB."""


class Trust(enum.Enum):
    """Whose word an index is. It decides what is believed before the image is fully local."""

    ANNOTATION = "annotation"  # the image's own digest pins it
    REFERRER = "referrer"  # somebody who may push to the repository attached it
    GIVEN = "given"  # somebody who may mount images named a file
    LOCAL = "local"  # this node built it from the layers, or has proven that it is theirs


@dataclass(frozen=True, slots=True)
class FoundIndex:
    """A validated index of the image that was asked for, and the startup pack that goes with it.
    `unpacked`: there is none, as the registry says."""

    index: FileIndex
    trust: Trust
    pack: Descriptor | None = None
    unpacked: bool = False


OnPack: TypeAlias = "Callable[[Descriptor], Callable[[], None]]"
"""Is told of a pack before the index is fetched, so that both can be asked for at the same time.
What it returns is called when the index has come: it has the link first."""


def _nothing() -> None:
    pass


async def find_index(
    source: ImageSource,
    image: ResolvedImage,
    trusted: Collection[Trust] = (Trust.ANNOTATION, Trust.REFERRER),
    *,
    on_pack: OnPack = lambda _: _nothing,
) -> FoundIndex | None:
    """The index that the image pins, else the first good one among its referrers, else None.

    What is not `trusted` is not even asked for. Of several referrers, those with the newest startup
    pack come first.
    A candidate that is damaged, malformed or of other layers is logged and passed over, as is a
    registry that cannot be asked: an image without an index is slower, not broken.
    """

    async def resolved() -> ResolvedImage:
        return image

    return await _Search(source, image.manifest, resolved, on_pack).run(trusted)


async def ask(source: ImageSource, digest: str) -> list[Descriptor]:
    """The artifacts with a file index of the manifest of that digest. None too if the registry
    cannot be asked: it is logged."""
    try:
        return await source.referrers(digest, ARTIFACT_TYPE)
    except RegistryError as error:
        log.warning("cannot ask for file indexes of %s: %s", source.name, error)
        return []


async def look_up(
    source: ImageSource,
    manifest: Manifest,
    trusted: Collection[Trust],
    *,
    asked: Sequence[Descriptor] | None = None,
    on_pack: OnPack = lambda _: _nothing,
) -> tuple[ResolvedImage, FoundIndex | None]:
    """The configuration of an image and, at the same time, its index as `find_index` has it: one
    round trip if the image pins it, two if it is among the referrers, unless `ask` was `asked`.

    Raises what `configure` raises.
    """
    image: ResolvedImage | None = None
    found: FoundIndex | None = None
    failure: FirstByteError | None = None
    configured = trio.Event()

    async def resolved() -> ResolvedImage:
        await configured.wait()
        assert image is not None
        return image

    async def search() -> None:
        nonlocal found
        found = await _Search(source, manifest, resolved, on_pack, asked).run(trusted)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(search)
        try:
            image = await configure(source, manifest)
            configured.set()
        except FirstByteError as error:
            failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return await resolved(), found


async def find_pack(
    source: ImageSource,
    manifest_digest: str,
    index_digest: bytes,
    asked: Sequence[Descriptor] | None = None,
) -> Descriptor | None:
    """The newest startup pack among the referrers of an image that pins its index.

    `asked` is what `ask` has found, if it was. None too if the registry cannot be asked: it is
    logged.
    """
    wanted = f"sha256:{index_digest.hex()}"
    artifacts = await ask(source, manifest_digest) if asked is None else asked
    try:
        packed = [one for one in artifacts if _packed_at(one)]
        for artifact in sorted(packed, key=_packed_at, reverse=True):
            if artifact.annotation(DIGEST_ANNOTATION) == wanted:
                _, pack = listed_blobs(artifact) or await _blobs_of(source, artifact)
                return pack
    except FirstByteError as error:
        log.warning("cannot ask for the startup pack of %s: %s", source.name, error)
    return None


def accept(data: bytes, image: ResolvedImage) -> FileIndex:
    """Take in an index from outside: every section verified, the tree validated, the layers
    compared. Takes a while for large ones (see docs/benchmarks.md): call it in a thread.

    Raises FormatError, IntegrityError or UnsupportedError.
    """
    index = FileIndex.load(data)
    check_belongs(index, image)
    validate(index.tree, [table.raw_size for table in index.layers])
    return index


async def _blobs_of(
    source: ImageSource, artifact: Descriptor
) -> tuple[Descriptor, Descriptor | None]:
    manifest = await source.fetch_manifest(artifact)
    if not isinstance(manifest, Manifest):
        raise IntegrityError("the artifact is no manifest")
    return blobs_of(manifest)


def _packed_at(artifact: Descriptor) -> str:
    """Sorts artifacts: those without a startup pack first, then by its age."""
    return artifact.annotation(PACKED_ANNOTATION) or ""


class _Search:
    """For the index of one image. What it fetches is only looked into when `resolved` returns."""

    def __init__(
        self,
        source: ImageSource,
        manifest: Manifest,
        resolved: Callable[[], Awaitable[ResolvedImage]],
        on_pack: OnPack,
        asked: Sequence[Descriptor] | None = None,
    ) -> None:
        self._source = source
        self._manifest = manifest
        self._resolved = resolved
        self._on_pack = on_pack
        self._asked = asked

    async def run(self, trusted: Collection[Trust]) -> FoundIndex | None:
        pinned = self._pinned() if Trust.ANNOTATION in trusted else None
        if pinned is not None:
            index = await self._try(pinned)
            if index is not None:
                return await self._with_pack(index)
        if Trust.REFERRER not in trusted:
            return None
        artifacts = self._asked
        if artifacts is None:
            artifacts = await ask(self._source, self._manifest.descriptor.digest)
        for artifact in sorted(artifacts, key=_packed_at, reverse=True):
            found = await self._try_artifact(artifact)
            if found is not None:
                return found
        return None

    async def _with_pack(self, index: FileIndex) -> FoundIndex:
        """A pinned index. Its pack is for later, if it takes a round trip to learn of it."""
        asked, digest = self._asked, self._manifest.descriptor.digest
        if asked is None:
            return FoundIndex(index, Trust.ANNOTATION)
        pack = await find_pack(self._source, digest, index.digest, asked)
        return FoundIndex(index, Trust.ANNOTATION, pack, unpacked=pack is None)

    async def _try_artifact(self, artifact: Descriptor) -> FoundIndex | None:
        try:
            blob, pack = listed_blobs(artifact) or await _blobs_of(self._source, artifact)
        except FirstByteError as error:
            log.warning("file index %s of %s: %s", artifact.digest, self._source.name, error)
            return None
        come = _nothing if pack is None else self._on_pack(pack)
        index = await self._try(blob, come)
        return None if index is None else FoundIndex(index, Trust.REFERRER, pack)

    async def _try(self, blob: Descriptor, come: Callable[[], None] = _nothing) -> FileIndex | None:
        try:
            data = await self._source.fetch_blob(blob, max_size=MAX_INDEX)
            come()
            return await trio.to_thread.run_sync(accept, data, await self._resolved())
        except FirstByteError as error:
            log.warning(
                "file index %s of %s is not used: %s", blob.digest, self._source.name, error
            )
            return None

    def _pinned(self) -> Descriptor | None:
        values = (layer.annotation(LAYER_ANNOTATION) for layer in self._manifest.layers)
        value = next((value for value in values if value is not None), None)
        if value is None:
            return None
        try:
            return named_blob(value, ARTIFACT_TYPE)
        except (FirstByteError, ValueError) as error:
            log.warning("%s pins its file index as %r: %s", self._source.name, value, error)
            return None
