"""Sequential readers are recognised, random ones are left alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snapshotter.fetch.readahead import (
    FIRST_WINDOW,
    LARGEST_WINDOW,
    MAX_STREAMS,
    SequentialReaders,
)


def test_the_window_doubles_with_each_chunk_up_to_a_bound() -> None:
    readers = SequentialReaders()
    windows = [len(readers.advance(chunk, chunk)) for chunk in range(12)]
    assert windows[:4] == [0, FIRST_WINDOW, 2 * FIRST_WINDOW, 4 * FIRST_WINDOW]
    assert windows[-1] == LARGEST_WINDOW
    assert readers.advance(12, 14) == range(15, 15 + LARGEST_WINDOW)


def test_several_reads_of_one_chunk_are_one_step() -> None:
    readers = SequentialReaders()
    for _ in range(5):
        assert not readers.advance(0, 0)
    assert readers.advance(0, 1) == range(2, 2 + FIRST_WINDOW)
    assert not readers.advance(1, 1)
    assert len(readers.advance(2, 2)) == 2 * FIRST_WINDOW


def test_readers_of_one_layer_do_not_disturb_each_other() -> None:
    readers = SequentialReaders()
    for step in range(3):
        windows = [len(readers.advance(base + step, base + step)) for base in (0, 1000, 2000)]
    assert windows == [2 * FIRST_WINDOW] * 3


@given(st.lists(st.integers(0, 10_000).map(lambda n: 3 * n), max_size=200))
def test_chunks_that_never_follow_each_other_cause_no_read_ahead(chunks: list[int]) -> None:
    readers = SequentialReaders()
    for chunk in chunks:
        assert not readers.advance(chunk, chunk)
    assert len(readers._windows) <= MAX_STREAMS
