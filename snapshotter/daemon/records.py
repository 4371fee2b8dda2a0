"""What a daemon is serving, on disk: for a successor that goes on with it."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import msgspec

from snapshotter.daemon.errors import DaemonError
from snapshotter.fuse.view import MAX_SLOT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

log = logging.getLogger(__name__)


FIRST_SLOT = 3
"""Slots below are of the daemon's own files in the FUSE mount, the same in every process."""


NATIVE = "native"
"""The mode of mounts that need no FUSE mount."""


class MountRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A mount at the directory `target`: which image (`digest` is its manifest's), and how."""

    target: str
    reference: str
    digest: str
    mode: str


class ViewRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A view that is shown: the lower `depth` layers of an image. `names` are its entries in the
    root of the FUSE mount; `plain_http` is how its registry was asked for."""

    image: str
    depth: int
    plain_http: bool
    names: list[str]


class _File(msgspec.Struct):
    """The file. `init` is what the kernel said when the FUSE mount was made, and was answered.
    `next_slot` only grows, because the kernel remembers the inodes of old views."""

    init: bytes = b""
    next_slot: int = FIRST_SLOT
    slots: dict[str, int] = {}
    views: dict[str, ViewRecord] = {}
    mounts: list[MountRecord] = []


class Records:
    """The record file of one daemon. Every change is in it when the method returns, however the
    process ends then. It need not outlive the machine, after which nothing is mounted.

    Thread-safe. Methods write a small file; call them from worker threads.
    """

    def __init__(self, path: Path) -> None:
        """Read what a predecessor has left. A file that is damaged counts as none."""
        self._path = path
        self._lock = threading.Lock()
        self._file = _File()
        try:
            self._file = msgspec.json.decode(path.read_bytes(), type=_File)
        except FileNotFoundError:
            pass
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            log.warning("%s is damaged and starts afresh: %s", path, error)

    @property
    def mounts(self) -> list[MountRecord]:
        """The mounts there are, in the order they were made."""
        with self._lock:
            return list(self._file.mounts)

    @property
    def views(self) -> list[ViewRecord]:
        """The views that are shown, in the order they were opened."""
        with self._lock:
            return list(self._file.views.values())

    @property
    def init(self) -> bytes:
        """What the kernel said when the FUSE mount was made, or nothing if none was ever served."""
        with self._lock:
            return self._file.init

    def start_afresh(self) -> None:
        """Forget what a FUSE mount showed: it is gone, or there is a new one that nobody answers
        for yet."""
        with self._lock:
            native = [mount for mount in self._file.mounts if mount.mode == NATIVE]
            self._file = _File(mounts=native)
            self._write()

    def serve(self, init: bytes) -> None:
        """Note that the kernel has had its answer to `init`: a successor can go on with the mount.

        Not earlier, because the kernel asks that once: a mount whose daemon died before it answered
        is of no use to anybody.
        """
        with self._lock:
            self._file.init = init
            self._write()

    def open_view(self, name: str, view: ViewRecord) -> dict[str, int]:
        """Record a view, and give each of its names a slot: the one it has, else one that was never
        used in this FUSE mount. Raises DaemonError.
        """
        with self._lock:
            new = [entry for entry in view.names if entry not in self._file.slots]
            if not new and self._file.views.get(name) == view:  # restored; readers may be waiting
                return {entry: self._file.slots[entry] for entry in view.names}
            first = self._file.next_slot
            if first + len(new) > MAX_SLOT + 1:
                raise DaemonError(f"{MAX_SLOT} images were mounted", hint="restart the daemon")
            self._file.slots.update(zip(new, range(first, first + len(new)), strict=True))
            self._file.next_slot += len(new)
            self._file.views[name] = view
            self._write()
            return {entry: self._file.slots[entry] for entry in view.names}

    def close_view(self, name: str) -> Sequence[str]:
        """Forget a view; returns those of its names that no other view has."""
        with self._lock:
            gone = self._file.views.pop(name)
            used = {entry for view in self._file.views.values() for entry in view.names}
            left = [entry for entry in gone.names if entry not in used]
            for entry in left:
                del self._file.slots[entry]
            self._write()
            return left

    def add_mount(self, record: MountRecord) -> None:
        with self._lock:
            self._file.mounts.append(record)
            self._write()

    def remove_mount(self, target: str) -> None:
        with self._lock:
            self._file.mounts = [record for record in self._file.mounts if record.target != target]
            self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".new")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(self._file))
        temporary.replace(self._path)
