"""Files that are either there as a whole, also after a power cut, or not there at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING

from snapshotter.store.errors import store_error

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

TEMPORARY_PREFIX = ".new-"


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, mode 0700, durably. Raises StoreError."""
    try:
        created = [path, *path.parents]
        created = created[: next(i for i, parent in enumerate(created) if parent.exists())]
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in reversed(created):
            sync_directory(directory.parent)
    except OSError as error:
        raise store_error(error, path, "cannot create") from error


def sync_file(path: Path) -> None:
    """Make a file's content, and then its name, durable. Raises StoreError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        sync_directory(path.parent)
    except OSError as error:
        raise store_error(error, path, "cannot sync") from error


def write_file(path: Path, pieces: Iterable[bytes | memoryview], *, sync: bool = True) -> None:
    """Write a file under a temporary name, sync it, rename it, sync the directory.

    Without `sync` other processes see all of it or nothing, but a power cut may leave a part.
    Raises StoreError, or what `pieces` raises, and leaves nothing behind then.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.rename(temporary, path)
        temporary = ""
        if sync:
            sync_directory(path.parent)
    except OSError as error:
        raise store_error(error, path, "cannot write") from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def remove_file(path: Path) -> None:
    """Remove a file durably; one that is not there is fine. Raises StoreError."""
    try:
        path.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise store_error(error, path, "cannot remove") from error


def discard_temporaries(directory: Path) -> None:
    """Remove what an interrupted `write_file` left. For the directory's only writer, at start."""
    for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            leftover.unlink()
