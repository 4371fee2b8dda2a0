"""The ways from an image in a registry to a container that runs, which the demo compares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from snapshotter.demo.container import Container
from snapshotter.demo.containerd import Containerd
from snapshotter.demo.podman import Podman, PodmanContainer
from snapshotter.demo.ready import Watched
from snapshotter.demo.task import Task

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from snapshotter.demo.lazy import Node
    from snapshotter.demo.workspace import Workspace
    from snapshotter.registry.manifest import RunConfig

Runtime = Literal["runc", "containerd", "podman"]


class Stoppable(Watched, Protocol):
    """A container that was started."""

    def stop(self) -> None:
        """Kill its workload and remove it."""


class Way(Protocol):
    """One way for one image. What it needs to have running does run when it is made."""

    def provide(self) -> None:
        """Have the image ready to be started."""

    def start(self, environment: Mapping[str, str]) -> Stoppable:
        """Start the image's own command; `environment` goes before what the image sets."""

    def close(self) -> None:
        """End what was started and mounted; without it, the workspace does it in the end."""


class LazyMount:
    """FirstByte mounts the image, runc runs it."""

    def __init__(self, workspace: Workspace, node: Node, reference: str, image: RunConfig) -> None:
        self._workspace = workspace
        self._node = node
        self._reference = reference
        self._image = image
        self._directory = workspace.directory("lazy")

    def provide(self) -> None:
        self._node.mount(self._reference, self._directory)

    def start(self, environment: Mapping[str, str]) -> Container:
        return _run(self._workspace, "lazy-start", self._directory, self._image, environment)

    def close(self) -> None:
        self._node.unmount(self._directory)


class UnpackedMount:
    """containerd pulls and unpacks the image, runc runs it."""

    def __init__(self, workspace: Workspace, reference: str, image: RunConfig) -> None:
        self._workspace = workspace
        self._reference = reference
        self._image = image
        self._containerd = Containerd(workspace, "containerd")
        self._directory = workspace.directory("full")

    def provide(self) -> None:
        self._containerd.pull(self._reference)

    def start(self, environment: Mapping[str, str]) -> Container:
        self._containerd.mount(self._reference, self._directory)
        return _run(self._workspace, "full-start", self._directory, self._image, environment)

    def close(self) -> None:
        self._containerd.stop()


class Pull:
    """containerd pulls the image and runs it; lazily if there is a node to serve it."""

    def __init__(self, workspace: Workspace, name: str, reference: str, node: Node | None) -> None:
        """`name` must be new in the workspace."""
        self._reference = reference
        self._containerd = Containerd(workspace, name, node.address if node else None)

    def provide(self) -> None:
        self._containerd.pull(self._reference)

    def start(self, environment: Mapping[str, str]) -> Task:
        task = Task(self._containerd, "start", self._reference)
        task.start(environment)
        return task

    def close(self) -> None:
        self._containerd.stop()


class PodmanRun:
    """podman pulls the image and runs it; or a node puts it into an image store for podman."""

    def __init__(self, workspace: Workspace, name: str, reference: str, node: Node | None) -> None:
        """`name` must be new in the workspace."""
        self._reference = reference
        self._node = node
        stores = [node.places.podman_images] if node else []
        self._podman = Podman(workspace, name, image_stores=stores)

    def provide(self) -> None:
        if self._node is not None:
            self._node.add_to_podman(self._reference)
        else:
            self._podman.pull(self._reference)

    def start(self, environment: Mapping[str, str]) -> PodmanContainer:
        container = PodmanContainer(self._podman, "start", self._reference)
        container.start(environment)
        return container

    def close(self) -> None:
        """Nothing runs between commands."""


def _run(
    workspace: Workspace,
    name: str,
    root: Path,
    image: RunConfig,
    environment: Mapping[str, str],
) -> Container:
    container = Container(workspace, name, root)
    container.start(image, environment)
    return container
