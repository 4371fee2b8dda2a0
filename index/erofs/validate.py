"""The complete check of an EROFS image that came from outside.

After it every server, and the kernel, can walk the whole image without meeting a rule broken. The
superblock was checked when the image was opened. Time and memory are linear in the image's size
whatever is in it: no byte may belong to two inodes, directories or tables of chunks.

The walk goes down all directories and notes which inodes their names lead to. The sweep after it
looks at each of those inodes once, in the order in which they lie. Both take what has the commonest
shape by the hundred (`index.erofs.columns`); everything else comes one by one to `_check_inode`.
"""

from __future__ import annotations

import re
import stat
import struct
from itertools import chain, compress, islice, pairwise
from operator import lt
from typing import TYPE_CHECKING

from index.erofs import columns, xattrs
from index.erofs.layout import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_BITS_MASK,
    CHUNK_INDEX,
    CHUNK_WITH_DEVICE,
    DTYPES,
    FORMAT_CHUNKED,
    FORMAT_FLAT,
    FORMAT_INLINE,
    HOLE,
    INODE,
    NANOSECONDS,
    SLOT_SIZE,
    WHOLE_FILE,
    align,
    xattr_body_size,
)
from index.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeAlias

    from index.erofs.reader import Image

    _Listed: TypeAlias = tuple[bytes, int, int, int, bool]
    """A directory block; the directory and its parent; its link count; whether it ends here."""

_TYPE_BITS = 0o170000
_FILE_SIZE_MAX = (1 << 63) - 1
_REGULAR = DTYPES[stat.S_IFREG]
_DIRECTORY = DTYPES[stat.S_IFDIR]
_SYMLINK = DTYPES[stat.S_IFLNK]
_DEVICES = (DTYPES[stat.S_IFCHR], DTYPES[stat.S_IFBLK])
_TYPES = bytes(DTYPES.values())
_IS_REGULAR = bytes(dtype == _REGULAR for dtype in range(256))
_IS_DIRECTORY = bytes(dtype == _DIRECTORY for dtype in range(256))
_IS_OTHER = bytes(dtype not in (_REGULAR, _DIRECTORY) for dtype in range(256))
_LINKED = 0x80
"""Added to the type of an inode with several names."""

_PLAIN = struct.Struct("<IH2xQI20xII")
"""Of `layout.INODE`: format and xattr count in one, mode, size, union, nanoseconds, links."""
_INODE_SIZE = INODE.size
_WHOLE_SLOTS = WHOLE_FILE.size // SLOT_SIZE
_RUN = re.compile(rb"%c\0\0(?:%c\0\0){0,31}+|%c" % (_REGULAR, _REGULAR, _REGULAR))
"""In the types of inodes by number: up to 32 files that have room to be whole files, each right
after the one before; or a file that has not.
"""

# Blocks and files that are checked at once. A quarter and four times as many are as fast within
# 4 %; what is made of a block takes some 7 KB.
_BLOCKS = 256
_FILES = 256


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
        self._start = image.meta_start
        self._limits = (self._size, *devices)  # bytes, by the device of a chunk
        # By the number of an inode, the type that its names have; 0: nothing leads to it.
        self._seen = bytearray((self._size - image.meta_start) // SLOT_SIZE + 1)
        self._names: dict[int, int] = {}  # of inodes with several
        self._unclaimed = self._size
        # Of the directory whose blocks come next, so far: the last name, how many of `.` and `..`,
        # how many subdirectories.
        self._found = (b"", 0, 0)

    def run(self) -> None:
        self._walk()
        self._sweep()
        inodes = len(self._seen) - self._seen.count(0)
        if inodes != self._image.inode_count:
            raise FormatError(
                f"an EROFS image with {inodes} inodes claims {self._image.inode_count}"
            )

    def _claim(self, count: int) -> None:
        """Take bytes of the image for one owner. There are only so many of them."""
        self._unclaimed -= count
        if self._unclaimed < 0:
            raise FormatError("parts of the EROFS image lie on top of each other")

    def _walk(self) -> None:
        root = self._image.root
        self._enter_directory(root)
        stack = [(root, root)]
        while stack:
            blocks = self._blocks(stack)
            while some := list(islice(blocks, _BLOCKS)):
                stack += self._check_blocks(some)

    def _blocks(self, stack: list[tuple[int, int]]) -> Iterator[_Listed]:
        """Check the inodes of directories, given with their parents, and yield their blocks."""
        while stack:
            nid, parent = stack.pop()
            plain = self._plain(nid, stat.S_IFDIR)
            if plain is not None:
                nlink, block = plain
                self._claim(_INODE_SIZE + len(block))
                yield block, nid, parent, nlink, True
            else:
                nlink = self._check_inode(nid, _DIRECTORY)
                numbered = chain(self._image.directory_blocks(nid), ((-1, b""),))
                for (_, block), (following, _) in pairwise(numbered):
                    self._claim(len(block))
                    yield block, nid, parent, nlink, following < 0

    def _check_blocks(self, blocks: list[_Listed]) -> list[tuple[int, int]]:
        """Check the entries in these blocks, and directories that end with them.

        Returns subdirectories with their parents.
        """
        (names, nids, dtypes), counts = columns.unpack([listed[0] for listed in blocks])
        self._enter(nids, dtypes)
        ascends = bytes(map(lt, names, islice(names, 1, None)))
        below: list[tuple[int, int]] = []
        places = compress(range(len(names)), dtypes.translate(_IS_DIRECTORY))
        at = next(places, len(names))
        last, dots, directories = self._found
        end = 0
        for (_, nid, parent, nlink, final), count in zip(blocks, counts, strict=True):
            first, end = end, end + count
            if last >= names[first] or ascends.find(0, first, end - 1) >= 0:
                raise FormatError(f"the names in directory {nid} are not in order")
            while at < end:
                name, child = names[at], nids[at]
                if name == b"." or name == b"..":
                    if child != (nid if name == b"." else parent):
                        raise FormatError(f"{name!r} in directory {nid} leads to inode {child}")
                    dots += 1
                else:
                    self._enter_directory(child)
                    below.append((child, nid))
                    directories += 1
                at = next(places, len(names))
            if not final:
                last = names[end - 1]
                continue
            if dots != 2:
                raise FormatError(f"directory {nid} lacks its entries for itself or its parent")
            if nlink != 2 + directories:
                raise FormatError(
                    f"directory {nid} with {directories} subdirectories has link count {nlink}"
                )
            last, dots, directories = b"", 0, 0
        self._found = last, dots, directories
        return below

    def _enter_directory(self, nid: int) -> None:
        """Note that a directory was reached, which must not have been before."""
        if nid >= len(self._seen):
            raise FormatError(f"inode {nid} is outside of the image")
        if self._seen[nid]:
            raise FormatError(f"inode {nid} has more names than its link count")
        self._seen[nid] = _DIRECTORY

    def _enter(self, nids: list[int], dtypes: bytes) -> None:
        """Note the inodes, but for directories, to which names lead that claim these types."""
        nid, seen = -1, self._seen
        try:
            for nid in compress(nids, dtypes.translate(_IS_REGULAR)):
                if seen[nid]:
                    self._enter_again(nid, _REGULAR)
                else:
                    seen[nid] = _REGULAR
            others = dtypes.translate(_IS_OTHER)
            for nid, dtype in zip(compress(nids, others), compress(dtypes, others), strict=True):
                if dtype not in _TYPES:
                    raise FormatError(f"inode {nid} is listed as type {dtype}")
                if seen[nid]:
                    self._enter_again(nid, dtype)
                else:
                    seen[nid] = dtype
        except IndexError as error:
            raise FormatError(f"inode {nid} is outside of the image") from error

    def _enter_again(self, nid: int, dtype: int) -> None:
        known = self._seen[nid] & ~_LINKED
        if known == _DIRECTORY:
            raise FormatError(f"inode {nid} has more names than its link count")
        if known != dtype:
            self._check_inode(nid, known)
            raise FormatError(f"inode {nid} has names of types {known} and {dtype}")
        self._seen[nid] = dtype | _LINKED
        self._names[nid] = self._names.get(nid, 1) + 1

    def _sweep(self) -> None:
        """Check all inodes but directories, whose names are all known."""
        for nid in self._names:
            self._check_single(nid)
        for dtype in _TYPES:
            if dtype not in (_REGULAR, _DIRECTORY):
                nid = self._seen.find(dtype)
                while nid >= 0:
                    if dtype != _SYMLINK or not self._is_plain_symlink(nid):
                        self._check_single(nid)
                    nid = self._seen.find(dtype, nid + 1)
        runs: list[tuple[int, int]] = []
        slots = 0
        for match in _RUN.finditer(self._seen):
            first, end = match.span()
            if end - first < _WHOLE_SLOTS:
                self._check_single(first)
                continue
            runs.append((first, end))
            slots += end - first
            if slots >= _FILES * _WHOLE_SLOTS:
                self._check_runs(runs)
                runs, slots = [], 0
        self._check_runs(runs)

    def _check_runs(self, runs: list[tuple[int, int]]) -> None:
        """Check regular files, of which each run has one in every three slots between two inode
        numbers. Which of them are not as most are is found by halving.
        """
        buffer, start = self._buffer, self._start
        records = b"".join(
            [buffer[start + first * SLOT_SIZE : start + end * SLOT_SIZE] for first, end in runs]
        )
        if columns.are_whole_files(records, self._limits):
            files = len(records) // WHOLE_FILE.size
            self._claim(files * (_INODE_SIZE + CHUNK_INDEX.size))
        elif len(runs) > 1:
            half = len(runs) // 2
            self._check_runs(runs[:half])
            self._check_runs(runs[half:])
        else:
            for first, end in runs:
                for nid in range(first, end, _WHOLE_SLOTS):
                    self._check_single(nid)

    def _is_plain_symlink(self, nid: int) -> bool:
        plain = self._plain(nid, stat.S_IFLNK)
        if plain is None or plain[0] != 1 or b"\0" in plain[1]:
            return False
        self._claim(_INODE_SIZE + len(plain[1]))
        return True

    def _plain(self, nid: int, kind: int) -> tuple[int, bytes] | None:
        """Link count and data of a directory or symlink as most are: valid, without xattrs, its
        data in the inode's own block. None for others, whatever they are.
        """
        position = self._start + nid * SLOT_SIZE
        start = position + _INODE_SIZE
        if start >= self._size:
            return None
        head, mode, size, block, nanoseconds, nlink = _PLAIN.unpack_from(self._buffer, position)
        if (
            head == FORMAT_INLINE
            and mode & _TYPE_BITS == kind
            and 0 < size <= BLOCK_SIZE - start % BLOCK_SIZE
            and nanoseconds < NANOSECONDS
            and block << BLOCK_BITS <= self._size
        ):
            return nlink, bytes(self._buffer[start : start + size])
        return None

    def _check_single(self, nid: int) -> None:
        """Check an inode, not of a directory, whose names are all known."""
        names = self._names.get(nid, 1)
        nlink = self._check_inode(nid, self._seen[nid] & ~_LINKED)
        if nlink == 0:
            raise FormatError(f"inode {nid} has link count 0")
        if names > nlink:
            raise FormatError(f"inode {nid} has more names than its link count")
        if names < nlink:
            raise FormatError(f"inode {nid} has {nlink - names} names less than its link count")

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
