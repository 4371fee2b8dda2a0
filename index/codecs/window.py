"""Which bytes of a gzip checkpoint's window are really needed.

Decompression from the middle of a gzip stream needs the 32 KiB before that place, but later data
refers only to some of those bytes. The others become zeros, so that the window compresses well:
on 515 MB of /usr/lib/python3* and /usr/bin under gzip -6, 2.5 KB of a window are needed on
average, and it takes 2.3 KB instead of 11.5 KB (zstd 19).
"""

from __future__ import annotations

import sys
from functools import cache

from index.codecs.inflate import NO_FLUSH, RAW_DEFLATE, STREAM_END, WINDOW_SIZE, Inflater

# Two made-up windows. How deflate data is decoded does not depend on what the window holds, so a
# byte of output that comes from window position p, directly or through copies of copies, is
# _LOW[p] with the one and _HIGH[p] with the other; any other byte is the same with both. The two
# differ everywhere, and each pair of values belongs to one position:
#   low = p mod 256, high = low + 1 + p div 256 (mod 256), where p div 256 is 0 … 127.
_LOW = bytes(range(256)) * (WINDOW_SIZE // 256)
_HIGH = b"".join(
    bytes((low + 1 + page) & 0xFF for low in range(256)) for page in range(WINDOW_SIZE // 256)
)


@cache
def _positions() -> dict[int, int]:
    """Positions by their two bytes, as a machine's 16-bit number. Takes 10 ms to make, which only
    who builds an index needs."""
    pairs = zip(_LOW, _HIGH, strict=True)
    return {int.from_bytes(pair, sys.byteorder): place for place, pair in enumerate(pairs)}


class WindowProbe:
    """Follows a stream from a checkpoint on, until all references into the window are known.

    Only the first WINDOW_SIZE bytes of output can refer to the window.
    """

    def __init__(self) -> None:
        self._inflaters = tuple(Inflater(RAW_DEFLATE, WINDOW_SIZE) for _ in range(2))
        self._outputs = (bytearray(), bytearray())
        self._window = b""
        self.active = False

    def start(self, window: bytes, *, unused_bits: int, last_byte: int) -> None:
        """A checkpoint: `window` is before it, and so are all but the high bits of `last_byte`."""
        self._window = window
        for inflater, output, made_up in zip(
            self._inflaters, self._outputs, (_LOW, _HIGH), strict=True
        ):
            output.clear()
            inflater.restart(unused_bits=unused_bits, last_byte=last_byte, window=made_up)
        self.active = True

    def feed(self, address: int, length: int) -> bool:
        """Take what the stream took. Whether it is known by now what of the window is needed."""
        ended = False
        for inflater, output in zip(self._inflaters, self._outputs, strict=True):
            room = WINDOW_SIZE - len(output)
            code, _, raw = inflater.run(address, length, room, NO_FLUSH)
            output += raw
            ended = code == STREAM_END or len(output) == WINDOW_SIZE
        self.active = not ended
        return ended

    def needed(self) -> bytes | None:
        """The window with only its needed bytes; None if there are none at all."""
        low, high = self._outputs
        pairs = bytearray(2 * len(low))
        pairs[0::2] = low
        pairs[1::2] = high
        found = set(memoryview(pairs).cast("H"))
        known = _positions()
        positions = [known[pair] for pair in found if pair in known]
        if not positions:
            return None
        needed = bytearray(WINDOW_SIZE)
        for position in positions:
            needed[position] = self._window[position]
        return bytes(needed)
