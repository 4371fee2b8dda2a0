"""Where images come from and go to, whatever it is: a registry or a directory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from snapshotter.registry import manifest as manifests
from snapshotter.registry.errors import ProtocolError
from snapshotter.registry.manifest import ImageConfig, Manifest, PlatformList
from snapshotter.registry.platform import select

if TYPE_CHECKING:
    from snapshotter.registry.manifest import Descriptor
    from snapshotter.registry.platform import Platform

PIECE = 256 << 10
"""Bytes of the largest piece that a blob is read in."""

_MAX_NESTING = 3  # platform lists may list lists; nobody needs more, and a cycle must end


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """One image, for one platform, by digest: everything but its layers.

    `name` is for people; `descriptor` names `manifest`. `config` was read from `raw_config`; its
    `rootfs.diff_ids` has one entry per layer.
    """

    name: str
    descriptor: Descriptor
    manifest: Manifest
    config: ImageConfig
    raw_config: bytes


Body = Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes]]]
"""Starts reading a blob; called once for each attempt to write it. `ImageSource.open_range` is of
the same kind, so that a blob is copied with a lambda."""


class ImageSource(Protocol):
    """One named image somewhere, to be read."""

    @property
    def name(self) -> str:
        """The image's name, for people."""

    async def fetch_root(self) -> Manifest | PlatformList:
        """What the name stands for now. Verified if the name holds a digest."""

    async def fetch_manifest(self, descriptor: Descriptor) -> Manifest | PlatformList:
        """A manifest by digest, verified."""

    async def resolve(self, platform: Platform) -> ResolvedImage:
        """The image for `platform`, as `resolve` below."""

    async def fetch_blob(self, descriptor: Descriptor, *, max_size: int) -> bytes:
        """A whole blob, verified. ProtocolError if it is larger than `max_size` bytes."""

    def open_range(
        self, descriptor: Descriptor, start: int, end: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Exactly the bytes `start` … `end` (exclusive) of a blob, in pieces of at most PIECE.

        One attempt: raises a RegistryError when it fails, at the start or on the way. Nothing is
        verified. ValueError if the range is not within the blob.
        """

    def doubt(self, descriptor: Descriptor) -> None:
        """Ranges of a blob gave something else than they should: from now on it is read from
        elsewhere first, if it can be."""

    async def referrers(self, digest: str, artifact_type: str) -> list[Descriptor]:
        """The artifacts of one type whose subject is the manifest `digest`."""


class ImageSink(Protocol):
    """One named image somewhere, to be written. Blobs come before manifests that name them."""

    @property
    def name(self) -> str:
        """The image's name, for people."""

    async def write_blob(self, descriptor: Descriptor, body: Body) -> None:
        """Write a blob of known digest, unless it is there.

        IntegrityError if `body` gives something else than `descriptor` says; nothing is kept then.
        """

    async def add_blob(self, media_type: str, body: AsyncIterator[bytes]) -> Descriptor:
        """Write a blob whose digest only its end tells. One attempt."""

    async def write_manifest(self, manifest: Manifest | PlatformList, *, named: bool) -> Descriptor:
        """Write a manifest by digest, and under the sink's own name if `named`.

        One with a subject can be found by `ImageSource.referrers` afterwards.
        """


async def resolve(source: ImageSource, platform: Platform) -> ResolvedImage:
    """Follow a source's name to the manifest and configuration for `platform`.

    A name that stands for one image, not a list, is taken whatever its platform is;
    `ResolvedImage.config.platform` tells. Raises NotFoundError if no platform fits,
    UnsupportedError if it is no image, IntegrityError or ProtocolError if it makes no sense.
    """
    return await configure(source, await find_manifest(source, platform))


async def find_manifest(source: ImageSource, platform: Platform) -> Manifest:
    """The first half of `resolve`: one round trip, or two if the name stands for a list."""
    root = await source.fetch_root()
    for _ in range(_MAX_NESTING):
        if isinstance(root, Manifest):
            break
        root = await source.fetch_manifest(select(root.manifests, platform, source.name))
    else:
        raise ProtocolError(f"{source.name} is platform lists within platform lists")
    manifests.check_image(root, source.name)
    return root


async def configure(source: ImageSource, manifest: Manifest) -> ResolvedImage:
    """The second half of `resolve`: one more round trip."""
    raw = await source.fetch_blob(manifest.config, max_size=manifests.MAX_MANIFEST)
    config = manifests.parse_config(raw, f"the configuration of {source.name}")
    if len(config.rootfs.diff_ids) != len(manifest.layers):
        raise ProtocolError(
            f"{source.name} has {len(manifest.layers)} layers, but its configuration "
            f"lists {len(config.rootfs.diff_ids)}"
        )
    return ResolvedImage(source.name, manifest.descriptor, manifest, config, raw)


def body_of(data: bytes) -> Body:
    """A blob that is in memory, to be written."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]

    @asynccontextmanager
    async def opened() -> AsyncGenerator[AsyncIterator[bytes], None]:
        async with aclosing(pieces()) as iterator:
            yield iterator

    return opened


def check_range(descriptor: Descriptor, start: int, end: int) -> None:
    """ValueError unless `start` … `end` lies within the blob."""
    if not 0 <= start <= end <= descriptor.size:
        raise ValueError(f"range {start}…{end} is not within {descriptor.size} bytes")
