"""The merged tree of an image while an index is being built.

Nodes are inodes: two names of one hard-linked file refer to the same Node. The tree lives only
during a build; readers use the EROFS image that is made from it.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of a regular file that lies in one layer. Offsets and length in bytes.

    `file_offset` and `raw_offset` are multiples of 512; only the last extent of a file may have a
    length that is not. `layer` counts the image's layers from 0, the lowest.
    """

    file_offset: int
    layer: int
    raw_offset: int
    length: int


@dataclass(slots=True, eq=False)
class Node:
    """An inode. `mode` holds type and permission bits as in stat(2)."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0  # regular files: bytes; symlinks: len(target); others 0
    nlink: int = 1  # directories: 2 + subdirectories, kept by the merger
    rdev: tuple[int, int] = (0, 0)  # (major, minor) of devices
    target: bytes = b""  # of symlinks
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: dict[bytes, Node] = field(default_factory=dict)  # of directories
    extents: tuple[Extent, ...] = ()  # of regular files, by file_offset; gaps are holes
    # 512-byte-aligned blocks of data that travel inside the index, by file offset (multiples of
    # 512, each value's length a multiple of 512 except at the end of the file); never overlap
    # `extents`. Only for sparse files whose data is not block-aligned in the tar.
    embedded: tuple[tuple[int, bytes], ...] = ()

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)


def walk(root: Node) -> Iterator[tuple[bytes, Node]]:
    """Yield (path, node) for the whole tree, names of a directory in byte order, parents first.

    The root's path is b"/"; others start with a slash. A hard-linked file comes once a name.
    """
    stack: list[tuple[bytes, Node]] = [(b"/", root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        if node.children:
            prefix = path if path == b"/" else path + b"/"
            stack.extend(
                (prefix + name, node.children[name]) for name in sorted(node.children, reverse=True)
            )
