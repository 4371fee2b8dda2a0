"""Flat files in the FUSE mount: one file of bytes, instead of a tree.

The kernel's EROFS takes an image's metadata from one, and its layers' raw spaces from others.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from index.erofs.layout import BLOCK_SIZE
from index.erofs.reader import Inode, Piece
from index.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from index.erofs.reader import Buffer

_MODE = stat.S_IFREG | 0o400  # for the kernel and root


class FlatFile:
    """A `Tree` that is a single regular file: a buffer, or the raw space of a view's only layer."""

    root = 0
    inode_count = 1

    def __init__(
        self, size: int, buffer: Buffer | None = None, *, whole_blocks: bool = True
    ) -> None:
        """`size` in bytes; of the buffer, if there is one. With `whole_blocks` it has zeros up
        to the end of the last block: the kernel's EROFS reads whole ones, or nothing (EIO).
        """
        self._data = size
        self._size = size + (-size % BLOCK_SIZE if whole_blocks else 0)
        self._device = 1 if buffer is None else 0
        self.buffer: Buffer = b"" if buffer is None else buffer

    def inode(self, nid: int) -> Inode:
        self._check(nid)
        return Inode(nid, _MODE, 0, 0, self._size, 0, 1, (0, 0))

    def map(self, nid: int, offset: int, length: int) -> list[Piece]:
        self._check(nid)
        end = min(offset + length, self._size)
        pieces = []
        if offset < (data_end := min(end, self._data)):
            pieces.append(Piece(offset, self._device, offset, data_end - offset))
        if (start := max(offset, self._data)) < end:
            pieces.append(Piece(start, None, 0, end - start))
        return pieces

    def lookup(self, nid: int, name: bytes) -> int | None:
        raise FormatError(f"inode {nid} is not a directory")

    def readdir(self, nid: int, start: int = 0) -> Iterator[tuple[int, bytes, int, int]]:
        raise FormatError(f"inode {nid} is not a directory")

    def readlink(self, nid: int) -> bytes:
        raise FormatError(f"inode {nid} is not a symlink")

    def has_xattrs(self, nid: int) -> bool:
        return False

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        return {}

    def _check(self, nid: int) -> None:
        if nid != self.root:
            raise FormatError(f"inode {nid} is not in a file")
