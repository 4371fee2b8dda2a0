"""FirstByte on a node, by the commands that a user types."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from snapshotter.daemon import client, protocol
from snapshotter.daemon.config import SOCKET_NAME
from snapshotter.daemon.errors import DaemonError
from snapshotter.daemon.places import Places
from snapshotter.demo.errors import DemoError
from snapshotter.demo.workspace import stop_group
from snapshotter.mounts.table import mount_at

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.demo.workspace import Workspace

_T = TypeVar("_T")

_FIRSTBYTE = (sys.executable, "-m", "snapshotter.cli.main")

# Whatever is configured on this machine: nothing in the workspace is to meet it.
_CONFIGURATION = """\
root = "{directory}/root"
state = "{directory}/state"
[registry]
config_path = "{directory}/nothing"
registries_conf = "{directory}/nothing"
"""
# Less than that is free, so nothing comes in the background; what is read is kept.
_FULL = """\
[store]
keep_free = "{free} B"
"""
_MARGIN = 1 << 30  # bytes that others may remove from the disk meanwhile

_BUILD_SECONDS = 3600.0
_START_SECONDS = 30.0
_MOUNT_SECONDS = 120.0
_COMMAND_SECONDS = 30.0
_POLL_SECONDS = 0.02


class Local(NamedTuple):
    """Bytes of images, unpacked, that are on a node, and all of them."""

    here: int
    total: int


def build_index(workspace: Workspace, reference: str, profile: Path | None = None) -> None:
    """Build an image's file index, and push it to where the image is; with a startup pack, if there
    is a startup profile."""
    options: list[str | Path] = ["--profile", profile] if profile else []
    workspace.run(
        [*_FIRSTBYTE, "index", "build", reference, "--push", *options], seconds=_BUILD_SECONDS
    )


def convert(workspace: Workspace, source: str, target: str) -> None:
    """Copy an image with its layers in seekable frames, and its file index with it."""
    workspace.run([*_FIRSTBYTE, "convert", source, target], seconds=_BUILD_SECONDS)


class Node:
    """An instance of FirstByte in the workspace, with nothing in its store yet.

    Its daemon runs from the end of the constructor until `stop`, as containerd does. `address` is
    where it is containerd's snapshotter. `name` must be new in the workspace.
    """

    def __init__(
        self, workspace: Workspace, name: str = "node", *, background: bool = True
    ) -> None:
        """Without `background` only what is read is downloaded, as where the disk is full."""
        self._workspace = workspace
        directory = workspace.directory(name)
        self.places = Places(directory / "root", directory / "state")
        configuration = directory / "config.toml"
        text = _CONFIGURATION.format(directory=directory)
        if not background:
            text += _FULL.format(free=shutil.disk_usage(directory).free + _MARGIN)
        configuration.write_text(text)
        self.address = self.places.state / SOCKET_NAME
        self._options = ("--config", configuration)
        self._log = directory / "log"
        self._daemon = self._start()
        workspace.defer("stop the daemon", self.stop)
        self._wait()

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self._daemon.pid

    def mount(self, reference: str, directory: Path) -> None:
        """Mount an image at a directory; the workspace unmounts it."""
        self._workspace.defer(f"unmount {directory}", lambda: self.unmount(directory))
        self._firstbyte("mount", reference, directory, seconds=_MOUNT_SECONDS)

    def add_to_podman(self, reference: str) -> None:
        """Put an image into the image store."""
        self._firstbyte("podman", "add", reference, seconds=_MOUNT_SECONDS)

    def local(self) -> Local:
        """How much of its images is on this machine.

        Raises DemoError if it has none: whoever pulled one has done so as without FirstByte.
        """
        status = self.status()
        containerd = status.containerd
        images = [*status.mounts, *status.podman, *(containerd.images if containerd else ())]
        if not images:
            reasons = [fallback.reason for fallback in containerd.fallbacks] if containerd else []
            raise DemoError("no image is served lazily", hint="; ".join(reasons))
        return Local(
            sum(image.local_bytes for image in images), sum(image.total_bytes for image in images)
        )

    def needed_bytes(self) -> int:
        """What was fetched because somebody waited for it, or was about to, in compressed bytes."""
        fetched = self.status().fetched
        return sum(cost.bytes for cause, cost in fetched.items() if cause != "fill")

    def export_profile(self, reference: str, target: Path) -> None:
        """Write what starts of an image have touched. Raises DemoError if none has settled yet."""
        self._workspace.run(
            [*_FIRSTBYTE, "profile", "export", *self._options, "-o", target, reference],
            seconds=_COMMAND_SECONDS,
        )

    def status(self) -> protocol.Status:
        """What it tells of itself. Raises DemoError if it does not run."""
        return self._ask(protocol.StatusRequest(), protocol.Status)

    def disk_usage(self) -> protocol.DiskUsage:
        """What takes how much of its store. Raises DemoError if it does not run."""
        return self._ask(protocol.DiskUsageRequest(), protocol.DiskUsage)

    def unmount(self, directory: Path) -> None:
        """Take a mount down; fine if there is none."""
        if mount_at(directory):
            self._firstbyte("umount", directory, seconds=_COMMAND_SECONDS)

    def stop(self) -> None:
        """End the daemon; nothing if it ended already."""
        stop_group(self._daemon, signal.SIGINT, signal.SIGKILL)  # SIGTERM would leave mounts

    def _ask(self, request: protocol.Request, kind: type[_T]) -> _T:
        # In this process: a command of its own would take part of what is measured.
        reply = client.ask(self.places, request, start=None)
        if not isinstance(reply, kind):
            raise DemoError("firstbyte's daemon does not run", hint=self._log.read_text()[-500:])
        return reply

    def _firstbyte(self, *words: str | Path, seconds: float) -> str:
        return self._workspace.run([*_FIRSTBYTE, *words, *self._options], seconds=seconds)

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return self._workspace.start(
                [*_FIRSTBYTE, "daemon", *options, *self._options],
                output=log.fileno(),
                errors=subprocess.STDOUT,
            )

    def _wait(self) -> None:
        """Until it is this daemon that answers, and not one before it. Raises DemoError."""
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._daemon.poll() is None:
            with contextlib.suppress(DemoError, DaemonError):  # nobody yet, or who is just ending
                if self.status().pid == self.pid:
                    return
            self._workspace.interruption.sleep(_POLL_SECONDS)
        raise DemoError("firstbyte's daemon does not start", hint=self._log.read_text()[-500:])
