"""Directory blocks of an EROFS image: names cut into blocks, blocks packed, read and searched."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from index.erofs.layout import BLOCK_SIZE, DIRENT, NAME_MAX
from index.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_RESERVED = frozenset((b"", b".", b".."))
_FIRST_OFFSET = struct.Struct("<8xH")
_NAME_OFFSETS = tuple(
    struct.Struct("<" + "8xH2x" * count) for count in range(BLOCK_SIZE // DIRENT.size + 1)
)
"""All name offsets of a block, by the number of its entries."""


class Names:
    """A directory's names in the order and the blocks in which they are written.

    `names` includes `.` and `..`. `size` is the directory's size in bytes: every block but the
    last counts whole.
    """

    def __init__(self, children: Iterable[bytes]) -> None:
        """Raises UnsupportedError for a name that no directory can hold."""
        names = [*children, b".", b".."]
        names.sort()
        joined = b"".join(names)
        dots = names.count(b".") + names.count(b"..")
        if b"/" in joined or b"\0" in joined or names[0] == b"" or dots > 2:
            bad = next(n for n in children if n in _RESERVED or b"/" in n or b"\0" in n)
            raise UnsupportedError(f"{bad!r} cannot be a file's name")
        longest = max(names, key=len)
        if len(longest) > NAME_MAX:
            raise UnsupportedError(f"a name of {len(longest)} bytes; Linux allows {NAME_MAX}")
        self.names: Sequence[bytes] = names
        self._starts = [0]
        used = 0
        for number, name in enumerate(names):
            need = DIRENT.size + len(name)
            used += need
            if used > BLOCK_SIZE:
                self._starts.append(number)
                used = need
        self.tail = used
        """Bytes of the last block that are in use; at least 1."""
        self.size = (len(self._starts) - 1) * BLOCK_SIZE + used

    def pack(self, nids: Sequence[int], dtypes: Sequence[int]) -> bytes:
        """The directory's `size` bytes, given the inode number and type of every name."""
        blocks = []
        names = self.names
        for start, end in zip(self._starts, [*self._starts[1:], len(names)], strict=True):
            block_names = names[start:end]
            offset = (end - start) * DIRENT.size
            entries = []
            for number, name in enumerate(block_names, start):
                entries.append(DIRENT.pack(nids[number], offset, dtypes[number]))
                offset += len(name)
            block = b"".join((*entries, *block_names))
            blocks.append(block if end == len(names) else block.ljust(BLOCK_SIZE, b"\0"))
        return b"".join(blocks)


def names_start(block: bytes) -> int:
    """Where a block's names start, after its entries; both are there."""
    if len(block) > DIRENT.size:
        offset: int = _FIRST_OFFSET.unpack_from(block)[0]
        if offset and offset % DIRENT.size == 0 and offset < len(block):
            return offset
    raise FormatError("a directory block has no entries, or they run past its end")


def _entry_count(block: bytes) -> int:
    return names_start(block) // DIRENT.size


class Entries(NamedTuple):
    """Directory entries in order, as columns."""

    names: list[bytes]
    nids: list[int]
    dtypes: bytes


def unpack(block: bytes) -> Entries:
    """Read a directory block, or the part of the last one that is in use.

    Raises FormatError for names that are empty, too long, out of place, or have a slash or a NUL in
    them.
    """
    start = names_start(block)
    end = len(block.rstrip(b"\0"))
    nids, offsets, dtypes = zip(*DIRENT.iter_unpack(block[:start]), strict=True)
    names = [
        block[first:following]
        for first, following in zip(offsets, (*offsets[1:], end), strict=True)
    ]
    if not all(names) or end <= start or block.find(b"/", start) >= 0:
        raise FormatError("a directory block has a name that is empty, out of place or has a slash")
    if block.find(b"\0", start, end) >= 0:
        raise FormatError("a directory block has a name with a NUL")
    if end - start > NAME_MAX and max(map(len, names)) > NAME_MAX:
        raise FormatError(f"a directory block has a name of more than {NAME_MAX} bytes")
    return Entries(names, list(nids), bytes(dtypes))


def first_name(block: bytes) -> bytes:
    """The first name of a block."""
    count = _entry_count(block)
    if count == 1:
        return block[DIRENT.size :].rstrip(b"\0")
    offsets = _NAME_OFFSETS[2].unpack_from(block)
    return block[offsets[0] : offsets[1]]


def find(block: bytes, name: bytes) -> int | None:
    """The inode number that a name has in this block, None if the name is not there.

    Faster than a binary search in Python: looks for the name's bytes, and then whether a name
    starts and ends there.
    """
    count = _entry_count(block)
    at = block.find(name, count * DIRENT.size)
    if at < 0 or b"\0" in name:
        return None
    offsets = _NAME_OFFSETS[count].unpack_from(block)
    while at >= 0:
        if at in offsets:
            index = offsets.index(at)
            end = at + len(name)
            if (
                offsets[index + 1] == end
                if index + 1 < count
                else end == len(block) or block[end] == 0
            ):
                nid: int = DIRENT.unpack_from(block, index * DIRENT.size)[0]
                return nid
        at = block.find(name, at + 1)
    return None
