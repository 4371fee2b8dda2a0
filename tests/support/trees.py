"""A directory tree as a value, so that two of them can be compared in every respect."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Item:
    """What stat(2), readlink(2), listxattr(2) and read(2) tell about one name.

    `mtime_ns` is None for directories whose time an unpacker makes up. `content` is the SHA-256 of
    a regular file, `names` all names in the tree that share the inode.
    """

    mode: int
    uid: int
    gid: int
    size: int | None
    mtime_ns: int | None
    nlink: int | None
    rdev: int | None
    target: bytes | None
    xattrs: tuple[tuple[bytes, bytes], ...]
    content: str | None
    names: tuple[bytes, ...]


def read_tree(root: Path, *, timeless: frozenset[bytes] = frozenset()) -> dict[bytes, Item]:
    """Every name below `root` (`b""` is the root itself), files read to their end.

    Paths in `timeless` get no mtime: directories that no layer names exist since the unpacking.
    """
    base = os.fsencode(root)
    paths = [b"", *_walk(base)]
    groups: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    stats: dict[bytes, os.stat_result] = {}
    for path in paths:
        stats[path] = status = os.lstat(base + path)
        groups[status.st_dev, status.st_ino].append(path)
    return {
        path: _item(
            base + path,
            status,
            tuple(sorted(groups[status.st_dev, status.st_ino])),
            timed=path not in timeless,
        )
        for path, status in stats.items()
    }


def _walk(base: bytes) -> list[bytes]:
    found: list[bytes] = []
    stack = [b""]
    while stack:
        directory = stack.pop()
        with os.scandir(base + directory) as entries:
            for entry in entries:
                path = directory + b"/" + entry.name
                found.append(path)
                if entry.is_dir(follow_symlinks=False):
                    stack.append(path)
    return sorted(found)


def _item(path: bytes, status: os.stat_result, names: tuple[bytes, ...], *, timed: bool) -> Item:
    mode = status.st_mode
    is_device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
    is_dir = stat.S_ISDIR(mode)
    return Item(
        mode=mode,
        uid=status.st_uid,
        gid=status.st_gid,
        size=None if is_dir else status.st_size,
        mtime_ns=status.st_mtime_ns if timed else None,
        nlink=None if is_dir else status.st_nlink,
        rdev=status.st_rdev if is_device else None,
        target=os.readlink(path) if stat.S_ISLNK(mode) else None,
        xattrs=_xattrs(path),
        content=_content(path) if stat.S_ISREG(mode) else None,
        names=names,
    )


def _xattrs(path: bytes) -> tuple[tuple[bytes, bytes], ...]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple(
        (os.fsencode(name), os.getxattr(path, name, follow_symlinks=False)) for name in names
    )


def _content(path: bytes) -> str:
    """Hash a file; runs of zeros of a huge sparse file are read like all else."""
    hasher = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(4 << 20):
            hasher.update(piece)
    return hasher.hexdigest()


def differences(found: dict[bytes, Item], expected: dict[bytes, Item]) -> list[str]:
    """One line for each name and field that differs; empty when the trees are the same."""
    lines = [f"missing: {path!r}" for path in sorted(expected.keys() - found.keys())]
    lines += [f"surplus: {path!r}" for path in sorted(found.keys() - expected.keys())]
    for path in sorted(found.keys() & expected.keys()):
        mine, theirs = found[path], expected[path]
        for name in Item.__slots__:
            a, b = getattr(mine, name), getattr(theirs, name)
            if a != b and not (name == "mtime_ns" and None in (a, b)):
                lines.append(f"{path!r}: {name} is {a!r}, should be {b!r}")
    return lines
