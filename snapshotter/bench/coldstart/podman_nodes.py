"""Nodes whose containers podman runs: after a pull, from an image store, from a layer store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.bench.coldstart.nodes import (
    Node,
    Usage,
    disk_of,
    remove,
    usage_of,
)
from snapshotter.demo import lazy
from snapshotter.demo.errors import DemoError
from snapshotter.demo.lazy import Local
from snapshotter.demo.podman import Podman, PodmanContainer

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.demo.workspace import Workspace


class Pulling(Node):
    """podman by itself, which fetches and unpacks all before a start. It has no daemon."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self._podman = Podman(workspace, name)
        self._containers = _Containers(self._podman)
        self._unpacked: list[Path] = []

    def pull(self, reference: str) -> None:
        self._podman.pull(reference)
        # Later there are those that containers write in, too.
        self._unpacked = [*self._podman.graph_root.glob("overlay/*/diff")]

    def workload(self, image: Image, reference: str, network: Path) -> PodmanContainer:
        return self._containers.make(image, reference, network)

    def usage(self) -> Usage:
        return Usage(disk_bytes=disk_of([self._podman.graph_root]))

    def close(self) -> None:
        self._containers.stop()
        self._podman.unmount()
        remove(self._podman.directory)

    def unpacked(self) -> list[Path]:
        return self._unpacked


class _Lazy(Node):
    """podman with a store of FirstByte's; a daemon runs before podman does."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.firstbyte = lazy.Node(workspace, name)
        self._directory = workspace.path / name
        places = self.firstbyte.places
        self.podman = Podman(
            workspace,
            f"{name}-podman",
            image_stores=[places.podman_images],
            layer_stores=[places.podman_layers],
        )
        self._containers = _Containers(self.podman)

    def workload(self, image: Image, reference: str, network: Path) -> PodmanContainer:
        return self._containers.make(image, reference, network)

    def needed_bytes(self) -> int:
        return self.firstbyte.needed_bytes()

    def fuse_requests(self) -> int:
        return self.firstbyte.status().fuse_requests

    def usage(self) -> Usage:
        return usage_of(self.firstbyte.pid, [self.firstbyte.places.root, self.podman.graph_root])

    def close(self) -> None:
        self._containers.stop()
        self.podman.unmount()
        self.firstbyte.stop()
        remove(self.podman.directory)
        remove(self._directory)


class ImageStore(_Lazy):
    """Images are put into podman's image store by `firstbyte podman add`, not pulled."""

    def pull(self, reference: str) -> None:
        self.firstbyte.add_to_podman(reference)

    def local(self) -> Local:
        return self.firstbyte.local()


class LayerStore(_Lazy):
    """`podman pull` finds an image's layers in FirstByte's layer store."""

    def pull(self, reference: str) -> None:
        self.podman.pull(reference)

    def local(self) -> Local:
        if not self.podman.unpulled():
            raise DemoError(
                "podman has pulled the layers itself, and not found them in the layer store",
                hint="docs/podman.md tells which podman finds them there",
            )
        images = self.firstbyte.disk_usage().images
        return Local(sum(image.local for image in images), sum(image.size for image in images))


class _Containers:
    """The containers of one podman."""

    def __init__(self, podman: Podman) -> None:
        self._podman = podman
        self._made: list[PodmanContainer] = []

    def make(self, image: Image, reference: str, network: Path) -> PodmanContainer:
        container = PodmanContainer(
            self._podman,
            f"start-{len(self._made)}",
            reference,
            command=image.command,
            network=network,
        )
        self._made.append(container)
        return container

    def stop(self) -> None:
        for container in self._made:
            container.stop()
