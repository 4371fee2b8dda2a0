"""What a valid EROFS image is, said as simply as possible: every inode by itself, nothing fast.

The validator has to agree with it about every image whose superblock can be read.
"""

from __future__ import annotations

import stat
from collections import Counter
from typing import TYPE_CHECKING

from index.erofs import directory, xattrs
from index.erofs.layout import (
    BLOCK_SIZE,
    CHUNK_INDEX,
    DTYPES,
    FORMAT_CHUNKED,
    FORMAT_FLAT,
    HOLE,
    INODE,
    NANOSECONDS,
    SLOT_SIZE,
    align,
    xattr_body_size,
)
from index.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from index.erofs.reader import Image


def is_valid(image: Image, devices: Sequence[int]) -> bool:
    """Whether the image keeps all rules, over layers of these sizes in bytes."""
    return bytes_used(image, devices) is not None


def bytes_used(image: Image, devices: Sequence[int]) -> int | None:
    """Bytes of a valid image that belong to inodes, directories and tables of chunks, else None."""
    oracle = _Oracle(image, devices)
    try:
        oracle.run()
    except (_BrokenRuleError, FormatError):  # the latter is what the reader itself refuses
        return None
    return oracle.used


class _BrokenRuleError(Exception):
    pass


def _rule(kept: bool) -> None:
    if not kept:
        raise _BrokenRuleError


class _Oracle:
    def __init__(self, image: Image, devices: Sequence[int]) -> None:
        self.image = image
        self.size = len(image.buffer)
        self.limits = [self.size, *devices]
        self.used = 0

    def run(self) -> None:
        image = self.image
        _rule(
            tuple(align(n, BLOCK_SIZE) // BLOCK_SIZE for n in self.limits[1:])
            == image.device_blocks
        )
        names: Counter[int] = Counter()
        types = {image.root: 2}
        stack = [(image.root, image.root)]
        while stack:
            nid, parent = stack.pop()
            entries = self.entries(nid)
            _rule(sorted({name for name, _, _ in entries}) == [name for name, _, _ in entries])
            found = {name: (child, dtype) for name, child, dtype in entries}
            _rule(found.pop(b".", None) == (nid, 2) and found.pop(b"..", None) == (parent, 2))
            below = [child for child, dtype in found.values() if dtype == 2]
            for child, dtype in found.values():
                _rule(dtype != 2 or child not in types)
                _rule(types.setdefault(child, dtype) == dtype)
                names[child] += dtype != 2
            _rule(self.inode(nid, 2) == 2 + len(below))
            stack += [(child, nid) for child in below]
        for nid, dtype in types.items():
            if dtype != 2:
                _rule(self.inode(nid, dtype) == names[nid])
        _rule(len(types) == image.inode_count)

    def use(self, count: int) -> None:
        self.used += count
        _rule(self.used <= self.size)

    def entries(self, nid: int) -> list[tuple[bytes, int, int]]:
        found = []
        for _, block in self.image.directory_blocks(nid):
            self.use(len(block))
            names, nids, dtypes = directory.unpack(block)
            _rule(all(len(name) <= 255 for name in names))
            found += zip(names, nids, dtypes, strict=True)
        return found

    def inode(self, nid: int, dtype: int) -> int:
        """Check an inode but for its names; return its link count."""
        image = self.image
        start = image.meta_start + nid * SLOT_SIZE
        _rule(start + INODE.size <= self.size)
        form, count, mode, size, union, _, _, _, nanoseconds, nlink = INODE.unpack_from(
            image.buffer, start
        )
        _rule(DTYPES.get(stat.S_IFMT(mode)) == dtype and size < 1 << 63)
        _rule(nanoseconds < NANOSECONDS and nlink > 0)
        end = start + INODE.size + xattr_body_size(count)
        _rule(end <= self.size)
        if count:
            found = [
                xattr.name
                for xattr in xattrs.parse(image.buffer, start + INODE.size, end, image.xattr_start)
            ]
            _rule(0 < len(found) == len(set(found)))
        self.use(end - start)
        if dtype == 1 and size:
            _rule(form == FORMAT_CHUNKED)
            self.chunks(size, union, align(end, CHUNK_INDEX.size))
        elif dtype == 7:
            target = image.readlink(nid)
            self.use(len(target))
            _rule(b"\0" not in target)
        elif dtype != 2:
            _rule(form == FORMAT_FLAT and size == 0 and (union == 0 or dtype in (3, 4)))
        return int(nlink)

    def chunks(self, size: int, chunk_format: int, start: int) -> None:
        _rule(0x20 <= chunk_format < 0x40)
        chunk_size = BLOCK_SIZE << (chunk_format - 0x20)
        count = -(-size // chunk_size)
        _rule(start + count * CHUNK_INDEX.size <= self.size)
        self.use(count * CHUNK_INDEX.size)
        for chunk in range(count):
            high, device, block = CHUNK_INDEX.unpack_from(
                self.image.buffer, start + chunk * CHUNK_INDEX.size
            )
            _rule(high == 0)
            if block != HOLE:
                length = min(chunk_size, size - chunk * chunk_size)
                _rule(device < len(self.limits))
                _rule(block * BLOCK_SIZE + length <= self.limits[device])
