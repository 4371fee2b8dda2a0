"""Streams of frames, as zstd and lz4 have them: each frame decompresses by itself.

The two formats share this plan: a magic number and a header, then blocks that each give their own
size, then perhaps a checksum; and they share skippable frames, which hold no data. Walking over
the blocks tells where frames start, bounds what a decompressor can make of a piece of input before
it sees it, and proves that the stream is whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from index.codecs.base import PIECE_SIZE, RawLimit
from index.errors import CodecError
from index.tables import CHUNK_SIZE, SeekPoint

if TYPE_CHECKING:
    from collections.abc import Iterator

FRAME_SPACING = CHUNK_SIZE
"""Raw bytes after a point from which on the next frame is one: a blob of tiny frames must not
make a huge table, and nothing smaller than a chunk is ever wanted."""

MAGIC_SIZE = 4

# Skippable frame: (RFC 8878, section 3.1.2; lz4_Frame_format.md)
#   u32 le  magic, 0x184D2A50 … 0x184D2A5F
#   u32 le  number of bytes that follow
_SKIPPABLE = 0x184D2A50
_SKIPPABLE_MASK = 0xFFFFFFF0
_SKIPPABLE_HEADER_SIZE = 8


class Block(NamedTuple):
    """`size` bytes of input, which make at most `bound` raw bytes. `last` ends the frame."""

    size: int
    bound: int
    last: bool


class FrameStream(ABC):
    """Decompresses frame after frame; a subclass knows one format."""

    name: ClassVar[str]
    magic: ClassVar[bytes]

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._offset = 0  # of the buffer in the stream
        self._frame = -1  # where the frame that we are in starts, or -1 between frames
        self._header_size = 0
        self._skip = 0  # bytes left of a skippable frame
        self._any = False

    @abstractmethod
    def _open(self, buffer: bytearray, at: int) -> int:
        """Begin the frame that starts at `at`. The size of its header; 0 if more is needed."""

    @abstractmethod
    def _block(self, buffer: bytearray, at: int) -> Block | None:
        """The block at `at`, with the checksum that may follow it. None if more is needed."""

    @abstractmethod
    def _decompress(self, data: bytes) -> Iterator[bytes]:
        """Raw bytes of a header or whole blocks, in pieces of 1 … PIECE_SIZE. CodecError."""

    @abstractmethod
    def _at_end(self) -> bool:
        """Whether the decompressor agrees that the frame is over."""

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
        """Yield (offset in the stream of the frame, raw bytes of it: 1 … PIECE_SIZE)."""
        buffer = self._buffer
        buffer += data
        start = at = 0  # what lies between them goes to the decompressor next
        bound = 0  # on what that makes
        while True:
            if self._frame < 0:
                start = self._between_frames(at)
                if self._frame < 0:
                    break
                at = start + self._header_size
            block = self._block(buffer, at)
            whole = block is not None and at + block.size <= len(buffer)
            if not whole or (block and bound and bound + block.bound > PIECE_SIZE):
                yield from self._decode(buffer, start, at)
                start, bound = at, 0
            if block is None or not whole:
                break
            at += block.size
            bound += block.bound
            if block.last:
                yield from self._decode(buffer, start, at)
                start, bound = at, 0
                if not self._at_end():
                    raise CodecError(f"malformed {self.name} data: a frame does not end")
                self._frame = -1
        del buffer[:start]
        self._offset += start

    def finish(self) -> None:
        """CodecError unless the stream ends with a whole frame."""
        if self._buffer or self._skip or self._frame >= 0 or not self._any:
            size = self._offset + len(self._buffer)
            raise CodecError(f"{self.name} data is truncated after {size} bytes")

    def _decode(self, buffer: bytearray, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        if start < end:
            with memoryview(buffer) as view:
                data = bytes(view[start:end])
            for raw in self._decompress(data):
                yield self._frame, raw

    def _between_frames(self, at: int) -> int:
        """Pass over skippable frames, open the next. Where that starts, or how far we got."""
        buffer = self._buffer
        while True:
            step = min(self._skip, len(buffer) - at)
            self._skip -= step
            at += step
            if self._skip or len(buffer) - at < MAGIC_SIZE:
                return at
            magic = bytes(buffer[at : at + MAGIC_SIZE])
            if int.from_bytes(magic, "little") & _SKIPPABLE_MASK == _SKIPPABLE:
                header = buffer[at : at + _SKIPPABLE_HEADER_SIZE]
                if len(header) < _SKIPPABLE_HEADER_SIZE:
                    return at
                self._skip = int.from_bytes(header[MAGIC_SIZE:], "little")
                at += _SKIPPABLE_HEADER_SIZE
                continue
            if magic != self.magic:
                raise CodecError(
                    f"malformed {self.name} data: no frame at byte {self._offset + at}"
                )
            self._header_size = self._open(buffer, at)
            if self._header_size:
                self._frame = self._offset + at
                self._any = True
            return at


class FrameScanner:
    """See Scanner. Points are the starts of frames; the first is the start of the blob."""

    def __init__(self, stream: FrameStream, *, limit: int) -> None:
        self.points = [SeekPoint(0, 0)]
        self.windows: list[bytes] = []
        self._stream = stream
        self._raw = RawLimit(limit)
        self._frame = -1

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        for frame, raw in self._stream.feed(data):
            far = self._raw.total - self.points[-1].raw_offset >= FRAME_SPACING
            if frame != self._frame and far:
                self.points.append(SeekPoint(self._raw.total, frame * 8))
            self._frame = frame
            self._raw.count(len(raw))
            yield raw

    def finish(self) -> None:
        self._stream.finish()


class FrameDecoder:
    """See Decoder. Starts at a frame and goes on through all that follow."""

    def __init__(self, stream: FrameStream, *, limit: int) -> None:
        self._stream = stream
        self._raw = RawLimit(limit)

    def allow(self, limit: int) -> None:
        self._raw.allow(limit)

    def feed(self, data: bytes | memoryview) -> bytes:
        output: list[bytes] = []
        for _, raw in self._stream.feed(data):
            self._raw.count(len(raw))
            output.append(raw)
        return b"".join(output)
