"""Images that are "served lazily" from plain directories, and what containerd does with mounts."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from index.errors import FirstByteError
from snapshotter.containerd.lazy import LayerPlace, Refused
from snapshotter.mounts import syscalls
from snapshotter.mounts.syscalls import MountFlag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from snapshotter.containerd.labels import ImageLabels
    from snapshotter.containerd.snapshots import Mount

_REMOUNT = MountFlag(1 << 5)  # MS_REMOUNT
_RECURSIVE = MountFlag(1 << 14)  # MS_REC


def digest(name: str) -> str:
    """A digest for a name that people can read in failures."""
    return "sha256:" + name.encode().hex().ljust(64, "0")


def layer_labels(image: str, layer: str, target: str) -> dict[str, str]:
    """What containerd says when it prepares a layer, with readable names for digests."""
    return {
        "containerd.io/snapshot.ref": digest(target),
        "containerd.io/snapshot/cri.image-ref": f"registry.example/{image}:1",
        "containerd.io/snapshot/cri.manifest-digest": digest(image),
        "containerd.io/snapshot/cri.layer-digest": digest(layer),
        "containerd.io/snapshot/cri.image-layers": digest(layer),
    }


class DirectoryImages:
    """LazyImages over directories: `<folder>/<image>/<depth>` shows that many layers merged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.layers: dict[str, list[str]] = {}  # by image, lowest first; digests all
        self.refusals: dict[str, Refused] = {}
        self.sizes: dict[str, int] = {}  # by content key
        self.broken = ""  # why `lower` fails
        self.retained: Counter[tuple[str, int]] = Counter()
        self.released: list[tuple[str, int]] = []
        self.asked: list[ImageLabels] = []

    def add(self, image: str, *layers: str) -> None:
        """An image whose layers each add a file of their name."""
        self.layers[digest(image)] = [digest(layer) for layer in layers]
        for depth in range(1, len(layers) + 1):
            directory = self._directory(digest(image), depth)
            directory.mkdir(parents=True)
            for layer in layers[:depth]:
                (directory / layer).write_text(f"{layer} of {image}\n")

    def refuse(self, image: str, kind: str, reason: str) -> None:
        name = f"registry.example/{image}:1"
        self.refusals[digest(image)] = Refused(name, digest(image), reason, kind)

    @asynccontextmanager
    async def placing(self, labels: ImageLabels) -> AsyncIterator[LayerPlace | Refused]:
        self.asked.append(labels)
        yield self.refusals.get(labels.manifest_digest) or self._place(labels)

    def _place(self, labels: ImageLabels) -> LayerPlace:
        layers = self.layers[labels.manifest_digest]
        index = layers.index(labels.layer_digest)
        return LayerPlace(
            image=labels.manifest_digest,
            depth=index + 1,
            content_key=content_key(labels.layer_digest),
            top=index + 1 == len(layers),
        )

    async def lower(self, image: str, depth: int) -> Path:
        if self.broken:
            raise FirstByteError(self.broken, hint="look at the network")
        return self._directory(image, depth)

    def retain(self, image: str, depth: int) -> None:
        self.retained[image, depth] += 1

    async def release(self, image: str, depth: int) -> None:
        self.released.append((image, depth))

    async def disk_usage(self, content_key: str) -> int:
        return self.sizes[content_key]

    def _directory(self, image: str, depth: int) -> Path:
        return self._folder / image.replace(":", "-") / str(depth)


def content_key(layer: str) -> str:
    return layer.removeprefix("sha256:")


@contextmanager
def mounted(mounts: Sequence[Mount], target: Path) -> Iterator[Path]:
    """Make the one mount that a snapshotter answered, as containerd does, and undo it."""
    (mount,) = mounts
    target.mkdir(exist_ok=True)
    words = [option for option in mount.options if "=" in option or option == "userxattr"]
    read_only = MountFlag.READ_ONLY if "ro" in mount.options else MountFlag(0)
    if mount.type == "bind":
        syscalls.mount(mount.source, target, "", MountFlag.BIND | _RECURSIVE)
        if read_only:
            flags = _REMOUNT | MountFlag.BIND | MountFlag.READ_ONLY
            syscalls.mount("", target, "", flags)
    else:
        syscalls.mount(mount.source, target, mount.type, read_only, ",".join(words))
    try:
        yield target
    finally:
        syscalls.unmount(target, detach=True)


def listing(directory: Path) -> set[str]:
    return set(os.listdir(directory))
