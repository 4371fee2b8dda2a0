"""The same start by a full pull: a private containerd downloads and unpacks the image first.

containerd is the reference because most nodes run it; here with its overlayfs snapshotter, its own
state in the workspace, and without its CRI plugin. Sources: containerd's docs/man/config.toml and
`ctr images --help`, version 1.6.
"""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

from snapshotter.demo.errors import DemoError
from snapshotter.demo.workspace import stop_group

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.demo.workspace import Workspace

_READY_SECONDS = 30.0
_COMMAND_SECONDS = 20.0
_PULL_SECONDS = 3600.0
_POLL_SECONDS = 0.05

_CONFIGURATION = """\
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp",
]

[grpc]
address = "{directory}/containerd.sock"
"""


class Containerd:
    """A containerd of the workspace's own, running from the end of the constructor until `stop`."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._directory = workspace.directory("containerd")
        configuration = self._directory / "config.toml"
        configuration.write_text(_CONFIGURATION.format(directory=self._directory))
        self._log = self._directory / "log"
        with self._log.open("wb") as log:
            self._process = workspace.start(
                ["containerd", "--config", configuration],
                output=log.fileno(),
                errors=subprocess.STDOUT,
            )
        workspace.defer("stop containerd", self.stop)
        self._wait()

    def pull(self, reference: str) -> None:
        """Download and unpack an image for this machine's platform."""
        self._ctr("images", "pull", "--plain-http", reference, seconds=_PULL_SECONDS)

    def mount(self, reference: str, directory: Path) -> None:
        """Mount the unpacked image read-only; the workspace unmounts it."""
        self._ctr("images", "mount", reference, directory, seconds=_COMMAND_SECONDS)

    def stop(self) -> None:
        """End it; nothing if it ended already."""
        stop_group(self._process)

    def _ctr(self, *arguments: str | Path, seconds: float) -> None:
        address = self._directory / "containerd.sock"
        self._workspace.run(["ctr", "--address", address, *arguments], seconds=seconds)

    def _wait(self) -> None:
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            if (self._directory / "containerd.sock").exists():
                self._ctr("version", seconds=_COMMAND_SECONDS)  # waits until it answers
                return
            self._workspace.interruption.sleep(_POLL_SECONDS)
        raise DemoError(
            "containerd does not answer", hint="\n".join(self._log.read_text().splitlines()[-5:])
        )
