"""Rewriting a layer so that it can be read at random without checkpoints.

The tar is cut into frames that decompress by themselves, followed by a seek table in a skippable
frame. Every zstd or lz4 tool still reads the result as one ordinary compressed tar.
"""

from __future__ import annotations

import struct
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import lz4.frame
import zstandard

from index.errors import UnsupportedError
from index.tables import CHUNK_SIZE, Codec

FRAME_SIZE = 2 * CHUNK_SIZE
"""Raw bytes in a frame.

Small frames compress worse; big ones make a cold read fetch and decode more. On 100 MiB of
/usr/lib/python3, zstd frames of 256 KiB, 512 KiB and 1 MiB take 2.0, -0.2 and -2.2 % more than
gzip -6 at level 3, and -3.3, -5.4 and -8.0 % at level 7. A conversion must not make a full
download longer, so 256 KiB at level 3 is out.
"""

DEFAULT_LEVELS = {
    Codec.ZSTD: 7,  # 3 is three times as fast and 5 % bigger, 9 is 0.4 % smaller
    Codec.LZ4: 3,  # the fast mode, 0, is 20 % bigger; decoding speed is the same
}
_LEVELS = {Codec.ZSTD: range(1, zstandard.MAX_COMPRESSION_LEVEL + 1), Codec.LZ4: range(13)}

# Seek table (zstd's contrib/seekable_format, version 0.1.0), little-endian:
#   u32  magic of a skippable frame
#   u32  size of what follows
#   each frame:  u32 compressed size, u32 raw size
#   u32  number of frames
#   u8   descriptor: 0, as there are no checksums
#   u32  magic of the seek table
_SKIPPABLE_HEADER = struct.Struct("<II")
_SKIPPABLE_MAGIC = 0x184D2A5E
_TABLE_ENTRY = struct.Struct("<II")
_TABLE_FOOTER = struct.Struct("<IBI")
_TABLE_MAGIC = 0x8F92EAB1

_LZ4_BLOCK_SIZES = (  # the greatest that a block of a frame can be
    (64 << 10, lz4.frame.BLOCKSIZE_MAX64KB),
    (256 << 10, lz4.frame.BLOCKSIZE_MAX256KB),
    (1 << 20, lz4.frame.BLOCKSIZE_MAX1MB),
    (4 << 20, lz4.frame.BLOCKSIZE_MAX4MB),
)


def compress_frame(raw: bytes, codec: Codec, level: int) -> bytes:
    """One frame that says how long its content is; ZSTD or LZ4. Works without the GIL."""
    if codec is Codec.ZSTD:
        return zstandard.ZstdCompressor(level=level).compress(raw)
    frame: bytes = lz4.frame.compress(
        raw,
        compression_level=level,
        block_size=next(
            (code for size, code in _LZ4_BLOCK_SIZES if len(raw) <= size),
            lz4.frame.BLOCKSIZE_MAX4MB,
        ),
        store_size=True,
    )
    return frame


class FrameWriter:
    """Turns raw space, fed in pieces of any size, into a blob of frames.

    What comes out in total depends on what was fed, on the parameters but for `threads`, and on
    the compressor's version. Frames are compressed on `threads` threads; `feed` waits for them
    only when twice as many frames are under way.
    """

    def __init__(
        self, codec: Codec, *, level: int, frame_size: int = FRAME_SIZE, threads: int = 1
    ) -> None:
        """UnsupportedError if the codec has no frames, or not this level.

        `frame_size` is a multiple of CHUNK_SIZE below 4 GiB, so that each chunk lies in one frame.
        """
        if level not in _LEVELS.get(codec, ()):
            raise UnsupportedError(
                f"cannot write {codec.name.lower()} frames at level {level}",
                hint="zstd has levels 1 to 22, lz4 0 to 12",
            )
        assert frame_size > 0
        assert frame_size % CHUNK_SIZE == 0
        self._codec = codec
        self._level = level
        self._frame_size = frame_size
        self._buffer = bytearray()  # less than a frame
        self._pool = ThreadPoolExecutor(threads, "compress")  # ends with its last reference
        self._most = 2 * threads
        self._under_way: deque[tuple[int, Future[bytes]]] = deque()  # with raw size
        self._table = bytearray()

    def feed(self, raw: bytes | memoryview) -> bytes:
        """Take the next raw bytes; return what the blob goes on with, possibly nothing yet."""
        self._buffer += raw
        output: list[bytes] = []
        while len(self._buffer) >= self._frame_size:
            self._start(bytes(self._buffer[: self._frame_size]))
            del self._buffer[: self._frame_size]
            output += self._collect(self._most)
        return b"".join(output)

    def finish(self) -> bytes:
        """The rest of the blob: the last frame, which may be shorter, and the seek table."""
        if self._buffer or not (self._table or self._under_way):
            self._start(bytes(self._buffer))  # a blob has at least one frame
        output = self._collect(0)
        self._pool.shutdown()
        return b"".join((*output, self._seek_table()))

    def _start(self, raw: bytes) -> None:
        job = self._pool.submit(compress_frame, raw, self._codec, self._level)
        self._under_way.append((len(raw), job))

    def _collect(self, most: int) -> list[bytes]:
        """The frames that are done, in order; wait until at most `most` are under way."""
        frames = []
        while self._under_way and (len(self._under_way) > most or self._under_way[0][1].done()):
            raw_size, job = self._under_way.popleft()
            frame = job.result()
            self._table += _TABLE_ENTRY.pack(len(frame), raw_size)
            frames.append(frame)
        return frames

    def _seek_table(self) -> bytes:
        count = len(self._table) // _TABLE_ENTRY.size
        table = bytes(self._table) + _TABLE_FOOTER.pack(count, 0, _TABLE_MAGIC)
        return _SKIPPABLE_HEADER.pack(_SKIPPABLE_MAGIC, len(table)) + table
