"""The complete check of an EROFS image that came from outside.

After it every server, and the kernel, can walk the whole image without meeting a rule broken. The
superblock was checked when the image was opened. Time and memory are linear in the image's size
whatever is in it: no byte may belong to two inodes, directories or tables of chunks.
"""

from __future__ import annotations

import operator
import stat
from typing import TYPE_CHECKING

from index.erofs import directory, xattrs
from index.erofs.layout import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_BITS_MASK,
    CHUNK_INDEX,
    CHUNK_WITH_DEVICE,
    DTYPES,
    FORMAT_CHUNKED,
    FORMAT_FLAT,
    HOLE,
    INODE,
    NAME_MAX,
    NANOSECONDS,
    SLOT_SIZE,
    WHOLE_FILE,
    WHOLE_FILE_CHUNKS,
    WHOLE_FILE_MAX,
    align,
    xattr_body_size,
)
from index.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from index.erofs.reader import Image

_TYPE_BITS = 0o170000
_FILE_SIZE_MAX = (1 << 63) - 1
_REGULAR = DTYPES[stat.S_IFREG]
_DIRECTORY = DTYPES[stat.S_IFDIR]
_SYMLINK = DTYPES[stat.S_IFLNK]
_DEVICES = (DTYPES[stat.S_IFCHR], DTYPES[stat.S_IFBLK])

_ONE_NAME = 1
_MORE_NAMES = 2


def validate(image: Image, devices: Sequence[int]) -> None:
    """Raise FormatError unless the image keeps all rules, over layers of these sizes in bytes."""
    blocks = tuple(align(size, BLOCK_SIZE) >> BLOCK_BITS for size in devices)
    if blocks != image.device_blocks:
        raise FormatError(
            f"an EROFS image for {len(image.device_blocks)} layers does not fit the "
            f"{len(blocks)} layers given, or their sizes differ"
        )
    _Validator(image, devices).run()


class _Validator:
    def __init__(self, image: Image, devices: Sequence[int]) -> None:
        self._image = image
        self._buffer = image.buffer
        self._size = len(image.buffer)
        self._limits = (self._size, *devices)  # bytes, by the device of a chunk
        # What is known of an inode, by its number: nothing, or how many names it may have.
        self._seen = bytearray((self._size - image.meta_start) // SLOT_SIZE + 1)
        self._missing: dict[int, tuple[int, int]] = {}  # nid: names to come, type
        self._inodes = 0
        self._unclaimed = self._size

    def run(self) -> None:
        root = self._image.root
        self._enter(root)
        stack = [(root, root)]
        while stack:
            nid, parent = stack.pop()
            below = self._check_directory(nid, parent)
            stack.extend((child, nid) for child in below)
        if self._missing:
            nid, (names, _) = self._missing.popitem()
            raise FormatError(f"inode {nid} has {names} names less than its link count")
        if self._inodes != self._image.inode_count:
            raise FormatError(
                f"an EROFS image with {self._inodes} inodes claims {self._image.inode_count}"
            )

    def _claim(self, count: int) -> None:
        """Take bytes of the image for one owner. There are only so many of them."""
        self._unclaimed -= count
        if self._unclaimed < 0:
            raise FormatError("parts of the EROFS image lie on top of each other")

    def _enter(self, nid: int) -> None:
        """Note that an inode was reached, which must not have been before."""
        if not 0 <= nid < len(self._seen):
            raise FormatError(f"inode {nid} is outside of the image")
        if self._seen[nid]:
            raise FormatError(f"inode {nid} has more names than its link count")
        self._seen[nid] = _ONE_NAME
        self._inodes += 1

    def _check_directory(self, nid: int, parent: int) -> list[int]:
        """Check a directory and its children that are not; return those that are."""
        nlink = self._check_inode(nid, _DIRECTORY)
        below: list[int] = []
        dots = {b".": nid, b"..": parent}
        last = b""
        for _, block in self._image.directory_blocks(nid):
            self._claim(len(block))
            names, nids, dtypes = directory.unpack(block)
            if last >= names[0] or not all(map(operator.lt, names, names[1:])):
                raise FormatError(f"the names in directory {nid} are not in order")
            if max(map(len, names)) > NAME_MAX:
                raise FormatError(f"directory {nid} has a name of more than {NAME_MAX} bytes")
            last = names[-1]
            for name, child, dtype in zip(names, nids, dtypes, strict=True):
                if dtype == _REGULAR:
                    self._check_regular(child)
                elif dtype != _DIRECTORY:
                    self._check_other(child, dtype)
                elif name in dots:
                    if dots.pop(name) != child:
                        raise FormatError(f"{name!r} in directory {nid} leads to inode {child}")
                else:
                    self._enter(child)
                    below.append(child)
        if dots:
            raise FormatError(f"directory {nid} lacks its entries for itself or its parent")
        if nlink != 2 + len(below):
            raise FormatError(
                f"directory {nid} with {len(below)} subdirectories has link count {nlink}"
            )
        return below

    def _check_regular(self, nid: int) -> None:
        """Most inodes of an image are files in one piece; they are done here at once."""
        position = self._image.meta_start + nid * SLOT_SIZE
        if position > self._size - WHOLE_FILE.size:
            self._check_other(nid, _REGULAR)
            return
        form, count, mode, size, chunks, _, _, _, nanoseconds, nlink, high, device, block = (
            WHOLE_FILE.unpack_from(self._buffer, position)
        )
        if (
            form == FORMAT_CHUNKED
            and chunks == WHOLE_FILE_CHUNKS
            and nlink == 1
            and count == high == 0
            and mode & _TYPE_BITS == stat.S_IFREG
            and 0 < size <= WHOLE_FILE_MAX
            and nanoseconds < NANOSECONDS
            and device < len(self._limits)
            and (block << BLOCK_BITS) + size <= self._limits[device]
            and not self._seen[nid]
        ):
            self._seen[nid] = _ONE_NAME
            self._inodes += 1
            self._claim(INODE.size + CHUNK_INDEX.size)
        else:
            self._check_other(nid, _REGULAR)

    def _check_other(self, nid: int, dtype: int) -> None:
        """Check an inode under one of its names, unless an earlier name led to it."""
        known = self._missing.get(nid)
        if known is None:
            self._enter(nid)
            nlink = self._check_inode(nid, dtype)
            if nlink == 0:
                raise FormatError(f"inode {nid} has link count 0")
            names = nlink
        else:
            names, first_dtype = known
            if dtype != first_dtype:
                raise FormatError(f"inode {nid} has names of types {first_dtype} and {dtype}")
        if names > 1:
            self._missing[nid] = (names - 1, dtype)
        elif known is not None:
            del self._missing[nid]

    def _check_inode(self, nid: int, dtype: int) -> int:
        """Check an inode with all that belongs to it; return its link count."""
        position = self._image.meta_start + nid * SLOT_SIZE
        if position > self._size - INODE.size:
            raise FormatError(f"inode {nid} is outside of the image")
        form, count, mode, size, union, _, _, _, nanoseconds, nlink = INODE.unpack_from(
            self._buffer, position
        )
        if DTYPES.get(mode & _TYPE_BITS) != dtype:
            raise FormatError(f"inode {nid} with mode {mode:#o} is listed as type {dtype}")
        if nanoseconds >= NANOSECONDS or size > _FILE_SIZE_MAX:
            raise FormatError(f"inode {nid} has a size or a time that is out of range")
        body = position + INODE.size
        body_end = body + xattr_body_size(count)
        if count:
            self._check_xattrs(nid, body, body_end)
        self._claim(body_end - position)
        if dtype == _REGULAR and size:
            if form != FORMAT_CHUNKED:
                raise FormatError(f"inode {nid} is a file of format {form:#x}")
            self._check_chunks(nid, size, union, align(body_end, CHUNK_INDEX.size))
        elif dtype == _SYMLINK:
            target = self._image.readlink(nid)
            self._claim(len(target))
            if b"\0" in target:
                raise FormatError(f"the target of symlink {nid} has a NUL")
        elif dtype != _DIRECTORY and (
            form != FORMAT_FLAT or size or (union and dtype not in _DEVICES)
        ):
            raise FormatError(f"inode {nid} of type {dtype} has data or format {form:#x}")
        return int(nlink)

    def _check_xattrs(self, nid: int, start: int, end: int) -> None:
        if end > self._size:
            raise FormatError(f"the xattrs of inode {nid} are outside of the image")
        names = [
            xattr.name for xattr in xattrs.parse(self._buffer, start, end, self._image.xattr_start)
        ]
        # The kernel refuses inodes with a body that has nothing in it.
        if not names or len(set(names)) != len(names):
            raise FormatError(f"inode {nid} has no xattrs in its body, or one of them twice")

    def _check_chunks(self, nid: int, size: int, chunk_format: int, start: int) -> None:
        if chunk_format & ~CHUNK_BITS_MASK != CHUNK_WITH_DEVICE:
            raise FormatError(f"inode {nid} has chunk format {chunk_format:#x}")
        bits = BLOCK_BITS + (chunk_format & CHUNK_BITS_MASK)
        count = ((size - 1) >> bits) + 1
        end = start + count * CHUNK_INDEX.size
        if end > self._size:
            raise FormatError(f"the chunks of inode {nid} are outside of the image")
        self._claim(end - start)
        for chunk in range(count):
            high, device, block = CHUNK_INDEX.unpack_from(
                self._buffer, start + chunk * CHUNK_INDEX.size
            )
            if block == HOLE and not high:
                continue
            length = min(size - (chunk << bits), 1 << bits)
            if (
                high
                or device >= len(self._limits)
                or (block << BLOCK_BITS) + length > self._limits[device]
            ):
                raise FormatError(f"chunk {chunk} of inode {nid} is outside of device {device}")
