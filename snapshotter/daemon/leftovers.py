"""Mounts of a daemon that is gone, and whose FUSE session nobody can take over."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.fuse.device import FILE_SYSTEM
from snapshotter.mounts import syscalls
from snapshotter.mounts.errors import MountError
from snapshotter.mounts.table import MountEntry, read_mounts

if TYPE_CHECKING:
    from snapshotter.daemon.places import Places

log = logging.getLogger(__name__)


def is_served(entry: MountEntry, places: Places) -> bool:
    """Whether a mount is served by the FUSE session of these places, itself or below EROFS.

    Told by type and source, so that mounts that others made from ours are found, too (containerd
    binds views).
    """
    mount = os.fsencode(places.mount)
    if entry.kind == FILE_SYSTEM.encode():
        return entry.source == mount
    return entry.kind == b"erofs" and entry.source.startswith(mount + b"/")


def is_ours(entry: MountEntry, places: Places) -> bool:
    """Whether a mount shows an image of these places, by the FUSE session or by the store alone."""
    store = os.fsencode(places.root) + b"/"
    return is_served(entry, places) or (entry.kind == b"erofs" and entry.source.startswith(store))


def detach_dead_mounts(places: Places) -> None:
    """Take down what answers nothing but ENOTCONN any more; mounting below it is impossible.

    Nothing is mounted again: whoever mounted it may not want it any more.
    """
    for entry in reversed(read_mounts()):  # what lies on top first
        if is_served(entry, places):
            point = Path(os.fsdecode(entry.point))
            log.warning("detaching %s, left by a daemon that was killed", point)
            try:
                syscalls.unmount(point, detach=True)
            except MountError as error:  # gone meanwhile, or below another one
                log.warning("%s", error)
