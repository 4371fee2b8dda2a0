"""The lazy mount, by the commands that a user would type."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import msgspec

from snapshotter.demo.errors import DemoError

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.demo.workspace import Workspace

_BUILD_SECONDS = 3600.0
_MOUNT_SECONDS = 120.0
_COMMAND_SECONDS = 30.0
_POLL_SECONDS = 0.2


class _Mount(msgspec.Struct, frozen=True):
    """One entry of `firstbyte status --json`, as far as it matters here."""

    target: str
    local_bytes: int
    total_bytes: int


class _Status(msgspec.Struct, frozen=True):
    mounts: list[_Mount]


class LazyMount:
    """One image, mounted by an instance of FirstByte with nothing in its store yet."""

    def __init__(self, workspace: Workspace, reference: str) -> None:
        self._workspace = workspace
        self._reference = reference
        self._node = ("--root", workspace.path / "root", "--state", workspace.path / "state")
        self.directory: Path = workspace.directory("lazy")

    def build_index(self) -> None:
        """Build the image's file index, and push it to where the image is."""
        self._firstbyte("index", "build", self._reference, "--push", seconds=_BUILD_SECONDS)

    def mount(self) -> None:
        """Mount the image at `directory`; the workspace unmounts it."""
        self._workspace.defer("unmount the image", self.unmount)
        self._firstbyte(
            "mount", *self._node, self._reference, self.directory, seconds=_MOUNT_SECONDS
        )

    def local_bytes(self) -> tuple[int, int]:
        """How much of the unpacked image is on this machine, and how much there is."""
        text = self._firstbyte("status", *self._node, "--json", seconds=_COMMAND_SECONDS)
        status = msgspec.json.decode(text, type=_Status)
        for mount in status.mounts:
            if mount.target == str(self.directory):
                return mount.local_bytes, mount.total_bytes
        raise DemoError(f"firstbyte status does not know the mount at {self.directory}")

    def unmount(self) -> None:
        """Take the mount down; fine if there is none."""
        if self.directory.is_mount():
            self._firstbyte("umount", *self._node, self.directory, seconds=_COMMAND_SECONDS)

    def _firstbyte(self, *arguments: str | Path, seconds: float) -> str:
        command = [sys.executable, "-m", "snapshotter.cli.main", *arguments]
        return self._workspace.run(command, seconds=seconds)
