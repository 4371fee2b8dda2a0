"""Compressed streams for the tests of codecs, layers and conversion: data, cutting, checking."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from index import codecs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from index.tables import Codec, SeekPoint

UNLIMITED = 1 << 41


def _stretch(kind: str, seed: int, length: int) -> bytes:
    source = random.Random(seed)
    if kind == "noise":
        return source.randbytes(length)
    if kind == "zeros":
        return bytes(length)
    words = [source.randbytes(source.randrange(2, 40)) for _ in range(30)]
    text = bytearray()
    while len(text) < length:
        text += source.choice(words)
    return bytes(text[:length])


def raw_data(most: int = 150_000) -> st.SearchStrategy[bytes]:
    """Up to three times `most` bytes that compress in mixed ways."""
    stretch = st.builds(
        _stretch,
        st.sampled_from(["words", "noise", "zeros"]),
        st.integers(0, 99),
        st.integers(0, most),
    )
    return st.lists(stretch, max_size=3).map(b"".join)


piece_sizes = st.lists(
    st.sampled_from([1, 2, 7, 100, 4096, 70_000, 1 << 20]), min_size=1, max_size=4
)
"""Sizes of the pieces that input is cut into, for `cut`."""


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """`data` in pieces: five of each size but the last, then all the rest by that one."""
    at = 0
    *first, last = sizes
    for size in first:
        for _ in range(5):
            yield data[at : at + size]
            at += size
    last = max(last, len(data) // 2000)  # a million pieces would show no more
    while at < len(data):
        yield data[at : at + last]
        at += last


def scan(scanner: codecs.Scanner, pieces: Iterable[bytes]) -> bytes:
    """Feed and finish a scanner; all raw bytes."""
    raw = bytearray()
    for piece in pieces:
        for some in scanner.feed(piece):
            assert 0 < len(some) <= codecs.PIECE_SIZE
            raw += some
    scanner.finish()
    return bytes(raw)


def points_with_windows(scanner: codecs.Scanner) -> list[tuple[SeekPoint, bytes | None]]:
    windows = iter(scanner.windows)
    pairs = [(point, next(windows) if point.has_window else None) for point in scanner.points]
    assert next(windows, None) is None
    return pairs


def check_points(
    codec: Codec, scanner: codecs.Scanner, blob: bytes, raw: bytes, sizes: list[int]
) -> None:
    """Every point is a place to start from: to the next point, and to the end of the blob."""
    points = points_with_windows(scanner)
    assert (points[0][0].raw_offset, points[0][1]) == (0, None)
    offsets = [point.raw_offset for point, _ in points]
    assert offsets == sorted(set(offsets))
    assert offsets[-1] < len(raw) or len(offsets) == 1
    for number, (point, window) in enumerate(points):
        ends = [(len(blob), len(raw))]
        if number + 1 < len(points):
            following = points[number + 1][0]
            ends.append(((following.bit_offset + 7) // 8, following.raw_offset))
        for end, raw_end in ends:
            wanted = raw[point.raw_offset : raw_end]
            decoder = codecs.decoder(
                codec, bit_offset=point.bit_offset, window=window, limit=len(wanted)
            )
            pieces = cut(blob[point.bit_offset // 8 : end], sizes)
            assert b"".join(decoder.feed(piece) for piece in pieces) == wanted
