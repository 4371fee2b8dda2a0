"""Sequential readers are recognised, starts are helped, random readers are left alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snapshotter.fetch.readahead import (
    CREDIT,
    FIRST_NEIGHBOURS,
    FIRST_WINDOW,
    LARGEST_WINDOW,
    MAX_STREAMS,
    NEIGHBOURS,
    WORTH,
    Neighbours,
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


def test_what_follows_a_chunk_that_is_waited_for_is_guessed() -> None:
    assert Neighbours().guess(7) == range(8, 8 + FIRST_NEIGHBOURS)


def test_who_reads_it_gets_more_the_next_time() -> None:
    neighbours = Neighbours()
    count = FIRST_NEIGHBOURS
    for chunk in range(0, 400, 100):
        assert neighbours.guess(chunk) == range(chunk + 1, chunk + 1 + count)
        neighbours.read(chunk + 1)
        count = min(2 * count + 1, NEIGHBOURS)


def test_what_was_foreseen_earns_nothing() -> None:
    neighbours = Neighbours()
    for chunk in range(0, 400, 100):
        assert neighbours.guess(chunk, foreseen={chunk + 1}) == range(
            chunk + 1, chunk + 1 + FIRST_NEIGHBOURS
        )
        neighbours.read(chunk + 1)


def test_who_never_reads_what_was_guessed_is_at_random_places() -> None:
    neighbours = Neighbours()
    far = range(0, 1000 * NEIGHBOURS, 2 * NEIGHBOURS)
    guesses = []
    for chunk in far:
        neighbours.read(chunk)
        guesses.append(len(neighbours.guess(chunk)))
    assert CREDIT - 2 < sum(guesses) <= CREDIT
    assert not any(guesses[CREDIT:])


def test_who_reads_at_random_across_two_chunks_is_so_too() -> None:
    neighbours = Neighbours()
    guesses = []
    for chunk in range(0, 1000 * NEIGHBOURS, 2 * NEIGHBOURS):
        neighbours.read(chunk)
        guesses.append(len(neighbours.guess(chunk)))
        if chunk % (4 * NEIGHBOURS) == 0:
            neighbours.read(chunk + 1)
    assert sum(guesses) < len(guesses) * WORTH / 2 + CREDIT
    assert sum(guesses) < len(guesses) * NEIGHBOURS / 2


def test_one_that_was_guessed_right_makes_up_for_others() -> None:
    neighbours = Neighbours()
    for chunk in range(0, 1000 * NEIGHBOURS, 2 * NEIGHBOURS):
        neighbours.read(chunk)
        assert neighbours.guess(chunk)
        if chunk % (4 * NEIGHBOURS) == 0:
            neighbours.read(chunk + 3)


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=200))
def test_no_more_is_guessed_in_vain_than_was_earned(reads: list[tuple[int, bool]]) -> None:
    neighbours = Neighbours()
    waiting: set[int] = set()
    guessed = right = 0
    for chunk, absent in reads:
        neighbours.read(chunk)
        right += chunk in waiting
        waiting.discard(chunk)
        if absent:
            guess = neighbours.guess(chunk)
            guessed += len(guess)
            waiting.update(guess)
    assert guessed <= CREDIT + WORTH * right


def test_after_the_start_nothing_is_guessed() -> None:
    neighbours = Neighbours()
    neighbours.guess(7)
    neighbours.forget()
    neighbours.read(8)
    assert neighbours.guess(100) == range(0)
