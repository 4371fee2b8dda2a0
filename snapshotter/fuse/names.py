"""Names of the directories that are being walked: most lookups are of the next name in one.

Finding one name in a directory costs as much as reading eight of them. So what is looked up in for
the second time is read as a whole, and kept until others have taken its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from snapshotter.fuse.view import NID_MASK

if TYPE_CHECKING:
    from snapshotter.fuse.view import Tree

_LARGEST = 64 << 10
"""Bytes of the largest directory that is kept: some 1500 names, 0.5 ms to read."""

_MOST = 1 << 20
"""Bytes of all directories that are kept. A name takes some five times what it has in there, so
that is 5 MiB of memory."""

_SEEN = 256  # what a directory counts that was looked up in once


class _Directory(NamedTuple):
    """`names` is None if it was not read; `size` is what it counts."""

    size: int
    names: dict[bytes, int] | None


class Names:
    """Of one session. Inode numbers mean the same for as long as it lasts, so nothing gets old."""

    def __init__(self) -> None:
        self._directories: dict[int, _Directory] = {}
        self._size = 0

    def lookup(self, image: Tree, number: int, name: bytes) -> int | None:
        """The nid of a name in a directory of `image`, which has this inode number in the mount.

        Raises FormatError.
        """
        known = self._directories.get(number)
        if known is not None and known.names is not None:
            return known.names.get(name)
        nid = number & NID_MASK
        if known is None:
            self._keep(number, _Directory(_SEEN, None))
        elif (size := image.inode(nid).size) <= _LARGEST:
            names = {name: child for _, name, child, _ in image.readdir(nid)}
            for dots in (b".", b".."):
                if (child := image.lookup(nid, dots)) is not None:
                    names[dots] = child
            self._keep(number, _Directory(size, names))
            return names.get(name)
        return image.lookup(nid, name)

    def _keep(self, number: int, directory: _Directory) -> None:
        former = self._directories.pop(number, None)
        self._size += directory.size - (0 if former is None else former.size)
        self._directories[number] = directory
        while self._size > _MOST:
            oldest = next(iter(self._directories))
            self._size -= self._directories.pop(oldest).size
