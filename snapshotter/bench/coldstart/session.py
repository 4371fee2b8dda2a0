"""What all benchmarks of starts need: a registry behind a link, images in it, and nodes."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import count
from typing import TYPE_CHECKING

from index import profile as profiles
from snapshotter.bench.coldstart import podman_nodes
from snapshotter.bench.coldstart.containerd_nodes import Foreign, Lazy, Unpacking
from snapshotter.bench.coldstart.measure import Place, Start, measure
from snapshotter.bench.coldstart.modes import UNMODIFIED
from snapshotter.bench.coldstart.publishing import Publisher
from snapshotter.bench.link.link import DistantRegistry
from snapshotter.bench.link.namespaces import Connector
from snapshotter.bench.recipes.build import Builder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from index.profile import Profile
    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.bench.coldstart.modes import Mode
    from snapshotter.bench.coldstart.nodes import Node
    from snapshotter.bench.link.profiles import LinkProfile
    from snapshotter.demo.workspace import Workspace

_LOCAL_POLL_SECONDS = 0.1

_RECORDED = 2
"""Starts that a profile is made of: how far the kernel reads ahead differs from one to the next."""


@dataclass(frozen=True)
class Session:
    """Lasts as long as the block of `open_session`."""

    workspace: Workspace
    place: Place
    publisher: Publisher
    say: Callable[[str], None]
    _numbers: Iterator[int] = field(default_factory=count)

    @contextmanager
    def node(self, mode: Mode) -> Iterator[Node]:
        """A new node with nothing on it. Raises DemoError."""
        node = _make_node(self.workspace, f"node-{next(self._numbers)}", mode)
        try:
            yield node
        finally:
            node.close()

    def start(
        self, image: Image, mode: Mode, *, pulled: bool = False, wait_local: bool = True
    ) -> Start:
        """A start of an image that is in the registry already, or will be."""
        repository = self.publisher.repository(image, mode.variant)
        wait_local = wait_local and mode.background  # else it would never be
        return Start(image, mode.name, repository, pulled=pulled, wait_local=wait_local)

    def provide(self, node: Node, image: Image, mode: Mode) -> None:
        """Have all of an image on a node, past the link. Raises DemoError."""
        repository = self.publisher.repository(image, mode.variant)
        node.pull(f"{self.place.registry.direct}/{repository}:latest")
        self.wait_local(node)

    def wait_local(self, node: Node) -> None:
        """Wait until all of the node's image is there."""
        while (state := node.local()) and state.here < state.total:
            self.workspace.interruption.sleep(_LOCAL_POLL_SECONDS)


@contextmanager
def open_session(
    workspace: Workspace,
    link: LinkProfile,
    cache: Path,
    say: Callable[[str], None],
    kept: Path | None = None,
) -> Iterator[Session]:
    """`cache` is where built images are kept, `kept` where the registry is, with all that was
    prepared in it, for later sessions. Raises BenchError or DemoError."""
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
    registry = DistantRegistry(workspace, link, kept.absolute() / "storage" if kept else None)
    connector = Connector(registry.link.near)
    try:
        place = Place(registry, connector, workspace.interruption)
        builder = Builder(workspace, cache, say)
        record = partial(_record, workspace, place)
        publisher = Publisher(workspace, registry, builder, record, say, kept)
        yield Session(workspace, place, publisher, say)
    finally:
        connector.close()


def _make_node(workspace: Workspace, name: str, mode: Mode) -> Node:
    if mode.containerd:
        return Foreign(workspace, name, mode.snapshotter, mode.containerd)
    if mode.runner == "containerd":
        if mode.lazy:
            return Lazy(workspace, name, background=mode.background)
        return Unpacking(workspace, name)
    if mode.store == "image":
        return podman_nodes.ImageStore(workspace, name)
    if mode.store == "layer":
        return podman_nodes.LayerStore(workspace, name)
    return podman_nodes.Pulling(workspace, name)


def _record(
    workspace: Workspace, place: Place, image: Image, repository: str, target: Path
) -> None:
    """Write the profile of some starts, each on a node of its own."""
    runs = [_recorded(workspace, place, image, repository, run) for run in range(_RECORDED)]
    target.write_bytes(profiles.encode(reduce(profiles.merge, runs)))


def _recorded(
    workspace: Workspace, place: Place, image: Image, repository: str, run: int
) -> Profile:
    name = f"record-{image.name}-{run}"
    node = Lazy(workspace, name)
    try:
        start = Start(image, UNMODIFIED.name, repository, pulled=False, wait_local=False)
        measure(place, node, start)
        exported = workspace.path / f"{name}.profile"
        node.export_profile(f"{place.registry.host}/{repository}:latest", exported)
    finally:
        node.close()
    return profiles.decode(exported.read_bytes())
