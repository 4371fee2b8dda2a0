"""gzip (RFC 1952): scanning a blob for checkpoints, and decompressing from one.

A checkpoint is a place between two deflate blocks, given in bits, with the part of the 32 KiB
before it that later data refers to. The start of a member needs no window.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, cast

from isal import isal_zlib

from index.codecs.base import PIECE_SIZE, RawLimit, Submit, at_once
from index.codecs.inflate import (
    BLOCK,
    GZIP,
    NO_FLUSH,
    RAW_DEFLATE,
    STREAM_END,
    WINDOW_SIZE,
    Inflater,
    address_of,
)
from index.codecs.points import MOST_FOLLOWING, Border, PointChooser, next_look
from index.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TRAILER = struct.Struct("<II")  # CRC-32 and length of a member (RFC 1952, section 2.3.1)
_TRAILER_SIZE = _TRAILER.size

_BATCH = 8
"""Borders that are considered together: each with up to 32 KiB of raw space and the input for as
much; a hop to another thread costs as much as considering one."""


class _Part(enum.Enum):
    """What of a gzip member comes next."""

    HEADER = enum.auto()
    DEFLATE = enum.auto()
    TRAILER = enum.auto()
    NOTHING = enum.auto()  # another member, or padding


class GzipScanner:
    """See Scanner. Members' CRC-32 and length are checked; zeros after the last are padding.

    Points are chosen by `submit`. The CRC is isal's: zlib's takes a tenth of the time of inflating.
    """

    def __init__(self, *, limit: int, submit: Submit = at_once) -> None:
        self._chooser = PointChooser()
        self.points = self._chooser.points
        self.windows = self._chooser.windows
        self._submit = submit
        self._borders: list[Border] = []  # to be considered
        self._noted = 0  # raw offset of the last one
        self._followed: Border | None = None
        self._following = bytearray()
        self._raw = RawLimit(limit)
        self._taken = 0  # bytes of the blob
        self._last_byte = 0  # of those taken
        self._part = _Part.NOTHING
        self._members = 0
        self._header = Inflater(GZIP, 1)
        self._inflater = Inflater(RAW_DEFLATE, PIECE_SIZE)
        self._crc = self._member_size = 0
        self._trailer = b""
        self._padding = False

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        data = bytes(data)
        address = address_of(data)
        position = 0
        more_output = False
        while position < len(data) or more_output:
            match self._part:
                case _Part.NOTHING:
                    if self._take_padding(data, position):
                        return
                    self._header.restart()
                    self._part = _Part.HEADER
                case _Part.HEADER:
                    position += self._take_header(address + position, len(data) - position)
                case _Part.TRAILER:
                    position += self._take_trailer(data[position : position + _TRAILER_SIZE])
                case _Part.DEFLATE:
                    flush, room = self._stride()
                    code, taken, raw = self._inflater.run(
                        address + position, len(data) - position, room, flush
                    )
                    more_output = len(raw) == room and code != STREAM_END
                    self._note_input(data[position : position + taken])
                    position += taken
                    if raw:
                        self._note_output(raw)
                        yield raw
                    if code == STREAM_END:
                        self._end_following()
                        self._part = _Part.TRAILER
                    elif self._raw.total - self._noted >= WINDOW_SIZE:
                        self._end_following()
                    if flush == BLOCK and self._inflater.at_border:
                        self._note_border()

    def finish(self) -> None:
        if self._part is not _Part.NOTHING or not self._members:
            raise CodecError(f"gzip data is truncated after {self._taken} bytes")
        self._submit(self._chooser.consider, self._borders)
        self._submit(self._chooser.finish, self._raw.total)

    def _take_padding(self, data: bytes, position: int) -> bool:
        """Whether the rest is padding. Zeros may follow the last member, and then nothing else."""
        if not self._padding and (data[position] or not self._members):
            return False
        self._padding = True
        if data.count(0, position) != len(data) - position:
            raise CodecError("gzip data is followed by something that is not gzip")
        self._taken += len(data) - position
        return True

    def _take_header(self, address: int, length: int) -> int:
        _, taken, _ = self._header.run(address, length, 1, BLOCK)
        self._taken += taken
        if self._header.at_border:
            self._inflater.restart()
            self._crc = self._member_size = 0
            self._part = _Part.DEFLATE
            self._members += 1
            self._noted = self._raw.total
            self._consider(Border(self._raw.total, self._taken * 8))
        return taken

    def _take_trailer(self, data: bytes) -> int:
        taken = min(len(data), _TRAILER_SIZE - len(self._trailer))
        self._taken += taken
        self._trailer += data[:taken]
        if len(self._trailer) == _TRAILER_SIZE:
            if self._trailer != _TRAILER.pack(self._crc, self._member_size & 0xFFFFFFFF):
                raise CodecError("malformed gzip data: it does not match its own CRC and length")
            self._trailer = b""
            self._part = _Part.NOTHING
        return taken

    def _note_input(self, taken: bytes) -> None:
        if taken:
            self._taken += len(taken)
            self._last_byte = taken[-1]
            if self._followed is not None:
                self._following += taken[: MOST_FOLLOWING - len(self._following)]

    def _note_output(self, raw: bytes) -> None:
        self._raw.count(len(raw))
        self._member_size += len(raw)
        self._crc = isal_zlib.crc32(raw, self._crc)

    def _stride(self) -> tuple[int, int]:
        """How far to decompress at once: (flush mode, most raw bytes).

        Borders of blocks that cannot become points are passed over. Until one byte before the
        first that can, so that it is not passed whatever the input's pieces are.
        """
        ahead = next_look(self._raw.total, self._noted) - 1 - self._raw.total
        return (NO_FLUSH, min(ahead, PIECE_SIZE)) if ahead > 0 else (BLOCK, PIECE_SIZE)

    def _note_border(self) -> None:
        """The stream is before a deflate block."""
        if self._raw.total == next_look(self._raw.total, self._noted):
            self._noted = self._raw.total
            self._followed = Border(
                self._raw.total,
                self._taken * 8 - self._inflater.unused_bits,
                self._last_byte,
                self._inflater.window(),
            )

    def _end_following(self) -> None:
        """All output that can refer to the last border's window has come."""
        if self._followed is not None:
            self._followed.following = bytes(self._following)
            self._consider(self._followed)
            self._followed = None
            self._following.clear()

    def _consider(self, border: Border) -> None:
        self._borders.append(border)
        if len(self._borders) == _BATCH:
            self._submit(self._chooser.consider, self._borders)
            self._borders = []


_ISAL_ERROR = cast("type[Exception]", isal_zlib.error)  # its stub says that it is an instance

_FEED_SIZE = 64 << 10
"""Bytes given to isal at once. At the end of a member it copies what it was given too much, so
that without this a blob of tiny members would take time quadratic in the size of a piece."""


class GzipDecoder:
    """See Decoder. Starts between two deflate blocks; goes on through all following members.

    isal decodes at 1.7 to 2.6 times zlib's speed, but cannot start inside a byte. So it is first
    fed empty blocks that together end at the wanted bit (see _lead_in).
    """

    def __init__(self, *, bit_offset: int, window: bytes | None, limit: int) -> None:
        self._raw = RawLimit(limit)
        self._inflater = isal_zlib.decompressobj(RAW_DEFLATE, zdict=window or b"")
        self._skipped_bits = bit_offset % 8
        self._trailer_left = 0  # after the end of a member
        self._header: Inflater | None = None  # while a member's header is being read
        self._padding = False

    def allow(self, limit: int) -> None:
        self._raw.allow(limit)

    def feed(self, data: bytes | memoryview) -> bytes:
        if not data:
            return b""
        view = memoryview(data)
        output: list[bytes] = []
        if self._skipped_bits:
            self._decode(_lead_in(self._skipped_bits, view[0]), output)
            self._skipped_bits = 0
            view = view[1:]
        for start in range(0, len(view), _FEED_SIZE):
            self._decode(view[start : start + _FEED_SIZE], output)
        return output[0] if len(output) == 1 else b"".join(output)

    def _decode(self, data: bytes | memoryview, output: list[bytes]) -> None:
        while data:
            if self._trailer_left:
                # Not checked: the chunks that are decoded here are verified by their digests.
                skipped = min(self._trailer_left, len(data))
                self._trailer_left -= skipped
                data = data[skipped:]
            elif self._inflater.eof:
                data = self._next_member(data)
            else:
                data = self._inflate(data, output)

    def _inflate(self, data: bytes | memoryview, output: list[bytes]) -> bytes:
        """Decompress. What is left of `data` follows the member's deflate data."""
        try:
            raw = self._inflater.decompress(data, self._raw.room)
        except _ISAL_ERROR as error:
            raise CodecError(f"malformed gzip data: {error}") from error
        self._raw.count(len(raw))
        if raw:
            output.append(raw)
        if self._inflater.eof:
            self._trailer_left = _TRAILER_SIZE
        return self._inflater.unused_data

    def _next_member(self, data: bytes | memoryview) -> bytes:
        """Take a header, or padding. What is left of `data` is the member's deflate data.

        zlib reads the header: isal 1.9.1 loses its place in optional fields that are cut in two.
        """
        data = bytes(data)
        if self._padding or (self._header is None and not data[0]):
            self._padding = True
            if data.strip(b"\0"):
                raise CodecError("gzip data is followed by something that is not gzip")
            return b""
        if self._header is None:
            self._header = Inflater(GZIP, 1)
        _, taken, _ = self._header.run(address_of(data), len(data), 1, BLOCK)
        if self._header.at_border:
            self._header = None
            self._inflater = isal_zlib.decompressobj(RAW_DEFLATE)
        return data[taken:]


def _bits(*fields: tuple[int, int]) -> tuple[int, int]:
    """(value, number of bits) of fields that are packed from the lowest bit up."""
    value = length = 0
    for field, width in fields:
        value |= field << length
        length += width
    return value, length


# Deflate blocks that make no output (RFC 1951, section 3.2). Huffman codes are packed from their
# first bit on, so they are written here with that bit lowest.
_EMPTY_FIXED = _bits(
    (0, 1),  # BFINAL
    (1, 2),  # BTYPE: fixed Huffman codes
    (0, 7),  # end of block
)
_EMPTY_DYNAMIC = _bits(
    (0, 1),  # BFINAL
    (2, 2),  # BTYPE: dynamic Huffman codes
    (0, 5),  # HLIT: 257 literal and length codes
    (0, 5),  # HDIST: 1 distance code
    (15, 4),  # HCLEN: 19 code length codes, in the order of the next line
    #  16      17      18      0       8       7       9       6       10      5
    *((0, 3), (0, 3), (1, 3), (2, 3), (0, 3), (0, 3), (0, 3), (0, 3), (0, 3), (0, 3)),
    #  11      4       12      3       13      2       14      1       15
    *((0, 3), (0, 3), (0, 3), (0, 3), (0, 3), (0, 3), (0, 3), (2, 3), (0, 3)),
    # So the code of 18 (a run of zeros) is 0, that of 0 is 10, that of 1 is 11.
    *((0, 1), (138 - 11, 7)),  # codes 0 … 137 are unused
    *((0, 1), (117 - 11, 7)),  # codes 138 … 254 too
    *((3, 2), (3, 2)),  # codes 255 and 256 have one bit: 0 and 1
    (1, 2),  # there is no distance code
    (1, 1),  # end of block
)


def _lead_in(skipped_bits: int, first_byte: int) -> bytes:
    """What to feed instead of a first byte whose low `skipped_bits` (1 … 7) are not ours.

    Empty blocks whose bits are `skipped_bits` more than whole bytes: fixed ones have 10, the
    dynamic one has 97. Unlike shifting the stream, this keeps stored blocks aligned to bytes.
    """
    blocks = [_EMPTY_DYNAMIC] if skipped_bits % 2 else []
    blocks += [_EMPTY_FIXED] * (skipped_bits // 2)
    value, length = _bits(*blocks)
    value |= first_byte >> skipped_bits << length
    return value.to_bytes((length + 8 - skipped_bits) // 8, "little")
