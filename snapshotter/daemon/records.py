"""What a daemon was serving, on disk, so that its successor can clean up after a crash."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from snapshotter.daemon.errors import DaemonError
from snapshotter.fuse.session import FILE_SYSTEM
from snapshotter.fuse.view import MAX_SLOT
from snapshotter.mounts import syscalls
from snapshotter.mounts.table import read_mounts

if TYPE_CHECKING:
    from snapshotter.daemon.places import Places

log = logging.getLogger(__name__)


class MountRecord(msgspec.Struct, frozen=True):
    """A mount that was made. `slot` is the view's in inode numbers; `digest` the image's."""

    target: str
    reference: str
    digest: str
    slot: int


class _File(msgspec.Struct):
    """The file. `next_slot` only grows, because the kernel remembers the inodes of old views."""

    next_slot: int = 1
    mounts: list[MountRecord] = []


class Records:
    """The record file of one daemon. Every change is on disk when the method returns.

    Thread-safe. Methods write a small file and wait for the disk; call them from worker threads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _File()
        self._lock = threading.Lock()

    def take_slot(self) -> int:
        """A slot that was never used in this daemon's FUSE mount. Raises DaemonError."""
        with self._lock:
            slot = self._file.next_slot
            if slot > MAX_SLOT:
                raise DaemonError(f"{MAX_SLOT} images were mounted", hint="restart the daemon")
            self._file.next_slot += 1
            self._write()
            return slot

    def add(self, record: MountRecord) -> None:
        with self._lock:
            self._file.mounts.append(record)
            self._write()

    def remove(self, target: str) -> None:
        with self._lock:
            self._file.mounts = [record for record in self._file.mounts if record.target != target]
            self._write()

    def take_over(self) -> list[MountRecord]:
        """What a dead daemon left recorded; the file starts afresh."""
        try:
            left = msgspec.json.decode(self._path.read_bytes(), type=_File).mounts
        except FileNotFoundError:
            return []
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            log.warning("%s is damaged and starts afresh: %s", self._path, error)
            left = []
        with self._lock:
            self._write()
        return left

    def _write(self) -> None:
        temporary = self._path.with_suffix(".new")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(self._file))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)


def detach_dead_mounts(places: Places, records: Records) -> None:
    """Take down what a killed daemon of the same state directory left mounted.

    Its mounts answer nothing but ENOTCONN, and mounting below a dead one is impossible. Found in
    the mount table by type and source, so the ones that never got into the record are found too.
    Nothing is mounted again: whoever mounted it may not want it any more.
    """
    images = {record.target: record.reference for record in records.take_over()}
    kind, source = FILE_SYSTEM.encode(), os.fsencode(places.mount)
    for entry in reversed(read_mounts()):  # what lies on top first
        if entry.kind == kind and entry.source == source:
            point = os.fsdecode(entry.point)
            log.warning(
                "detaching %s, left by a daemon that was killed (%s)",
                point,
                images.get(point, "not an image's mount"),
            )
            syscalls.unmount(Path(point), detach=True)
