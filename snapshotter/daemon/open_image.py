"""An image that is open on this node, or the lower layers of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from snapshotter.daemon.showing import Shown
    from snapshotter.fetch.fill import ImageFill
    from snapshotter.fetch.layer import LazyLayer
    from snapshotter.fetch.startup import StartupRecorder
    from snapshotter.fetch.trace import StartTrace
    from snapshotter.fuse.view import View
    from snapshotter.images.discovery import FoundIndex
    from snapshotter.registry.image import ImageSource, ResolvedImage


class OpenImage:
    """An image, or the lower layers of one, shown in the FUSE mount. Made and closed by `Images`.

    `manifests` are those that it is the image of, by digest: they may differ in anything but their
    layers. `settled` is set when the background fill has ended: all of the image is here, or it is
    in quarantine, or it was closed. When some of it is evicted later, `diminished` is set, and both
    events give way to new ones. `starting` is the scope of what is done for a start, whose first
    touches go to `recorder`, if they are recorded.
    """

    def __init__(
        self,
        manifests: dict[str, ResolvedImage],
        source: ImageSource,
        found: FoundIndex,
        shown: Shown,
        layers: list[LazyLayer],
        fill: ImageFill,
        trace: StartTrace,
        recorder: StartupRecorder | None,
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
        self.trace = trace
        self.recorder = recorder
        self.plain_http = plain_http
        self.users = 1
        self.settled = trio.Event()
        self.diminished = trio.Event()
        self.scope = trio.CancelScope()
        self.starting = trio.CancelScope()

        self._proven = local

    @property
    def local(self) -> bool:
        """Whether every chunk is here, and layers and tree are proven to be the image's."""
        return self._proven and all(layer.stored.complete for layer in self.layers)

    def become_local(self) -> None:
        """All of it is here, and proven."""
        self._proven = True

    def diminish(self) -> None:
        """Some of it is not here any more."""
        self._proven = False
        if self.settled.is_set():
            diminished = self.diminished
            self.settled, self.diminished = trio.Event(), trio.Event()
            diminished.set()

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
