"""The startup pack: the chunks that a start touches, in order, as one zstd stream.

    skippable frame: header | frame table | chunk table | checksum
    zstd frame
    zstd frame
    …

Each zstd frame holds some chunks of raw space, one behind the other; the tables say of which
layers. A pack is streamed from its first byte on, so nobody has seen its digest when its chunks are
used: each is compared with its own digest in the file index. docs/startup-pack-format.md is this
module in prose.

All integers are little-endian.
"""

from __future__ import annotations

import struct
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isal.isal_zlib import crc32

from index.codecs import decoder
from index.convert import compress_frame
from index.errors import CodecError, FormatError, UnsupportedError
from index.profile import MAX_TOUCHES
from index.tables import CHUNK_SIZE, Codec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from index.codecs.base import Decoder
    from index.file import FileIndex
    from index.tables import LayerTable

MAGIC = b"\x89FBP\r\n\x1a\n"
VERSION_MAJOR = 1  # a reader refuses any other
VERSION_MINOR = 0  # a reader ignores it

_SKIPPABLE = struct.Struct("<II")  # magic, size of what follows (RFC 8878, section 3.1.2)
_SKIPPABLE_MAGIC = 0x184D2A5D
# magic, major, minor, incompatible feature bits, index digest, frames, chunks, size of the pack
_HEADER = struct.Struct("<8sHHI32sIIQ")
_FRAME = struct.Struct("<II")  # stored size, chunks
_CHUNK = struct.Struct("<II")  # layer, chunk
_CHECKSUM = struct.Struct("<I")  # CRC-32 of header and tables

MAX_CHUNKS = MAX_TOUCHES
FRAME_CHUNKS = 8
"""Chunks in a frame that is written, 2 MiB. A reader has each as soon as its last byte has come,
so frames need only be small enough to begin anew after damage."""

MAX_FRAME_CHUNKS = 64

LEVEL = 17
"""122 MB of Debian's libraries and Python in frames of 2 MiB: 30.8 MB at level 17 (0.43 s of a core
for each MB), 32.6 at 15 (0.22 s), 32.7 at 12 (0.08 s). A pack is made once, and every node fetches
it."""

_MAX_TABLES = _HEADER.size + MAX_CHUNKS * (_FRAME.size + _CHUNK.size) + _CHECKSUM.size

Place = tuple[int, int]
"""A chunk: its layer's number in the index, and its own."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Bytes `start` … `end` of the pack, and the chunks in them."""

    start: int
    end: int
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class PackTable:
    """What a pack holds. Its frames lie from `start` to `size`."""

    index_digest: bytes
    start: int
    size: int
    frames: tuple[Frame, ...]

    def check(self, index_digest: bytes, layers: Sequence[LayerTable]) -> None:
        """Raise FormatError unless it is of chunks of this index."""
        if self.index_digest != index_digest:
            raise FormatError("the startup pack is of another file index")
        for frame in self.frames:
            for layer, chunk in frame.places:
                if layer >= len(layers) or chunk >= layers[layer].chunk_count:
                    raise FormatError(f"the startup pack has chunk {chunk} of layer {layer}")


# --- writing ---


class PackWriter:
    """Makes a pack of chunks that come in order. The same chunks give the same bytes, with the same
    version of libzstd. The compressed frames are in memory until the end.
    """

    def __init__(self, index_digest: bytes, *, level: int = LEVEL, threads: int = 1) -> None:
        self._index_digest = index_digest
        self._level = level
        self._places: list[Place] = []
        self._frame: list[bytes] = []
        self._frames: list[bytes] = []
        self._counts: list[int] = []
        self._pool = ThreadPoolExecutor(threads, "pack")  # ends with its last reference
        self._most = 2 * threads
        self._under_way: deque[Future[bytes]] = deque()

    def add(self, layer: int, chunk: int, data: bytes) -> None:
        """The next chunk. At most MAX_CHUNKS, each once."""
        self._places.append((layer, chunk))
        self._frame.append(data)
        if len(self._frame) == FRAME_CHUNKS:
            self._end_frame()

    def finish(self) -> bytes:
        """The whole pack."""
        if self._frame:
            self._end_frame()
        self._collect(0)
        self._pool.shutdown()
        rows = zip(self._frames, self._counts, strict=True)
        tables = b"".join(_FRAME.pack(len(frame), count) for frame, count in rows)
        tables += b"".join(_CHUNK.pack(*place) for place in self._places)
        head_size = _HEADER.size + len(tables) + _CHECKSUM.size
        size = _SKIPPABLE.size + head_size + sum(map(len, self._frames))
        header = _HEADER.pack(
            MAGIC,
            VERSION_MAJOR,
            VERSION_MINOR,
            0,
            self._index_digest,
            len(self._frames),
            len(self._places),
            size,
        )
        checksum = _CHECKSUM.pack(crc32(header + tables))
        skippable = _SKIPPABLE.pack(_SKIPPABLE_MAGIC, head_size)
        return b"".join([skippable, header, tables, checksum, *self._frames])

    def _end_frame(self) -> None:
        raw = b"".join(self._frame)
        self._counts.append(len(self._frame))
        self._frame = []
        self._under_way.append(self._pool.submit(compress_frame, raw, Codec.ZSTD, self._level))
        self._collect(self._most)

    def _collect(self, most: int) -> None:
        while len(self._under_way) > most:
            self._frames.append(self._under_way.popleft().result())


# --- reading ---


def read_table(head: bytes | bytearray, size: int) -> PackTable | None:
    """The table of a pack of `size` bytes that begins with `head`; None if more of it is needed.

    Raises FormatError if it is no pack or contradicts itself, UnsupportedError if it is one of a
    version or with features that this reader does not know.
    """
    if len(head) < _SKIPPABLE.size:
        return None
    magic, tables_size = _SKIPPABLE.unpack_from(head)
    start = _SKIPPABLE.size + tables_size
    if magic != _SKIPPABLE_MAGIC or not (
        _HEADER.size + _CHECKSUM.size <= tables_size <= min(_MAX_TABLES, size)
    ):
        raise FormatError("this is not a startup pack")
    if len(head) < start:
        return None
    tables = memoryview(head)[_SKIPPABLE.size : start]
    magic, major, _, incompatible, digest, frame_count, chunk_count, said = _HEADER.unpack_from(
        tables
    )
    if magic != MAGIC:
        raise FormatError("this is not a startup pack")
    if major != VERSION_MAJOR or incompatible:
        raise UnsupportedError(
            f"the startup pack has version {major} and features {incompatible:#x}",
            hint=f"this program reads version {VERSION_MAJOR}; update it, or build the pack anew",
        )
    if _CHECKSUM.unpack(tables[-_CHECKSUM.size :])[0] != crc32(tables[: -_CHECKSUM.size]):
        raise FormatError("the table of the startup pack is damaged")
    chunks_at = _HEADER.size + _FRAME.size * frame_count
    end = chunks_at + _CHUNK.size * chunk_count
    if said != size or chunk_count > MAX_CHUNKS or end + _CHECKSUM.size != tables_size:
        raise FormatError("the startup pack has a table of a wrong size")
    frames = tuple(
        _frames(
            start,
            _FRAME.iter_unpack(tables[_HEADER.size : chunks_at]),
            list(_CHUNK.iter_unpack(tables[chunks_at:end])),
        )
    )
    if (frames[-1].end if frames else start) != size:
        raise FormatError("the frames of the startup pack do not add up to its size")
    return PackTable(digest, start, size, frames)


def _frames(
    start: int, rows: Iterable[tuple[int, ...]], places: Sequence[tuple[int, ...]]
) -> Iterator[Frame]:
    if len(set(places)) < len(places):
        raise FormatError("the startup pack has a chunk twice")
    first = 0
    for size, count in rows:
        # zstd makes a little more of what does not compress, never that much
        if not 0 < count <= MAX_FRAME_CHUNKS or size > (CHUNK_SIZE + 1024) * count:
            raise FormatError(f"the startup pack has a frame of {count} chunks in {size} bytes")
        held = tuple((layer, chunk) for layer, chunk in places[first : first + count])
        if len(held) < count:
            raise FormatError("the frames of the startup pack have more chunks than it has")
        yield Frame(start, start + size, held)
        start += size
        first += count
    if first < len(places):
        raise FormatError("the startup pack has chunks in no frame")


class FrameError(CodecError):
    """Frame `number` of those that a PackDecoder was given is damaged."""

    def __init__(self, number: int, error: CodecError) -> None:
        super().__init__(f"frame {number} of the startup pack: {error.message}")
        self.number = number


class PackDecoder:
    """Cuts the bytes of some frames of a pack into chunks. What lies between them is passed over.

    `frame` is the number of the one that is being read. Feed it the pack from the first frame's
    first byte on.
    """

    def __init__(self, frames: Sequence[Frame], layers: Sequence[LayerTable]) -> None:
        """Raises FormatError if the layers have no such chunks."""
        self._frames = frames
        self._lengths = [
            [layers[layer].chunk_length(chunk) for layer, chunk in frame.places] for frame in frames
        ]
        if any(length <= 0 for lengths in self._lengths for length in lengths):
            raise FormatError("the startup pack has chunks past the end of their layers")
        self._position = frames[0].start
        self._decoder: Decoder | None = None
        self._parts: list[memoryview] = []  # of the next chunk
        self._size = 0  # bytes in them
        self._arrived = 0  # chunks of the frame
        self.frame = 0

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[Place, bytes]]:
        """Yield the chunks that `data` completes, unverified.

        Raises FrameError if a frame is damaged, or holds more or less than its chunks; the decoder
        is of no more use then.
        """
        view = memoryview(data)
        while view and self.frame < len(self._frames):
            frame = self._frames[self.frame]
            if self._position < frame.start:
                used = min(len(view), frame.start - self._position)
            else:
                used = min(len(view), frame.end - self._position)
                yield from self._decode(frame, view[:used])
            self._position += used
            view = view[used:]
            if self._position == frame.end:
                self._end(frame)

    def _decode(self, frame: Frame, data: memoryview) -> Iterator[tuple[Place, bytes]]:
        lengths = self._lengths[self.frame]
        if self._decoder is None:
            self._decoder = decoder(Codec.ZSTD, bit_offset=0, window=None, limit=sum(lengths))
        try:
            raw = memoryview(self._decoder.feed(data))
        except (CodecError, UnsupportedError) as error:
            raise FrameError(self.frame, CodecError(error.message)) from error
        while self._arrived < len(lengths):
            needed = lengths[self._arrived] - self._size
            if len(raw) < needed:
                break
            chunk = b"".join((*self._parts, raw[:needed]))
            self._parts.clear()
            self._size = 0
            raw = raw[needed:]
            self._arrived += 1
            yield frame.places[self._arrived - 1], chunk
        self._parts.append(raw)
        self._size += len(raw)

    def _end(self, frame: Frame) -> None:
        if self._arrived < len(frame.places):
            raise FrameError(self.frame, CodecError("it holds less than its chunks"))
        self._decoder = None
        self._parts.clear()
        self._size = 0
        self._arrived = 0
        self.frame += 1


def in_order(index: FileIndex, places: Iterable[Place]) -> list[Place]:
    """The chunks of an index that are worth packing, of those that a profile names, each once."""
    layers = index.layers
    known = [
        (layer, chunk)
        for layer, chunk in places
        if layer < len(layers) and chunk < layers[layer].chunk_count
    ]
    return list(dict.fromkeys(known))[:MAX_CHUNKS]
