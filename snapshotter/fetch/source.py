"""Where a layer's compressed bytes come from, and where its chunks go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from index.file import FileIndex
    from index.tables import LayerTable
    from snapshotter.fetch.trace import StartTrace
    from snapshotter.registry.image import ImageSource
    from snapshotter.registry.manifest import Descriptor
    from snapshotter.store.layer import StoredLayer


class BlobSource(Protocol):
    """One blob, to be read in ranges, and the windows of its seek points."""

    @property
    def site(self) -> str:
        """The registry, or whatever it is that all blobs come from which have this in common."""

    def open_range(self, start: int, end: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Exactly the bytes `start` ... `end` (exclusive), in pieces. One attempt.

        Raises a FirstByteError at the start or on the way; an attribute `transient` that is true
        says that trying again may help, `retry_after` that it will not before so many seconds.
        """

    def doubt(self) -> None:
        """Bytes that came were wrong: if there is another place to get them from, prefer it."""

    def window(self, point: int) -> bytes | None:
        """The 32 KiB of raw space before a seek point, if decoding from it needs them."""


class PackSource(Protocol):
    """A startup pack, to be read in ranges. `str` names it for people."""

    @property
    def site(self) -> str:
        """As of a BlobSource."""

    @property
    def size(self) -> int:
        """Bytes of all of it."""

    def open_range(self, start: int, end: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """As of a BlobSource, but what is raised is a RegistryError."""

    def doubt(self) -> None:
        """As of a BlobSource."""


@dataclass(frozen=True, slots=True)
class ImagePackSource:
    """The startup pack of an image in a registry or a layout."""

    image: ImageSource
    descriptor: Descriptor

    @property
    def site(self) -> str:
        return self.image.name.partition("/")[0]

    @property
    def size(self) -> int:
        return self.descriptor.size

    def open_range(self, start: int, end: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self.image.open_range(self.descriptor, start, end)

    def doubt(self) -> None:
        self.image.doubt(self.descriptor)

    def __str__(self) -> str:
        return f"the startup pack {self.descriptor.digest} of {self.image.name}"


@dataclass(frozen=True, slots=True)
class ImageLayerSource:
    """A layer of an image in a registry or a layout, with the windows of its file index."""

    image: ImageSource
    descriptor: Descriptor
    file_index: FileIndex
    layer: int

    @property
    def site(self) -> str:
        return self.image.name.partition("/")[0]

    def open_range(self, start: int, end: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self.image.open_range(self.descriptor, start, end)

    def doubt(self) -> None:
        self.image.doubt(self.descriptor)

    def window(self, point: int) -> bytes | None:
        return self.file_index.window(self.layer, point)


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """A layer as one image has it: how to get its chunks, and where to keep them.

    Images that share a layer have an origin each but one `stored`; what one fetches the other
    need not. Compared by identity.
    """

    table: LayerTable
    stored: StoredLayer
    source: BlobSource
    trace: StartTrace | None = None
    number: int = 0
