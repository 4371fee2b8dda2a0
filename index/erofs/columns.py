"""Many records of an EROFS image at once, field by field instead of record by record.

A column is one field of many records, cut out of their joined bytes with a stride. What is asked
of every record is then asked once of a column, and Python answers in C. Columns are read in place,
as everything in a file index on little-endian machines.
"""

from __future__ import annotations

import stat
from itertools import chain, islice, pairwise, repeat
from operator import add, sub
from typing import TYPE_CHECKING

from index.erofs import directory
from index.erofs.directory import Entries
from index.erofs.layout import (
    BLOCK_BITS,
    DIRENT,
    FORMAT_CHUNKED,
    NANOSECONDS,
    WHOLE_FILE,
    WHOLE_FILE_CHUNKS,
    WHOLE_FILE_MAX,
)
from index.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

_TYPE_BITS = 0o170000

# What every record of `are_whole_files` has in the same places: a byte's place, and the byte.
_SAME = tuple(
    (place + number, bytes((byte,)))
    for place, size, value in (
        (0, 2, FORMAT_CHUNKED),
        (2, 2, 0),  # xattrs
        (16, 4, WHOLE_FILE_CHUNKS),
        (44, 4, 1),  # links
        (64, 2, 0),  # high bits of the block
    )
    for number, byte in enumerate(value.to_bytes(size, "little"))
)
_MODE_HIGH = 5
_REGULAR_HIGH = bytes(high for high in range(256) if high << 8 & _TYPE_BITS == stat.S_IFREG)
"""What the high byte of a regular file's mode can be."""


def are_whole_files(records: bytes, limits: Sequence[int]) -> bool:
    """Whether all of this is inodes as `layout.WHOLE_FILE`, with one name, that keep every rule.

    `limits` are the bytes of each device.
    """
    stride = WHOLE_FILE.size
    count, rest = divmod(len(records), stride)
    if rest or not count:
        return False
    for place, byte in _SAME:
        if records[place::stride] != byte * count:
            return False
    if records[_MODE_HIGH::stride].strip(_REGULAR_HIGH):
        return False
    view = memoryview(records)
    halves, words, doubles = view.cast("H"), view.cast("I"), view.cast("Q")
    if max(words[40 // 4 :: stride // 4].tolist()) >= NANOSECONDS:
        return False
    sizes = doubles[8 // 8 :: stride // 8].tolist()
    if not all(sizes) or max(sizes) > WHOLE_FILE_MAX:
        return False
    devices = halves[66 // 2 :: stride // 2].tolist()
    if max(devices) >= len(limits):
        return False
    blocks = words[68 // 4 :: stride // 4].tolist()
    smallest = min([limits[device] for device in set(devices)])
    if (max(blocks) << BLOCK_BITS) + max(sizes) <= smallest:
        return True
    outside = [
        block
        for block, size, device in zip(blocks, sizes, devices, strict=True)
        if (block << BLOCK_BITS) + size > limits[device]
    ]
    return not outside


def unpack(blocks: Sequence[bytes]) -> tuple[Entries, list[int]]:
    """What `directory.unpack` reads in these blocks, one after another, and how many entries each
    has. Raises FormatError as it does.
    """
    tables: list[bytes] = []
    texts: list[bytes] = []
    counts: list[int] = []
    moves: list[int] = []  # from a place in a block to one in all names
    end = 0
    for block in blocks:
        start = directory.names_start(block)
        text = block[start:] if block[-1] else block[start:].rstrip(b"\0")
        tables.append(block[:start])
        texts.append(text)
        counts.append(start // DIRENT.size)
        moves.append(end - start)
        end += len(text)
    text = b"".join(texts)
    table = b"".join(tables)
    view = memoryview(table)
    offsets = view.cast("H")[8 // 2 :: DIRENT.size // 2].tolist()
    starts = list(map(add, offsets, chain.from_iterable(map(repeat, moves, counts))))
    starts.append(end)
    # A block's first name starts where the names of the blocks before it end, because its offset
    # says where its entries end. So if no name is empty, each lies in its own block.
    try:
        lengths = bytes(map(sub, islice(starts, 1, None), starts))  # raises unless 0 to NAME_MAX
    except ValueError:
        lengths = b"\0"
    if 0 in lengths or b"/" in text or b"\0" in text:
        for block in blocks:
            directory.unpack(block)  # says what is wrong
        raise FormatError("a directory block has a name that is out of place")
    words = view.cast("I")
    nids = words[0 :: DIRENT.size // 4].tolist()
    high = words[1 :: DIRENT.size // 4].tolist()
    if any(high):
        nids = [low | high << 32 for low, high in zip(nids, high, strict=True)]
    names = [text[start:following] for start, following in pairwise(starts)]
    return Entries(names, nids, table[10 :: DIRENT.size]), counts
