"""Which borders of deflate blocks become seek points: where, how many, and at what cost."""

from __future__ import annotations

import random
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index import codecs
from index.codecs import points as policy
from index.codecs.inflate import WINDOW_SIZE
from index.codecs.window import NO_LIMIT, WindowProbe
from index.tables import CHUNK_SIZE, Codec
from tests.support.streams import UNLIMITED, check_points, cut, piece_sizes, scan

if TYPE_CHECKING:
    from collections.abc import Callable

    from index.tables import SeekPoint

_T = TypeVar("_T")

LONGEST_BLOCK = 300_000  # raw bytes, of what is made here


@cache
def stretch(kind: str, seed: int) -> bytes:
    """A megabyte that needs little (noise), some (records) or much (words) of what is before it."""
    source = random.Random(seed)
    size = 1 << 20
    if kind == "noise":
        return source.randbytes(size)
    words = [source.randbytes(source.randrange(3, 30)) for _ in range(500)]
    if kind == "words":
        return b"".join(source.choices(words, k=size // 16))
    return b"".join(
        source.choice(words) + source.randbytes(40) for _ in range(size // 56)
    )  # records


@cache
def compressed(raw: bytes, level: int) -> bytes:
    compressor = zlib.compressobj(level, wbits=31)
    return compressor.compress(raw) + compressor.flush()


def layers() -> st.SearchStrategy[bytes]:
    """Up to 5 MiB of raw space."""
    one = st.builds(stretch, st.sampled_from(["noise", "words", "records"]), st.integers(0, 3))
    return st.lists(one, min_size=1, max_size=5).map(b"".join)


def scanned(blob: bytes, sizes: list[int] | None = None) -> codecs.Scanner:
    scanner = codecs.scanner(Codec.GZIP, limit=UNLIMITED)
    scan(scanner, cut(blob, sizes or [1 << 20]))
    return scanner


def between(scanner: codecs.Scanner) -> list[tuple[SeekPoint, SeekPoint, int]]:
    """Each point but the first: the one before it, itself, and how much its window keeps."""
    windows = iter(scanner.windows)
    kept = [
        WINDOW_SIZE - next(windows).count(0) if point.has_window else 0 for point in scanner.points
    ]
    return list(zip(scanner.points, scanner.points[1:], kept[1:], strict=False))


@settings(max_examples=8, deadline=None)
@given(layers(), st.sampled_from([1, 6]))
def test_points_are_shortly_before_chunks_neither_dense_nor_far_apart(
    raw: bytes, level: int
) -> None:
    scanner = scanned(compressed(raw, level))
    end = scanner.points[-1].raw_offset
    for last, point, _ in between(scanner):
        spacing = point.raw_offset - last.raw_offset
        assert spacing >= policy.LEAST_SPACING
        assert spacing <= policy.MOST_SPACING + CHUNK_SIZE + 2 * LONGEST_BLOCK
        near = -point.raw_offset % CHUNK_SIZE <= policy.APPROACH
        assert near or spacing >= policy.MOST_SPACING
    assert len(raw) - end <= policy.MOST_SPACING + CHUNK_SIZE + 2 * LONGEST_BLOCK


@settings(max_examples=8, deadline=None)
@given(layers(), st.sampled_from([1, 6]))
def test_what_windows_keep_is_paid_for_by_the_blob_before_them(raw: bytes, level: int) -> None:
    for last, point, kept in between(scanned(compressed(raw, level))):
        blob = (point.bit_offset - last.bit_offset) / 8
        due = point.raw_offset - last.raw_offset >= policy.MOST_SPACING
        assert due or kept <= policy.WINDOW_SHARE * blob - policy.POINT_COST


def test_where_windows_are_empty_points_are_dense_and_where_they_are_dear_they_are_not() -> None:
    noise = scanned(compressed(stretch("noise", 1) * 4, 6))
    assert len(noise.points) >= 4 * (1 << 20) // (policy.LEAST_SPACING + CHUNK_SIZE)
    assert not noise.windows
    words = scanned(compressed(stretch("words", 1) * 4, 6))
    assert len(words.points) <= 3


@settings(max_examples=4, deadline=None)
@given(layers(), piece_sizes)
def test_points_are_the_same_however_the_blob_is_cut_and_whoever_chooses_them(
    raw: bytes, sizes: list[int]
) -> None:
    blob = compressed(raw, 6)
    whole, pieced = scanned(blob), scanned(blob, sizes)
    assert (pieced.points, pieced.windows) == (whole.points, whole.windows)
    with ThreadPoolExecutor(1) as thread:

        def submit(work: Callable[[_T], None], subject: _T, /) -> None:
            thread.submit(work, subject)

        aside = codecs.scanner(Codec.GZIP, limit=UNLIMITED, submit=submit)
        scan(aside, cut(blob, [1 << 20]))
    assert (aside.points, aside.windows) == (whole.points, whole.windows)


def test_every_point_is_a_place_to_start_from() -> None:
    raw = b"".join(stretch(kind, 2) for kind in ("records", "noise", "words", "records"))
    blob = compressed(raw, 6)
    scanner = scanned(blob)
    assert len(scanner.points) > 4
    assert scanner.windows
    check_points(Codec.GZIP, scanner, blob, raw, [100_000])


def test_choosing_is_left_to_who_offers_to_do_it() -> None:
    threads = set()

    def submit(work: Callable[[_T], None], subject: _T, /) -> None:
        def run() -> None:
            threads.add(threading.current_thread())
            work(subject)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    scanner = codecs.scanner(Codec.GZIP, limit=UNLIMITED, submit=submit)
    scan(scanner, [compressed(stretch("noise", 1), 6)])
    assert len(scanner.points) > 1
    assert threading.current_thread() not in threads


@pytest.mark.parametrize("sizes", [[1 << 20], [70_000], [4096, 1]])
def test_a_flood_of_empty_blocks_is_passed_over(sizes: list[int]) -> None:
    """What follows a border is kept only up to a limit, whatever the stream is made of."""
    noise = stretch("noise", 3)[: CHUNK_SIZE * 2]
    empty = bytes([0, 0, 0, 0xFF, 0xFF])  # a stored block of no bytes, after a flush
    compressor = zlib.compressobj(6, wbits=-15)
    body = compressor.compress(noise) + compressor.flush(zlib.Z_SYNC_FLUSH)
    body += empty * (policy.MOST_FOLLOWING // len(empty) + 1)
    body += compressor.compress(noise) + compressor.flush()
    trailer = zlib.crc32(noise * 2).to_bytes(4, "little") + (2 * len(noise)).to_bytes(4, "little")
    blob = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + body + trailer
    scanner = codecs.scanner(Codec.GZIP, limit=UNLIMITED)
    assert scan(scanner, cut(blob, sizes)) == noise * 2
    assert len(noise) not in [point.raw_offset for point in scanner.points]
    check_points(Codec.GZIP, scanner, blob, noise * 2, [100_000])


# --- what of a window is needed ---


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 400), st.data())
def test_what_is_needed_is_what_changes_the_output(
    seed: int, count: int, data: st.DataObject
) -> None:
    source = random.Random(seed)
    window = source.randbytes(WINDOW_SIZE)
    starts = [source.randrange(WINDOW_SIZE - 40) for _ in range(count)]
    text = b"".join(window[at : at + source.randrange(3, 40)] + b"--" for at in starts)
    compressor = zlib.compressobj(6, wbits=-15, zdict=window)
    following = compressor.compress(text) + compressor.flush()
    needed = WindowProbe().needed(following, unused_bits=0, last_byte=0, most=NO_LIMIT)
    assert needed is not None
    assert len(needed) == len(set(needed))

    def decoded(window: bytes) -> bytes:
        return zlib.decompressobj(-15, zdict=window).decompress(following)

    kept = set(needed)
    assert decoded(policy.keep(window, kept)) == text
    for place in data.draw(st.lists(st.integers(0, WINDOW_SIZE - 1), max_size=10)):
        flipped = bytearray(window)
        flipped[place] ^= 0xFF
        assert (decoded(bytes(flipped)) != text) == (place in kept)


@pytest.mark.parametrize("most", [0, 3, 4])
def test_more_than_may_be_needed_is_told(most: int) -> None:
    window = random.Random(1).randbytes(WINDOW_SIZE)
    compressor = zlib.compressobj(6, wbits=-15, zdict=window)
    following = compressor.compress(window[500:504]) + compressor.flush()
    needed = WindowProbe().needed(following, unused_bits=0, last_byte=0, most=most)
    assert (needed is None) == (most < 4)
    assert needed is None or sorted(needed) == [500, 501, 502, 503]


def test_input_that_ends_too_soon_tells_nothing() -> None:
    compressor = zlib.compressobj(6, wbits=-15)
    following = compressor.compress(bytes(WINDOW_SIZE - 1)) + compressor.flush(zlib.Z_SYNC_FLUSH)
    assert WindowProbe().needed(following, unused_bits=0, last_byte=0, most=NO_LIMIT) is None
