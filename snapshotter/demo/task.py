"""A container that containerd runs, from an image that it has pulled.

Source: `ctr run --help` and `ctr tasks --help` of containerd 1.6.
"""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Protocol

from snapshotter.demo.errors import DemoError
from snapshotter.demo.foreground import ForegroundContainer
from snapshotter.demo.workspace import stop_group

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from snapshotter.demo.workspace import Workspace


class Runner(Protocol):
    """A containerd, as far as running containers needs it."""

    workspace: Workspace
    directory: Path
    snapshotter: str
    cgroup: str

    def ctr(self, *arguments: str | Path) -> str:
        """What ctr prints. Raises DemoError if it fails."""

    def ctr_command(self, *arguments: str | Path) -> list[str | Path]:
        """The command line of ctr for this containerd."""


class Task(ForegroundContainer):
    """One container of `containerd`; `name` must be new in it. It runs the image's own command, or
    `command`, in the host's network, or in the network namespace at a path."""

    def __init__(
        self,
        containerd: Runner,
        name: str,
        reference: str,
        *,
        command: Sequence[str] = (),
        network: Path | None = None,
    ) -> None:
        super().__init__(containerd.workspace, containerd.directory / f"{name}.pid")
        self._containerd = containerd
        self._name = name
        self._reference = reference
        self._command = command
        self._network = network

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it; `environment` goes before what the image sets."""
        containerd = self._containerd
        containerd.workspace.defer(f"remove the container {self._name}", self.stop)
        command = containerd.ctr_command(
            "run",
            f"--with-ns=network:{self._network}" if self._network else "--net-host",
            *("--snapshotter", containerd.snapshotter),
            *("--cgroup", f"/{containerd.cgroup}/{self._name}"),
            *("--runc-root", containerd.directory / "runc"),
            *("--fifo-dir", containerd.directory / "fifo"),
            *("--pid-file", self._pid_file),
            *(f"--env={name}={value}" for name, value in environment.items()),
            self._reference,
            self._name,
            *self._command,
        )
        self._launch(command)

    def stop(self) -> None:
        """Kill the workload and remove the container; fine if nothing is there."""
        if not self._process:
            return
        stop_group(self._process, signal.SIGKILL)  # of ctr: the container goes on
        # One that was just being made may slip through; containerd's `stop` ends that.
        with contextlib.suppress(DemoError):
            for kind, *options in (("tasks", "--force"), ("containers",)):
                if self._name in self._containerd.ctr(kind, "list", "--quiet").split():
                    self._containerd.ctr(kind, "delete", *options, self._name)
        self._process = None  # not before: a signal may end this, and then it is called again
