"""Read an EROFS image in place: the tree of a file index, as servers use it.

Nothing is parsed ahead and nothing is kept: an image of a million files opens as fast as one of
ten, and costs no memory but the pages that are read. Only images by `index.erofs.writer` can be
read. Damaged ones raise FormatError wherever it shows; `index.erofs.validate` finds all of it.
"""

from __future__ import annotations

import stat
import struct
from mmap import mmap
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from index.erofs import directory, xattrs
from index.erofs.layout import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_BITS_MASK,
    CHUNK_INDEX,
    CHUNK_WITH_DEVICE,
    DIRENT,
    DTYPES,
    FORMAT_CHUNKED,
    FORMAT_FLAT,
    FORMAT_INLINE,
    HOLE,
    INODE,
    INODE_HEAD,
    NANOSECONDS,
    SLOT_SIZE,
    SYMLINK_MAX,
    align,
    decode_device,
    xattr_body_size,
)
from index.erofs.superblock import Superblock
from index.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap
"""What an image can be read from; a memoryview must be of bytes."""

_TYPE_BITS = 0o170000
_DEVICE_TYPES = (stat.S_IFCHR, stat.S_IFBLK)
_FORMATS = frozenset((FORMAT_FLAT, FORMAT_INLINE, FORMAT_CHUNKED))
_NO_DEVICE = (0, 0)
_DOTS = (b".", b"..")
_PLACE_BITS = 6
"""A place in a directory is (block << 6) + entry: a block has at most 42 entries."""
_FIRST_NAMES = struct.Struct("<8xH10xH")
"""Where the first two names of a directory block start."""


class Inode(msgspec.Struct, frozen=True, gc=False):
    """What stat(2) tells. `mtime_ns` counts from the epoch; `rdev` is (major, minor)."""

    nid: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    nlink: int
    rdev: tuple[int, int]


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A run of a file's bytes. `file_offset`, `offset` and `length` > 0 in bytes.

    `device` None is a hole, 0 the image itself, k >= 1 the raw space of layer k - 1.
    """

    file_offset: int
    device: int | None
    offset: int
    length: int


class Image:
    """An image over a buffer, which must not change and must stay open as long as this is used.

    Inode numbers (nid) come from `root`, `lookup` and `readdir`; any other number raises
    FormatError or gives an arbitrary inode, never bytes from outside of the buffer.
    """

    def __init__(self, buffer: Buffer) -> None:
        """Read the superblock. Raises FormatError if it is not one that our writer writes."""
        head = Superblock.parse(buffer)
        self.buffer = buffer
        self.root = head.root
        self.inode_count = head.inode_count
        self.device_blocks = head.device_blocks
        """Blocks of each extra device, which are the layers in order."""
        self.meta_start = head.meta_block * BLOCK_SIZE
        """Where inode 0 would be, in bytes."""
        self.xattr_start = head.xattr_block * BLOCK_SIZE
        """Where the shared xattrs are, in bytes."""
        self._size = len(buffer)
        self._last_inode = self._size - INODE.size

    def inode(self, nid: int) -> Inode:
        """The inode with this number."""
        position = self.meta_start + nid * SLOT_SIZE
        if nid < 0 or position > self._last_inode:
            raise FormatError(f"inode {nid} is outside of the image")
        form, _, mode, size, union, uid, gid, seconds, nanoseconds, nlink = INODE.unpack_from(
            self.buffer, position
        )
        kind = mode & _TYPE_BITS
        if form not in _FORMATS or kind not in DTYPES:
            raise FormatError(f"inode {nid} has format {form:#x} and mode {mode:#o}")
        return Inode(
            nid,
            mode,
            uid,
            gid,
            size,
            seconds * NANOSECONDS + nanoseconds,
            nlink,
            decode_device(union) if kind in _DEVICE_TYPES else _NO_DEVICE,
        )

    def lookup(self, nid: int, name: bytes) -> int | None:
        """The inode that a name in a directory stands for; `.` and `..` are names too.

        A binary search for the block, then one search in that block.
        """
        start, whole, tail, size = self._flat(nid, stat.S_IFDIR)
        buffer = self.buffer
        # Find the last block whose first name is not after `name`. Those before the last are all
        # whole, so that a probe needs no bounds but its own.
        low, high = 0, (size - 1) >> BLOCK_BITS
        while low < high:
            middle = (low + high + 1) >> 1
            at = middle << BLOCK_BITS
            if at + BLOCK_SIZE <= whole:
                position = start + at
                first, second = _FIRST_NAMES.unpack_from(buffer, position)
                if DIRENT.size < first < second <= BLOCK_SIZE:
                    probe = bytes(buffer[position + first : position + second])
                else:
                    probe = directory.first_name(bytes(buffer[position : position + BLOCK_SIZE]))
            else:
                position = start + at if at < whole else tail
                probe = directory.first_name(bytes(buffer[position : position + size - at]))
            if probe <= name:
                low = middle
            else:
                high = middle - 1
        at = low << BLOCK_BITS
        position = start + at if at < whole else tail
        return directory.find(bytes(buffer[position : position + min(BLOCK_SIZE, size - at)]), name)

    def readdir(self, nid: int, start: int = 0) -> Iterator[tuple[int, bytes, int, int]]:
        """Yield (next place, name, inode, type) of a directory's entries from a place on.

        Without `.` and `..`, names in byte order. `start` is 0 or a next place that was given
        before. The type is as in `layout.DTYPES`.
        """
        if start < 0:
            raise FormatError(f"{start} is no place in a directory")
        skip = start & (1 << _PLACE_BITS) - 1
        for number, block in self.directory_blocks(nid, start >> _PLACE_BITS):
            names, nids, dtypes = directory.unpack(block)
            place = (number << _PLACE_BITS) + skip
            for name, target, dtype in zip(names[skip:], nids[skip:], dtypes[skip:], strict=True):
                place += 1
                if name not in _DOTS:
                    yield place, name, target, dtype
            skip = 0

    def directory_blocks(self, nid: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield (number, bytes) of a directory's blocks from number `start` on.

        The last is as long as it is used.
        """
        data, whole, tail, size = self._flat(nid, stat.S_IFDIR)
        for number in range(start, ((size - 1) >> BLOCK_BITS) + 1):
            at = number << BLOCK_BITS
            position = data + at if at < whole else tail
            yield number, bytes(self.buffer[position : position + min(BLOCK_SIZE, size - at)])

    def readlink(self, nid: int) -> bytes:
        """The target of a symlink."""
        start, whole, tail, size = self._flat(nid, stat.S_IFLNK)
        if size > SYMLINK_MAX:
            raise FormatError(f"inode {nid} is a symlink of {size} bytes")
        if whole >= size:
            return bytes(self.buffer[start : start + size])
        return bytes(self.buffer[start : start + whole]) + bytes(
            self.buffer[tail : tail + size - whole]
        )

    def has_xattrs(self, nid: int) -> bool:
        """Whether there may be xattrs; cheap."""
        return self._head(nid)[1] != 0

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        """All xattrs of an inode: full names to values."""
        count = self._head(nid)[1]
        if not count:
            return {}
        start = self.meta_start + nid * SLOT_SIZE + INODE.size
        end = start + xattr_body_size(count)
        if end > self._size:
            raise FormatError(f"the xattrs of inode {nid} are outside of the image")
        return {
            name: bytes(self.buffer[value_start:value_end])
            for name, value_start, value_end in xattrs.parse(
                self.buffer, start, end, self.xattr_start
            )
        }

    def map(self, nid: int, offset: int, length: int) -> list[Piece]:
        """Where a range of a regular file is: pieces in order without gaps, cut at its end.

        Neighbours that continue each other are one piece.
        """
        form, count, mode, size, union = self._head(nid)
        if mode & _TYPE_BITS != stat.S_IFREG:
            raise FormatError(f"inode {nid} is not a regular file")
        end = min(offset + length, size)
        if offset < 0 or offset >= end:
            return []
        if form != FORMAT_CHUNKED or union & ~CHUNK_BITS_MASK != CHUNK_WITH_DEVICE:
            raise FormatError(f"inode {nid} is a file of format {form:#x} and chunks {union:#x}")
        bits = BLOCK_BITS + (union & CHUNK_BITS_MASK)
        indices = align(
            self.meta_start + nid * SLOT_SIZE + INODE.size + xattr_body_size(count),
            CHUNK_INDEX.size,
        )
        first, last = offset >> bits, (end - 1) >> bits
        if indices + (last + 1) * CHUNK_INDEX.size > self._size:
            raise FormatError(f"the chunks of inode {nid} are outside of the image")
        pieces: list[Piece] = []
        start = offset
        for chunk in range(first, last + 1):
            _, device, block = CHUNK_INDEX.unpack_from(
                self.buffer, indices + chunk * CHUNK_INDEX.size
            )
            length = min(end, (chunk + 1) << bits) - start
            if block == HOLE:
                piece = Piece(start, None, 0, length)
            else:
                address = (block << BLOCK_BITS) + start - (chunk << bits)
                if address + length > self._device_size(device):
                    raise FormatError(f"a chunk of inode {nid} runs past device {device}")
                piece = Piece(start, device, address, length)
            if pieces and _continues(pieces[-1], piece):
                before = pieces.pop()
                piece = Piece(
                    before.file_offset, before.device, before.offset, before.length + length
                )
            pieces.append(piece)
            start += length
        return pieces

    def _device_size(self, device: int) -> int:
        """Bytes of a device, up to its last whole block; nothing in a device that is not there."""
        if device == 0:
            return self._size
        if device <= len(self.device_blocks):
            return self.device_blocks[device - 1] << BLOCK_BITS
        return 0

    def _head(self, nid: int) -> tuple[int, int, int, int, int]:
        """An inode's format, xattr count, mode, size and union field, unchecked."""
        position = self.meta_start + nid * SLOT_SIZE
        if nid < 0 or position > self._last_inode:
            raise FormatError(f"inode {nid} is outside of the image")
        return INODE_HEAD.unpack_from(self.buffer, position)

    def _flat(self, nid: int, kind: int) -> tuple[int, int, int, int]:
        """Where a directory's or symlink's data is: (start, whole, tail, size) in bytes.

        `whole` bytes are at `start`, and what is left of `size` at `tail`. All of it is in the
        image, and there is some.
        """
        form, count, mode, size, block = self._head(nid)
        if mode & _TYPE_BITS != kind:
            raise FormatError(f"inode {nid} has mode {mode:#o}, not {kind:#o}")
        start = block << BLOCK_BITS
        if form == FORMAT_INLINE and size:
            whole = (size - 1) >> BLOCK_BITS << BLOCK_BITS
            tail = self.meta_start + nid * SLOT_SIZE + INODE.size + xattr_body_size(count)
            if (
                tail & BLOCK_SIZE - 1
            ) + size - whole > BLOCK_SIZE or tail + size - whole > self._size:
                raise FormatError(f"the inline data of inode {nid} crosses a block")
        elif form == FORMAT_FLAT and size:
            whole, tail = size, 0
        else:
            raise FormatError(f"inode {nid} of {size} bytes has format {form:#x}")
        if start + whole > self._size:
            raise FormatError(f"the data of inode {nid} is outside of the image")
        return start, whole, tail, size


def _continues(before: Piece, piece: Piece) -> bool:
    if before.device != piece.device:
        return False
    return piece.device is None or before.offset + before.length == piece.offset
