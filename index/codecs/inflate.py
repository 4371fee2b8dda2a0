"""zlib's inflate through ctypes, for what Python's zlib module leaves out.

That is stopping at the borders of deflate blocks (Z_BLOCK), starting inside a byte (inflatePrime)
and reading the sliding window. Every call releases the GIL. Source of all names and rules: zlib.h.
"""

from __future__ import annotations

import ctypes
import weakref

from index.errors import CodecError

WINDOW_SIZE = 32 << 10
"""How far back deflate can refer, in bytes (RFC 1951, section 2)."""

RAW_DEFLATE = -15  # windowBits: no header and no trailer
GZIP = 31  # windowBits: gzip header and trailer, both checked

NO_FLUSH = 0
BLOCK = 5  # return at the next border of blocks, and after a gzip header

OK = 0
STREAM_END = 1
_BUF_ERROR = -5  # no progress was possible: not an error, more input or output room is needed

# Bits of ZStream.data_type after a call
_UNUSED_BITS = 0x07  # at a border: bits of the last byte taken that belong to what follows
_LAST_BLOCK = 0x40
_AT_BORDER = 0x80


class _ZStream(ctypes.Structure):
    """z_stream of zlib.h."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


_libz = ctypes.CDLL("libz.so.1")
_stream_p = ctypes.POINTER(_ZStream)
_libz.inflateInit2_.argtypes = (_stream_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_libz.inflate.argtypes = (_stream_p, ctypes.c_int)
_libz.inflateEnd.argtypes = (_stream_p,)
_libz.inflateReset.argtypes = (_stream_p,)
_libz.inflatePrime.argtypes = (_stream_p, ctypes.c_int, ctypes.c_int)
_libz.inflateSetDictionary.argtypes = (_stream_p, ctypes.c_char_p, ctypes.c_uint)
_libz.inflateGetDictionary.argtypes = (
    _stream_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
)
_libz.zlibVersion.restype = ctypes.c_char_p


def address_of(data: bytes) -> int:
    """Where the bytes lie in memory; valid as long as somebody holds `data`."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


class Inflater:
    """One inflate stream with an output buffer of its own, of `capacity` bytes."""

    def __init__(self, window_bits: int, capacity: int) -> None:
        self._stream = _ZStream()
        self._reference = ctypes.byref(self._stream)
        self._output = ctypes.create_string_buffer(capacity)
        code = _libz.inflateInit2_(
            self._reference, window_bits, _libz.zlibVersion(), ctypes.sizeof(_ZStream)
        )
        if code != OK:
            raise MemoryError(f"zlib cannot make an inflate stream: code {code}")
        weakref.finalize(self, _libz.inflateEnd, self._stream)

    def restart(self, *, unused_bits: int = 0, last_byte: int = 0, window: bytes = b"") -> None:
        """Begin a new stream, possibly in the middle of deflate data (raw deflate only).

        `unused_bits` (0 … 7) high bits of `last_byte` come before the first byte of input, and
        `window` (WINDOW_SIZE bytes, or none) is what was decompressed before.
        """
        _libz.inflateReset(self._reference)
        if unused_bits:
            _libz.inflatePrime(self._reference, unused_bits, last_byte >> (8 - unused_bits))
        if window:
            _libz.inflateSetDictionary(self._reference, window, len(window))

    def run(self, address: int, length: int, room: int, flush: int) -> tuple[int, int, bytes]:
        """Decompress from `length` bytes at `address` into at most `room` <= capacity bytes.

        Returns OK or STREAM_END, the number of bytes taken, and the output. If the output has
        `room` bytes, there may be more to come without more input. CodecError on malformed data.
        """
        stream = self._stream
        stream.next_in = address
        stream.avail_in = length
        stream.next_out = ctypes.addressof(self._output)
        stream.avail_out = room
        code = _libz.inflate(self._reference, flush)
        if code not in (OK, STREAM_END, _BUF_ERROR):
            reason = stream.msg.decode("ascii", "replace") if stream.msg else f"zlib code {code}"
            raise CodecError(f"malformed gzip data: {reason}")
        output = ctypes.string_at(self._output, room - stream.avail_out)
        return OK if code == _BUF_ERROR else code, length - stream.avail_in, output

    @property
    def at_border(self) -> bool:
        """The last call with BLOCK stopped before a block (or where the first one will be)."""
        return bool(self._stream.data_type & (_AT_BORDER | _LAST_BLOCK) == _AT_BORDER)

    @property
    def unused_bits(self) -> int:
        """At a border: how many high bits of the last byte taken belong to what follows, 0 … 7."""
        return int(self._stream.data_type & _UNUSED_BITS)

    def window(self) -> bytes:
        """The last WINDOW_SIZE bytes of output; zeros stand for what this stream never had."""
        window = ctypes.create_string_buffer(WINDOW_SIZE)
        length = ctypes.c_uint()
        _libz.inflateGetDictionary(self._reference, window, ctypes.byref(length))
        return window.raw[: length.value].rjust(WINDOW_SIZE, b"\0")
