"""Where one instance of FirstByte keeps things on a node."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.daemon.errors import DaemonError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Places:
    """`root` holds data and survives reboots; `state` holds sockets, mounts, locks, the log.

    Both are absolute and belong to one daemon; several instances use several pairs.
    """

    root: Path
    state: Path

    @property
    def socket(self) -> Path:
        return self.state / "firstbyte-control.sock"

    @property
    def grpc(self) -> Path:
        """Where gRPC itself listens; containerd's connections are passed on to it."""
        return self.state / "grpc.sock"

    @property
    def mount(self) -> Path:
        """Where the daemon's one FUSE mount is."""
        return self.state / "fs"

    @property
    def views(self) -> Path:
        """Where the kernel's EROFS mounts of views are."""
        return self.state / "views"

    @property
    def podman_images(self) -> Path:
        """What podman and CRI-O are told as an additional image store. In `root`, because their own
        storage refers to it."""
        return self.root / "podman" / "images"

    @property
    def podman_layers(self) -> Path:
        """What podman and CRI-O are told as an additional layer store. It stays without a daemon,
        too: no podman starts without it."""
        return self.root / "podman" / "layers"

    @property
    def podman_held(self) -> Path:
        """What podman holds of the layer store."""
        return self.root / "podman" / "layers.json"

    @property
    def podman_layer_files(self) -> Path:
        """Where the layer store keeps what it has made or fetched of layers."""
        return self.root / "podman"

    @property
    def log(self) -> Path:
        return self.state / "daemon.log"

    @property
    def records(self) -> Path:
        """What is being served, for a successor. In `state`, because it is true until a reboot."""
        return self.state / "serving.json"

    @property
    def daemon_lock(self) -> Path:
        """Held by the daemon for as long as it lives. (The store has a lock of its own.)"""
        return self.state / "daemon.lock"

    @property
    def start_lock(self) -> Path:
        """Held by the client that is starting a daemon."""
        return self.state / "start.lock"

    def create(self) -> None:
        """Make the directories, for their owner only. Raises DaemonError."""
        for folder in (self.root, self.state):
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise DaemonError(
                    f"cannot make the directory {folder}: {error.strerror}",
                    hint="run this as root, or choose others with --root and --state",
                ) from error


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Try to lock a file against other processes, without waiting; tells if that succeeded.

    The kernel lifts the lock when this process ends, however it ends. The file says which process
    it was, for `locked_by`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d" % os.getpid(), 0)
            yield True
    finally:
        os.close(descriptor)


def locked_by(path: Path) -> int:
    """The process that has, or has had, the lock of a file; 0 if it is not known."""
    try:
        return int(path.read_bytes() or b"0")
    except (OSError, ValueError):  # an earlier version wrote nothing
        return 0
