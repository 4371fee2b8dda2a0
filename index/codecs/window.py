"""Which bytes of a gzip checkpoint's window are really needed.

Decompression from the middle of a gzip stream needs the 32 KiB before that place, but later data
refers only to some of those bytes. The others become zeros, so that the window compresses well:
on 515 MB of /usr/lib/python3* and /usr/bin under gzip -6, 2.5 KB of a window are needed on
average, and it takes 2.3 KB instead of 11.5 KB (zstd 19).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from index.codecs.inflate import (
    NO_FLUSH,
    RAW_DEFLATE,
    STREAM_END,
    WINDOW_SIZE,
    Inflater,
    address_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

# Two made-up windows. How deflate data is decoded does not depend on what the window holds, so a
# byte of output that comes from window position p, directly or through copies of copies, is
# _ONE[p] with the one and _OTHER[p] with the other; any other byte is the same with both. The two
# differ everywhere, and one of them and the difference tell the position:
#   one = p mod 256, one xor other = 128 + p div 256 (128 … 255).
_ONE = bytes(range(256)) * (WINDOW_SIZE // 256)
_OTHER = bytes(place & 0xFF ^ (0x80 | place >> 8) for place in range(WINDOW_SIZE))

_NO_POSITIONS = frozenset(range(256))  # pairs without a difference

_STAGES = ((512, 16), (WINDOW_SIZE, 1))
"""Bytes of output after which is counted, and how often what is needed by then is taken to go into
what will be needed in the end. Of the borders that are looked at in seven images' layers, the first
stage turns three quarters away; of the others, three in four need no more than they may. With 8
instead of 16, twice as many get past it, and a tenth more become points."""

NO_LIMIT = 16 * WINDOW_SIZE


class WindowProbe:
    """Decompresses what follows a border of blocks, to see what that refers to."""

    def __init__(self) -> None:
        self._inflaters = tuple(Inflater(RAW_DEFLATE, WINDOW_SIZE) for _ in range(2))

    def needed(
        self, following: bytes, *, unused_bits: int, last_byte: int, most: int
    ) -> list[int] | None:
        """Window positions that later output needs, in no order; None if more than `most`, or if
        it soon looks like it.

        `following` is the input from the border on, after `unused_bits` high bits of `last_byte`.
        Only the first WINDOW_SIZE bytes of output can refer to the window; None, too, if there is
        not enough input for them, or up to the end of the stream.
        """
        for inflater, made_up in zip(self._inflaters, (_ONE, _OTHER), strict=True):
            inflater.restart(unused_bits=unused_bits, last_byte=last_byte, window=made_up)
        address, left = address_of(following), len(following)
        found: set[int] = set()
        output = 0
        for size, factor in _STAGES:
            code, taken, one = self._inflaters[0].run(address, left, size - output, NO_FLUSH)
            _, _, other = self._inflaters[1].run(address, left, size - output, NO_FLUSH)
            found |= _pairs(one, other)
            ended = code == STREAM_END
            incomplete = not ended and output + len(one) < size
            if incomplete or len(found) * (1 if ended else factor) > most:
                return None
            if ended:
                break
            output += len(one)
            address += taken
            left -= taken
        return [pair % WINDOW_SIZE for pair in found]


def _pairs(one: bytes, other: bytes) -> set[int]:
    """What tells positions in two outputs: 256 * difference + one.

    Most bytes are no position's. Their pairs are the numbers that Python has ready-made, which is
    why it is the difference that is looked at: it saves a quarter of the time.
    """
    if one == other:  # one border in ten needs nothing
        return set()
    differences = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    both = bytearray(2 * len(one))
    both[0::2] = one
    both[1::2] = differences.to_bytes(len(one), "little")
    pairs = set(array("H", both))
    pairs -= _NO_POSITIONS
    return pairs


def keep(window: bytes, positions: Iterable[int]) -> bytes:
    """The window with nothing but zeros elsewhere."""
    kept = bytearray(WINDOW_SIZE)
    for position in positions:
        kept[position] = window[position]
    return bytes(kept)
