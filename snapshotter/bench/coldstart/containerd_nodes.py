"""Nodes whose containers containerd runs: by itself, with FirstByte, with another snapshotter."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from snapshotter.bench.coldstart.nodes import Node, Usage, remove, usage_of
from snapshotter.bench.errors import BenchError
from snapshotter.demo import lazy
from snapshotter.demo.cgroups import remove_cgroups
from snapshotter.demo.containerd import Containerd
from snapshotter.demo.cri import ImageService
from snapshotter.demo.errors import DemoError
from snapshotter.demo.task import Task
from snapshotter.fetch.startup import LONGEST, QUIET

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.demo.lazy import Local
    from snapshotter.demo.task import Runner
    from snapshotter.demo.workspace import Workspace

_SNAPSHOTS = "io.containerd.snapshotter.v1.overlayfs/snapshots/*/fs"
_PULL_SECONDS = 3600.0
_COMMAND_SECONDS = 60.0
_SETTLED_POLL_SECONDS = 1.0


class Unpacking(Node):
    """containerd with overlayfs, which fetches and unpacks all before a start."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self._containerd = Containerd(workspace, name)
        self._tasks = _Tasks(self._containerd)
        self._unpacked: list[Path] = []

    def pull(self, reference: str) -> None:
        self._containerd.pull(reference)
        # Later there are those that containers write in, too.
        self._unpacked = [*self._containerd.root.glob(_SNAPSHOTS)]

    def workload(self, image: Image, reference: str, network: Path) -> Task:
        return self._tasks.make(image, reference, network)

    def usage(self) -> Usage:
        return usage_of(self._containerd.pid, [self._containerd.root])

    def close(self) -> None:
        self._tasks.stop()
        self._containerd.stop()
        remove(self._containerd.directory)

    def unpacked(self) -> list[Path]:
        return self._unpacked


class Lazy(Node):
    """containerd whose snapshotter is FirstByte."""

    def __init__(self, workspace: Workspace, name: str, *, background: bool = True) -> None:
        self.workspace = workspace
        self._firstbyte = lazy.Node(workspace, name, background=background)
        self._directory = workspace.path / name
        self._containerd = Containerd(workspace, f"{name}-containerd", self._firstbyte.address)
        self._tasks = _Tasks(self._containerd)

    def pull(self, reference: str) -> None:
        self._containerd.pull(reference)

    def workload(self, image: Image, reference: str, network: Path) -> Task:
        return self._tasks.make(image, reference, network)

    def local(self) -> Local:
        return self._firstbyte.local()

    def needed_bytes(self) -> int:
        return self._firstbyte.needed_bytes()

    def fuse_requests(self) -> int:
        return self._firstbyte.status().fuse_requests

    def export_profile(self, reference: str, target: Path) -> None:
        """Write what a start of an image has touched, once it has settled; takes about as long as
        that takes. Raises DemoError."""
        end = time.monotonic() + LONGEST + QUIET
        while True:
            try:
                return self._firstbyte.export_profile(reference, target)
            except DemoError:
                if time.monotonic() > end:
                    raise
            self.workspace.interruption.sleep(_SETTLED_POLL_SECONDS)

    def usage(self) -> Usage:
        stores = [self._firstbyte.places.root, self._containerd.root]
        return usage_of(self._firstbyte.pid, stores)

    def close(self) -> None:
        self._tasks.stop()
        self._containerd.stop()
        self._firstbyte.stop()
        remove(self._containerd.directory)
        remove(self._directory)


class Foreign(Node):
    """Another snapshotter of a containerd that runs on this machine already.

    Pulls go through its CRI, which must be configured for that snapshotter: only so is it told
    what it needs to be lazy.
    """

    def __init__(self, workspace: Workspace, name: str, snapshotter: str, socket: Path) -> None:
        """`socket` is containerd's. Raises BenchError if it does not answer there."""
        self.workspace = workspace
        self.directory = workspace.directory(name)
        self.snapshotter = snapshotter
        self.cgroup = f"{workspace.path.name}-{name}"
        self._socket = socket
        self._images = ImageService(self._socket, workspace.interruption)
        if not self._images.answers():
            raise BenchError(
                f"no containerd answers at {self._socket}", hint="start it, with its CRI"
            )
        self._pulled: list[str] = []
        self._tasks = _Tasks(self)
        workspace.defer(f"remove images from {self._socket}", self.close)

    def ctr_command(self, *arguments: str | Path) -> list[str | Path]:
        return ["ctr", "--address", self._socket, "--namespace", "k8s.io", *arguments]

    def ctr(self, *arguments: str | Path) -> str:
        return self.workspace.run(self.ctr_command(*arguments), seconds=_COMMAND_SECONDS)

    def pull(self, reference: str) -> None:
        self._pulled.append(reference)
        self._images.pull(reference, _PULL_SECONDS)

    def workload(self, image: Image, reference: str, network: Path) -> Task:
        return self._tasks.make(image, reference, network)

    def usage(self) -> Usage:
        return Usage()

    def close(self) -> None:
        """Removes what was pulled, under all its names; waits until its content is gone, too."""
        self._tasks.stop()
        remove_cgroups(self.cgroup)
        while self._pulled:
            reference = self._pulled.pop()
            lines = self.ctr("images", "list").splitlines()[1:]
            digests = {line.split()[2] for line in lines if line.split()[0] == reference}
            names = [line.split()[0] for line in lines if line.split()[2] in digests]
            if names:
                self.ctr("images", "remove", "--sync", *names)
        self._images.close()
        remove(self.directory)


class _Tasks:
    """The containers of one containerd."""

    def __init__(self, containerd: Runner) -> None:
        self._containerd = containerd
        self._made: list[Task] = []

    def make(self, image: Image, reference: str, network: Path) -> Task:
        task = Task(
            self._containerd,
            f"start-{len(self._made)}",
            reference,
            command=image.command,
            network=network,
        )
        self._made.append(task)
        return task

    def stop(self) -> None:
        for task in self._made:
            task.stop()
