"""Whether a directory may become a mount point."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from snapshotter.mounts.errors import MountPointError
from snapshotter.mounts.table import mount_at

if TYPE_CHECKING:
    from pathlib import Path


def check_mount_point(path: Path) -> None:
    """Raise MountPointError unless `path` is an empty directory with nothing mounted on it.

    `path` is absolute and free of symbolic links. What lies in a directory would be hidden by the
    mount, so one that is not empty is most likely a mistake.
    """
    if mount_at(path) is not None:  # first, because this asks no file system, not even a dead one
        raise MountPointError(
            f"{path} is a mount point already", hint="unmount it first, or choose another directory"
        )
    try:
        with os.scandir(path) as entries:
            occupant = next(entries, None)
    except FileNotFoundError as error:
        raise MountPointError(f"{path} does not exist", hint=f"mkdir -p {path}") from error
    except NotADirectoryError as error:
        raise MountPointError(f"{path} is not a directory") from error
    except OSError as error:
        raise MountPointError(f"cannot look into {path}: {error.strerror}") from error
    if occupant is not None:
        raise MountPointError(
            f"{path} is not empty (it holds {occupant.name})",
            hint="an image is mounted on an empty directory; choose another one",
        )
