"""What the snapshotter needs from whoever serves images lazily."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from snapshotter.containerd.labels import ImageLabels


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """A layer that is served lazily, and where it is in its image.

    `image` is the image manifest's digest. `depth` is 1 for the lowest layer: the chain that the
    layer ends is layers 1 to `depth`. `content_key` is hexadecimal and equal for equal layers of
    any image. `top` says that no layer of the image is above.
    """

    image: str
    depth: int
    content_key: str
    top: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """Why an image is not served lazily.

    `kind` is a short word for counters: "no-index", "policy", "unsupported", "network", "other".
    `reason` is one line for people.
    """

    reference: str
    image: str
    reason: str
    kind: str


class LazyImages(Protocol):
    """The images that are served lazily on this node."""

    def placing(self, labels: ImageLabels) -> AbstractAsyncContextManager[LayerPlace | Refused]:
        """Where a layer is (the network is asked at most once an image), or why it is nowhere.

        The image cannot go while the block runs: who adds a snapshot calls `retain` in it.
        """

    async def lower(self, image: str, depth: int) -> Path:
        """The directory that shows layers 1 to `depth` merged, opened if need be.

        Raises FirstByteError.
        """

    def retain(self, image: str, depth: int) -> None:
        """There is one more snapshot of this layer of an image."""

    async def release(self, image: str, depth: int) -> None:
        """There is one less. With the image's last one its disk space is freed."""

    async def disk_usage(self, content_key: str) -> int:
        """Bytes that the layer's data takes on disk now."""
