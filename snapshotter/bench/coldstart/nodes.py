"""Nodes that start images: what runs on them, and what that has cost.

Other runtimes come in here: whatever has the members of `Node`.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from snapshotter.bench.errors import BenchError
from snapshotter.daemon import client, protocol
from snapshotter.demo import lazy
from snapshotter.demo.containerd import Containerd
from snapshotter.demo.cri import ImageService
from snapshotter.demo.errors import DemoError
from snapshotter.demo.task import Task
from snapshotter.demo.workspace import mounts_below
from snapshotter.fetch.startup import LONGEST, QUIET
from snapshotter.mounts.table import read_mounts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snapshotter.bench.coldstart.catalogue import Image
    from snapshotter.bench.coldstart.modes import Mode
    from snapshotter.demo.task import Runner
    from snapshotter.demo.workspace import Workspace

_PULL_SECONDS = 3600.0
_COMMAND_SECONDS = 60.0
_SETTLED_POLL_SECONDS = 1.0
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)  # proc(5)
_TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """Of the daemon since its start, and of the disk."""

    cpu_seconds: float
    peak_bytes: int
    disk_bytes: int


class Local(NamedTuple):
    """Bytes of an image on the node, and all of them."""

    here: int
    total: int


class Node(Protocol):
    """A node with nothing of an image on it, until `pull`."""

    def pull(self, reference: str) -> None:
        """Have the image ready to be started. Raises DemoError."""

    def task(self, image: Image, reference: str, network: Path) -> Task:
        """A container of the image, to be started, in a network namespace."""

    def local(self) -> Local | None:
        """How much of the image is here; None if all of it always is. Raises DemoError if it is
        not served as it should be."""

    def needed_bytes(self) -> int | None:
        """What was fetched because somebody waited for it, or was about to, if that is known."""

    def fuse_requests(self) -> int | None:
        """What the kernel has asked of FirstByte so far, if there is one."""

    def usage(self) -> Usage:
        """What it has cost."""

    def close(self) -> None:
        """End and remove everything."""


def make(workspace: Workspace, name: str, mode: Mode) -> Node:
    """A node of a mode; `name` must be new in the workspace. Raises DemoError."""
    if mode.containerd:
        return _Foreign(workspace, name, mode)
    return Lazy(workspace, name) if mode.lazy else Unpacking(workspace, name)


class Unpacking:
    """containerd with overlayfs, which fetches and unpacks all before a start."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self._containerd = Containerd(workspace, name)
        self._tasks = _Tasks(self._containerd)

    def pull(self, reference: str) -> None:
        self._containerd.pull(reference)

    def task(self, image: Image, reference: str, network: Path) -> Task:
        return self._tasks.make(image, reference, network)

    def local(self) -> Local | None:
        return None

    def needed_bytes(self) -> int | None:
        return None

    def fuse_requests(self) -> int | None:
        return None

    def usage(self) -> Usage:
        return _usage(self._containerd.pid, [self._containerd.root])

    def close(self) -> None:
        self._tasks.stop()
        self._containerd.stop()
        _remove(self._containerd.directory)

    def lower_directories(self) -> list[Path]:
        """Where the layers of the containers that run are unpacked."""
        prefix = os.fsencode(self._containerd.directory) + b"/"
        return [
            Path(os.fsdecode(path))
            for mount in read_mounts()
            if mount.kind == b"overlay" and mount.point.startswith(prefix)
            for option in mount.super_options
            if option.startswith(b"lowerdir=")
            for path in option.removeprefix(b"lowerdir=").split(b":")
        ]


class Lazy:
    """containerd whose snapshotter is FirstByte."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace = workspace
        self._node = lazy.Node(workspace, name)
        self._directory = workspace.path / name
        self._containerd = Containerd(workspace, f"{name}-containerd", self._node.address)
        self._tasks = _Tasks(self._containerd)

    def pull(self, reference: str) -> None:
        self._containerd.pull(reference)

    def task(self, image: Image, reference: str, network: Path) -> Task:
        return self._tasks.make(image, reference, network)

    def local(self) -> Local | None:
        containerd = self._status().containerd
        assert containerd
        for image in containerd.images:
            return Local(image.local_bytes, image.total_bytes)
        reasons = [fallback.reason for fallback in containerd.fallbacks]
        raise DemoError("the image is not served lazily", hint="; ".join(reasons))

    def needed_bytes(self) -> int | None:
        fetched = self._status().fetched
        return sum(cost.bytes for cause, cost in fetched.items() if cause != "fill")

    def fuse_requests(self) -> int | None:
        return self._status().fuse_requests

    def export_profile(self, reference: str, target: Path) -> None:
        """Write what a start of an image has touched, once it has settled; takes about as long as
        that takes. Raises DemoError."""
        end = time.monotonic() + LONGEST + QUIET
        while True:
            try:
                return self._node.export_profile(reference, target)
            except DemoError:
                if time.monotonic() > end:
                    raise
            self.workspace.interruption.sleep(_SETTLED_POLL_SECONDS)

    def usage(self) -> Usage:
        return _usage(self._node.pid, [self._node.places.root, self._containerd.root])

    def close(self) -> None:
        self._tasks.stop()
        self._containerd.stop()
        self._node.stop()
        _remove(self._containerd.directory)
        _remove(self._directory)

    def _status(self) -> protocol.Status:
        # In this process: a command of its own would take part of what is measured.
        ask = partial(client.ask, self._node.places, protocol.StatusRequest(), start=None)
        status = trio.run(ask)
        if not isinstance(status, protocol.Status):
            raise BenchError("the daemon does not tell its status")
        return status


class _Foreign:
    """Another snapshotter of a containerd that runs on this machine already.

    Pulls go through its CRI, which must be configured for that snapshotter: only so is it told
    what it needs to be lazy.
    """

    def __init__(self, workspace: Workspace, name: str, mode: Mode) -> None:
        assert mode.containerd
        self.workspace = workspace
        self.directory = workspace.directory(name)
        self.snapshotter = mode.snapshotter
        self.cgroup = f"{workspace.path.name}-{name}"
        self._socket = mode.containerd
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

    def task(self, image: Image, reference: str, network: Path) -> Task:
        return self._tasks.make(image, reference, network)

    def local(self) -> Local | None:
        return None

    def needed_bytes(self) -> int | None:
        return None

    def fuse_requests(self) -> int | None:
        return None

    def usage(self) -> Usage:
        return Usage(0.0, 0, 0)

    def close(self) -> None:
        """Removes what was pulled, under all its names; waits until its content is gone, too."""
        self._tasks.stop()
        while self._pulled:
            reference = self._pulled.pop()
            lines = self.ctr("images", "list").splitlines()[1:]
            digests = {line.split()[2] for line in lines if line.split()[0] == reference}
            names = [line.split()[0] for line in lines if line.split()[2] in digests]
            if names:
                self.ctr("images", "remove", "--sync", *names)
        self._images.close()
        _remove(self.directory)


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


def _usage(pid: int, directories: Sequence[Path]) -> Usage:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        peak = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
    except OSError as error:
        raise BenchError("a daemon that was measured has ended") from error
    cpu = (int(fields[11]) + int(fields[12])) / _TICKS
    return Usage(cpu, int(peak[1]) * 1024 if peak else 0, sum(map(_disk, directories)))


def _disk(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # a temporary file
    return total


def _remove(directory: Path) -> None:
    if directory.exists() and not mounts_below(directory):
        shutil.rmtree(directory)
