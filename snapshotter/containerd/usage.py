"""How much disk a directory tree takes, counted as containerd does (continuity's fs/du_unix.go)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from snapshotter.containerd.snapshots import Usage
from snapshotter.store.errors import store_error

if TYPE_CHECKING:
    from pathlib import Path

_BLOCK = 512  # bytes; the unit of st_blocks, whatever the file system's own blocks are


def tree_usage(root: Path) -> Usage:
    """The usage of a tree, its root included. A file with several names counts once.

    For trio's worker threads: a cancelled caller is noticed between directories. What vanishes
    meanwhile is not counted, because containers write while this looks. Raises StoreError.
    """
    size = 0
    seen: set[tuple[int, int]] = set()
    pending = [os.fspath(root)]
    try:
        status = os.lstat(root)
        seen.add((status.st_dev, status.st_ino))
        size += status.st_blocks * _BLOCK
        while pending:
            trio.from_thread.check_cancelled()
            for status, directory in _entries(pending.pop()):
                if directory:
                    pending.append(directory)
                inode = (status.st_dev, status.st_ino)
                if inode not in seen:
                    seen.add(inode)
                    size += status.st_blocks * _BLOCK
    except OSError as error:
        raise store_error(error, root, "cannot count the disk usage of") from error
    return Usage(inodes=len(seen), size=size)


def _entries(directory: str) -> list[tuple[os.stat_result, str]]:
    """What is in a directory; with its path if it is a directory, else with an empty one."""
    found = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                is_directory = entry.is_dir(follow_symlinks=False)
                found.append((status, entry.path if is_directory else ""))
    except FileNotFoundError:
        pass
    return found
