"""FirstByte on a node, by the commands that a user types."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from snapshotter.daemon.config import SOCKET_NAME
from snapshotter.daemon.places import Places
from snapshotter.demo.errors import DemoError
from snapshotter.demo.workspace import stop_group
from snapshotter.mounts.table import mount_at

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.demo.workspace import Workspace

_FIRSTBYTE = (sys.executable, "-m", "snapshotter.cli.main")

# Whatever is configured on this machine: nothing in the workspace is to meet it.
_CONFIGURATION = """\
root = "{directory}/root"
state = "{directory}/state"
[registry]
config_path = "{directory}/nothing"
registries_conf = "{directory}/nothing"
"""

_BUILD_SECONDS = 3600.0
_START_SECONDS = 30.0
_MOUNT_SECONDS = 120.0
_COMMAND_SECONDS = 30.0
_POLL_SECONDS = 0.05


class _Image(msgspec.Struct, frozen=True):
    """An image in `firstbyte status --json`, as far as it matters here."""

    local_bytes: int
    total_bytes: int


class Calls(msgspec.Struct, frozen=True):
    """How often containerd's call `method` ended in one way, and the seconds it took in sum."""

    method: str
    count: int
    seconds: float


class _Fallback(msgspec.Struct, frozen=True):
    """An image that containerd has pulled as without us, and why."""

    reason: str


class _ForContainerd(msgspec.Struct, frozen=True):
    images: list[_Image]
    fallbacks: list[_Fallback]
    calls: list[Calls]


class _Fetched(msgspec.Struct, frozen=True):
    bytes: int


class _Status(msgspec.Struct, frozen=True):
    mounts: list[_Image]
    podman: list[_Image]
    containerd: _ForContainerd
    fetched: dict[str, _Fetched]


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
    where it is containerd's snapshotter, `image_store` what podman may read. `name` must be new in
    the workspace.
    """

    def __init__(self, workspace: Workspace, name: str = "node") -> None:
        self._workspace = workspace
        directory = workspace.directory(name)
        self.places = places = Places(directory / "root", directory / "state")
        configuration = directory / "config.toml"
        configuration.write_text(_CONFIGURATION.format(directory=directory))
        self.address = places.state / SOCKET_NAME
        self.image_store = places.podman_images
        self._options = ("--config", configuration)
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self._daemon = workspace.start(
                [*_FIRSTBYTE, "daemon", *self._options],
                output=log.fileno(),
                errors=subprocess.STDOUT,
            )
        self.pid = self._daemon.pid
        workspace.defer("stop the daemon", self.stop)
        self._wait(places)

    def mount(self, reference: str, directory: Path) -> None:
        """Mount an image at a directory; the workspace unmounts it."""
        self._workspace.defer(f"unmount {directory}", lambda: self.unmount(directory))
        self._firstbyte("mount", reference, directory, seconds=_MOUNT_SECONDS)

    def add_to_podman(self, reference: str) -> None:
        """Put an image into the image store."""
        self._firstbyte("podman", "add", reference, seconds=_MOUNT_SECONDS)

    def local_bytes(self) -> tuple[int, int]:
        """How much of its one image, unpacked, is on this machine, and how much there is.

        Raises DemoError if there is none: containerd has pulled it as without FirstByte.
        """
        status = self._status()
        for image in (*status.mounts, *status.podman, *status.containerd.images):
            return image.local_bytes, image.total_bytes
        reasons = [fallback.reason for fallback in status.containerd.fallbacks]
        raise DemoError("no image is served lazily", hint="; ".join(reasons))

    def needed_bytes(self) -> int:
        """What was fetched because somebody waited for it, or was about to, in compressed bytes."""
        return sum(
            fetched.bytes for cause, fetched in self._status().fetched.items() if cause != "fill"
        )

    def export_profile(self, reference: str, target: Path) -> None:
        """Write what starts of an image have touched. Raises DemoError if none has settled yet."""
        self._workspace.run(
            [*_FIRSTBYTE, "profile", "export", *self._options, "-o", target, reference],
            seconds=_COMMAND_SECONDS,
        )

    def calls(self) -> list[Calls]:
        """What containerd has asked of it so far."""
        return self._status().containerd.calls

    def _status(self) -> _Status:
        text = self._firstbyte("status", "--json", seconds=_COMMAND_SECONDS)
        return msgspec.json.decode(text, type=_Status)

    def unmount(self, directory: Path) -> None:
        """Take a mount down; fine if there is none."""
        if mount_at(directory):
            self._firstbyte("umount", directory, seconds=_COMMAND_SECONDS)

    def stop(self) -> None:
        """End the daemon; nothing if it ended already."""
        stop_group(self._daemon, signal.SIGINT, signal.SIGKILL)  # SIGTERM would leave mounts

    def _firstbyte(self, *words: str | Path, seconds: float) -> str:
        return self._workspace.run([*_FIRSTBYTE, *words, *self._options], seconds=seconds)

    def _wait(self, places: Places) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._daemon.poll() is None:
            if places.socket.exists():
                return
            self._workspace.interruption.sleep(_POLL_SECONDS)
        raise DemoError("firstbyte's daemon does not start", hint=self._log.read_text()[-500:])
