"""A podman of the demo's own: for the full pull, and with FirstByte's stores.

Everything that podman keeps is in the workspace, whatever other podman uses the machine. Sources:
containers-storage.conf(5), containers.conf(5), podman-run(1).
"""

from __future__ import annotations

import contextlib
import json
import signal
from typing import TYPE_CHECKING

from snapshotter.demo.cgroups import remove_cgroups
from snapshotter.demo.errors import DemoError
from snapshotter.demo.foreground import ForegroundContainer
from snapshotter.demo.workspace import mounts_below, stop_group
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.syscalls import unmount

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from snapshotter.demo.workspace import Workspace

_PULL_SECONDS = 3600.0
_REMOVE_SECONDS = 30.0

_STORAGE = """\
[storage]
driver = "overlay"
graphroot = {directory}/graph"
runroot = {directory}/run"
[storage.options]
additionalimagestores = {image_stores}
additionallayerstores = {layer_stores}
"""
# Locks in files: those in shared memory are one set for all of the machine.
_ENGINE = """\
[containers]
netns = "host"
default_ulimits = {limits}
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
runtime = "runc"
tmp_dir = {directory}/tmp"
"""
# Raising limits needs CAP_SYS_RESOURCE, which a container host may lack; these every process has.
_LIMITS = ["nofile=1024:1024", "nproc=1024:1024"]


class Podman:
    """Has no image of its own yet. `name` must be new in the workspace."""

    def __init__(
        self,
        workspace: Workspace,
        name: str,
        *,
        image_stores: Sequence[Path] = (),
        layer_stores: Sequence[Path] = (),
    ) -> None:
        """Both kinds of stores are additional ones, which have to be there."""
        self.workspace = workspace
        self.directory = workspace.directory(name)
        # Cgroups are the machine's: as unique as the workspace's directory.
        self.cgroup = f"{workspace.path.name}-{name}"
        directory = json.dumps(str(self.directory))[:-1]  # a TOML string that goes on
        self._storage = self.directory / "storage.conf"
        self._storage.write_text(
            _STORAGE.format(
                directory=directory,
                image_stores=json.dumps([str(path) for path in image_stores]),
                layer_stores=json.dumps([f"{path}:ref" for path in layer_stores]),
            )
        )
        self._engine = self.directory / "containers.conf"
        self._engine.write_text(_ENGINE.format(directory=directory, limits=json.dumps(_LIMITS)))

    def pull(self, reference: str) -> None:
        """Pull an image of this machine's platform. Raises DemoError."""
        command = self.command("pull", "--quiet", "--tls-verify=false", reference)
        self.workspace.run(command, seconds=_PULL_SECONDS)

    @property
    def graph_root(self) -> Path:
        """Where it keeps images and containers."""
        return self.directory / "graph"

    def unpulled(self) -> int:
        """How many layers are in a layer store, and not in its own storage."""
        return sum(path.is_symlink() for path in self.graph_root.glob("overlay/*/diff"))

    def unmount(self) -> None:
        """Undo what podman mounts and leaves: its storage, on itself. For after its containers."""
        for point in mounts_below(self.directory):
            with contextlib.suppress(MountError):
                unmount(point, detach=True)

    def command(self, *arguments: str | Path) -> list[str | Path]:
        """A command line for this podman."""
        settings = {
            "CONTAINERS_STORAGE_CONF": self._storage,
            "CONTAINERS_CONF": self._engine,
        }
        return ["env", *(f"{key}={value}" for key, value in settings.items()), "podman", *arguments]


class PodmanContainer(ForegroundContainer):
    """One container of a podman; `name` must be new in it. It runs the image's own command, or
    `command`, in the host's network, or in the network namespace at a path."""

    def __init__(
        self,
        podman: Podman,
        name: str,
        reference: str,
        *,
        command: Sequence[str] = (),
        network: Path | None = None,
    ) -> None:
        super().__init__(podman.workspace, podman.directory / f"{name}.pid")
        self._podman = podman
        self._name = name
        self._reference = reference
        self._command = command
        self._network = network

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it; `environment` goes before what the image sets."""
        podman = self._podman
        podman.workspace.defer(f"remove the container {self._name}", self.stop)
        command = podman.command(
            "run",
            "--pull=never",
            *("--name", self._name),
            *("--cgroup-parent", f"/{podman.cgroup}"),
            *("--pidfile", self._pid_file),
            *((f"--network=ns:{self._network}",) if self._network else ()),
            *(f"--env={name}={value}" for name, value in environment.items()),
            self._reference,
            *self._command,
        )
        self._launch(command)

    def stop(self) -> None:
        """Kill the workload and remove the container; fine if nothing is there."""
        if not self._process:
            return
        stop_group(self._process, signal.SIGKILL)  # of podman: the container goes on
        remove = self._podman.command("rm", "--force", "--ignore", "--time=0", self._name)
        with contextlib.suppress(DemoError):  # what was just being made, the workspace ends
            self._podman.workspace.run(remove, seconds=_REMOVE_SECONDS)
        remove_cgroups(self._podman.cgroup)
        self._process = None  # not before: a signal may end this, and then it is called again
