"""Sparse files in tars: GNU tar's four ways to write a map, and what of it blocks can address.

Source: GNU tar manual, "Storing Sparse Files"; behaviour in doubt as in Go's archive/tar. A map is
a list of (offset, length) of the file's data, in bytes; the stored data is their concatenation.
Functions here raise ValueError; the scanner adds which member it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from index.entry import Segment
from index.header import BLOCK, parse_number
from index.pax import parse_integer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_ENTRIES = 1 << 16
"""Entries in one map. Guessed: GNU tar makes one for each extent of a file on disk."""

MAX_TEXT = 1 << 20
"""Bytes of a map in format 1.0; Go's archive/tar has the same limit."""

# Entries of the old format, in a header and in the blocks that extend it: offset and length of 12
# bytes each, in the header's number format.
_OLD_FIELD = 12
_OLD_ENTRY = 2 * _OLD_FIELD
OLD_HEADER_MAP = slice(386, 482)  # 4 entries
OLD_HEADER_EXTENDED = 482  # byte is not 0: an extension block follows
OLD_HEADER_SIZE = slice(483, 495)  # the file's size with its holes
OLD_BLOCK_MAP = slice(0, 504)  # 21 entries
OLD_BLOCK_EXTENDED = 504

OFFSET = b"GNU.sparse.offset"
LENGTH = b"GNU.sparse.numbytes"
MAP = b"GNU.sparse.map"

SparseMap = list[tuple[int, int]]


def parse_old(table: bytes) -> SparseMap:
    """The entries of a header or an extension block; the first empty one ends the table."""
    entries = []
    for start in range(0, len(table), _OLD_ENTRY):
        if not table[start]:
            break
        middle = start + _OLD_ENTRY // 2
        entries.append(
            (parse_number(table[start:middle]), parse_number(table[middle : start + _OLD_ENTRY]))
        )
    return entries


def version(pax: Mapping[bytes, bytes]) -> tuple[int, int] | None:
    """Which sparse format a member's PAX records announce: (0, 1) stands for 0.0 as well."""
    announced = pax.get(b"GNU.sparse.major", b""), pax.get(b"GNU.sparse.minor", b"")
    if announced == (b"1", b"0"):
        return 1, 0
    if announced in ((b"0", b"0"), (b"0", b"1")):
        return 0, 1
    if announced != (b"", b""):
        raise ValueError("an unknown version of the sparse format")
    return (0, 1) if pax.get(MAP) else None


def join_pairs(records: list[tuple[bytes, bytes]]) -> bytes:
    """A map of format 0.0, which repeats two keys, in the text form of format 0.1."""
    values: list[bytes] = []
    for key, value in records:
        if key in (OFFSET, LENGTH):
            if key != (LENGTH if len(values) % 2 else OFFSET) or b"," in value:
                raise ValueError("a sparse map's offsets and lengths do not alternate")
            values.append(value)
    return b",".join(values)


def parse_0_1(pax: Mapping[bytes, bytes]) -> SparseMap:
    """The map of format 0.1, whose records must also say how many entries it has."""
    text = pax.get(MAP, b"")
    numbers = [parse_integer(value) for value in text.split(b",")] if text else []
    if len(numbers) != 2 * parse_integer(pax.get(b"GNU.sparse.numblocks", b"")):
        raise ValueError("a sparse map does not have as many entries as it says")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


class Map10:
    """The map of format 1.0: decimal lines in the blocks before the data.

    The first line is the number of entries, then come offset and length of each. `feed` takes one
    block after the other until `entries` is not None.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._lines = 0
        self._expected = 0
        self.entries: SparseMap | None = None

    def feed(self, block: bytes) -> None:
        self._text += block
        self._lines += block.count(b"\n")
        if not self._expected and self._lines:
            count = parse_integer(bytes(self._text[: self._text.index(b"\n")]))
            if not 0 <= count <= MAX_ENTRIES:
                raise ValueError(f"a sparse map of {count} entries")
            self._expected = 1 + 2 * count
        if self._expected and self._lines >= self._expected:
            lines = bytes(self._text).split(b"\n", self._expected)[1 : self._expected]
            numbers = [parse_integer(line) for line in lines]
            self.entries = list(zip(numbers[::2], numbers[1::2], strict=True))
        elif len(self._text) > MAX_TEXT:
            raise ValueError(f"a sparse map of more than {MAX_TEXT} bytes")


def check_map(entries: SparseMap, size: int, stored: int) -> None:
    """Raise ValueError unless entries ascend within `size` and need exactly `stored` bytes."""
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"a sparse map of {len(entries)} entries")
    end = 0
    total = 0
    for offset, length in entries:
        if offset < end or length < 0:
            raise ValueError("a sparse map's entries are not in order")
        end = offset + length
        total += length
    if end > size:
        raise ValueError("a sparse map reaches past the end of its file")
    if total != stored:
        raise ValueError(f"a sparse map of {total} bytes for {stored} bytes of data")


@dataclass(frozen=True, slots=True)
class Loose:
    """Data of a sparse file that blocks cannot address; fields as in Segment."""

    file_offset: int
    raw_offset: int
    length: int


def place(entries: SparseMap, size: int, raw_offset: int) -> Iterator[Segment | Loose]:
    """Cut a sparse file's data, stored from `raw_offset` on, into what blocks can address or not.

    A block of the file is addressable if all of it lies in one block of raw space. A segment
    therefore starts on block boundaries of both and ends on one, or at the end of the file.
    """
    for offset, length in entries:
        end = offset + length
        if (offset - raw_offset) % BLOCK:
            first = last = end
        else:
            first = min(offset + -offset % BLOCK, end)
            last = end if end == size else max(first, end - end % BLOCK)
        if first > offset:
            yield Loose(offset, raw_offset, first - offset)
        if last > first:
            yield Segment(first, raw_offset + first - offset, last - first)
        if end > last:
            yield Loose(last, raw_offset + last - offset, end - last)
        raw_offset += length
