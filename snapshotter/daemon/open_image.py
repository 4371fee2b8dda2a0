"""An image that is open on this node, or the lower layers of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from snapshotter.daemon.showing import Shown
    from snapshotter.fetch.fill import ImageFill
    from snapshotter.fetch.layer import LazyLayer
    from snapshotter.fuse.view import View
    from snapshotter.images.discovery import FoundIndex
    from snapshotter.registry.image import ImageSource, ResolvedImage


class OpenImage:
    """An image, or the lower layers of one, shown in the FUSE mount. Made and closed by `Images`.

    `manifests` are those that it is the image of, by digest: they may differ in anything but their
    layers. `settled` is set when the background fill has ended: all of the image is here, or it is
    in quarantine, or it was closed. `starting` is the scope of what is done for a start.
    """

    def __init__(
        self,
        manifests: dict[str, ResolvedImage],
        source: ImageSource,
        found: FoundIndex,
        shown: Shown,
        layers: list[LazyLayer],
        fill: ImageFill,
        *,
        plain_http: bool,
        local: bool,
    ) -> None:
        self.manifests = manifests
        self.source = source
        self.found = found
        self.shown = shown
        self.layers = layers
        self.fill = fill
        self.plain_http = plain_http
        self.users = 1
        self.settled = trio.Event()
        self.scope = trio.CancelScope()
        self.starting = trio.CancelScope()

        self.local = local
        """Whether every chunk is here, and layers and tree are proven to be the image's."""

    @property
    def resolved(self) -> ResolvedImage:
        """The first of `manifests`."""
        return next(iter(self.manifests.values()))

    @property
    def view(self) -> View:
        """Its tree in the FUSE mount."""
        return self.shown.view

    @property
    def digest(self) -> str:
        return self.resolved.descriptor.digest

    @property
    def is_whole(self) -> bool:
        """Whether these are all layers of the image."""
        return len(self.layers) == len(self.resolved.manifest.layers)

    @property
    def quarantined(self) -> bool:
        """Whether the image turned out not to be what its file index says."""
        return self.view.refusal is not None
