"""gzip (RFC 1952): scanning a blob for checkpoints, and decompressing from one.

A checkpoint is a place between two deflate blocks, given in bits, with the part of the 32 KiB
before it that later data refers to. The start of a member needs no window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from isal import isal_zlib

from index.codecs.base import PIECE_SIZE, RawLimit
from index.codecs.inflate import (
    BLOCK,
    GZIP,
    NO_FLUSH,
    RAW_DEFLATE,
    STREAM_END,
    Inflater,
    address_of,
)
from index.codecs.window import WindowProbe
from index.errors import CodecError
from index.tables import CHUNK_SIZE, SeekPoint

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKPOINT_SPACING = 2 << 20
"""Raw bytes after a point from which on the next border of blocks becomes one.

Measured on 515 MB of /usr/lib/python3* and /usr/bin under gzip -6 (183 MB), windows at zstd 19:

    spacing  points  windows' share of the blob  decoding a whole span
    1 MiB    468     0.57 %                       2.9 ms
    2 MiB    240     0.30 %                       6.2 ms
    4 MiB    122     0.15 %                      11.3 ms

The whole file index should stay below 0.5 % of an image; chunk digests take another 0.04 %.
"""

MEMBER_SPACING = CHUNK_SIZE
"""The same for the start of a member, which costs a row in the table but no window."""


class GzipScanner:
    """See Scanner. Members' CRC-32 and length are checked; zeros after the last are padding."""

    def __init__(self, *, limit: int) -> None:
        self.points: list[SeekPoint] = []
        self.windows: list[bytes] = []
        self._raw = RawLimit(limit)
        self._taken = 0  # bytes of the blob
        self._last_byte = 0  # of those taken
        self._inflater = Inflater(GZIP, PIECE_SIZE)
        self._probe = WindowProbe()
        self._between_members = True
        self._in_header = False
        self._padding = False

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        data = bytes(data)
        address = address_of(data)
        position = 0
        more_output = False
        while position < len(data) or more_output:
            if self._between_members:
                if self._take_padding(data, position):
                    return
                self._inflater.restart()
                self._between_members, self._in_header = False, True
            flush, room = self._stride()
            code, taken, raw = self._inflater.run(
                address + position, len(data) - position, room, flush
            )
            more_output = len(raw) == room
            if self._probe.active and self._probe.feed(address + position, taken):
                self._note_window(self._probe.needed())
            position += taken
            self._taken += taken
            if taken:
                self._last_byte = data[position - 1]
            if raw:
                self._raw.count(len(raw))
                yield raw
            if code == STREAM_END:
                self._between_members, more_output = True, False
            elif flush == BLOCK and self._inflater.at_border:
                self._note_border()

    def finish(self) -> None:
        if not self._between_members or not self.points:
            raise CodecError(f"gzip data is truncated after {self._taken} bytes")
        if len(self.points) > 1 and self.points[-1].raw_offset == self._raw.total:
            self.points.pop()  # nothing follows it, so it has got no window

    def _take_padding(self, data: bytes, position: int) -> bool:
        """Whether the rest is padding. Zeros may follow the last member, and then nothing else."""
        if not self._padding and (data[position] or not self.points):
            return False
        self._padding = True
        if data.count(0, position) != len(data) - position:
            raise CodecError("gzip data is followed by something that is not gzip")
        self._taken += len(data) - position
        return True

    def _stride(self) -> tuple[int, int]:
        """How far to decompress at once: (flush mode, most raw bytes).

        Far from the next point, borders of blocks are passed over. Until one byte before it, so
        that no border that counts can be passed whatever the input's pieces are.
        """
        if self._in_header:
            return BLOCK, PIECE_SIZE
        ahead = self.points[-1].raw_offset + CHECKPOINT_SPACING - 1 - self._raw.total
        return (NO_FLUSH, min(ahead, PIECE_SIZE)) if ahead > 0 else (BLOCK, PIECE_SIZE)

    def _note_border(self) -> None:
        """The stream is before a deflate block: make it a checkpoint if it is far enough."""
        member_start, self._in_header = self._in_header, False
        spacing = MEMBER_SPACING if member_start else CHECKPOINT_SPACING
        if self.points and self._raw.total - self.points[-1].raw_offset < spacing:
            return
        unused_bits = self._inflater.unused_bits
        self.points.append(SeekPoint(self._raw.total, self._taken * 8 - unused_bits))
        if not member_start:
            self._probe.start(
                self._inflater.window(), unused_bits=unused_bits, last_byte=self._last_byte
            )

    def _note_window(self, window: bytes | None) -> None:
        """What the last point needs is known."""
        if window is not None:
            point = self.points[-1]
            self.points[-1] = SeekPoint(point.raw_offset, point.bit_offset, has_window=True)
            self.windows.append(window)


_ISAL_ERROR = cast("type[Exception]", isal_zlib.error)  # its stub says that it is an instance

_FEED_SIZE = 64 << 10
"""Bytes given to isal at once. At the end of a member it copies what it was given too much, so
that without this a blob of tiny members would take time quadratic in the size of a piece."""

_TRAILER_SIZE = 8  # CRC-32 and length of a member (RFC 1952, section 2.3.1)


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
