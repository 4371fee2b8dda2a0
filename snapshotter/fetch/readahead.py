"""Who reads on and on, or here and there while it starts, and what they will want next."""

from __future__ import annotations

from collections import OrderedDict

from index.tables import CHUNK_SIZE

FIRST_WINDOW = (512 << 10) // CHUNK_SIZE
LARGEST_WINDOW = (8 << 20) // CHUNK_SIZE
"""Chunks ahead of a sequential reader: doubled with each chunk it enters. 8 MiB of raw space are
about 80 ms of a 400 Mbit/s link, several round trips to most registries."""

MAX_STREAMS = 32
"""Sequential readers of one layer that are told apart; the least recently seen goes first."""


class SequentialReaders:
    """Recognises readers of one layer that go on where they left off, several at a time."""

    def __init__(self) -> None:
        self._windows: OrderedDict[int, int] = OrderedDict()
        """The chunk each was in last, to the window that it has earned."""

    def advance(self, first: int, last: int) -> range:
        """Somebody reads chunks `first` ... `last`: what to fetch ahead for them, if anything.

        The range may go past the end of the layer.
        """
        windows = self._windows
        previous = first if first in windows else first - 1
        window = windows.pop(previous, None)
        if window is not None and previous < last:
            window = min(LARGEST_WINDOW, max(FIRST_WINDOW, 2 * window))
        windows[last] = window or 0
        if len(windows) > MAX_STREAMS:
            windows.popitem(last=False)
        if not window or previous == last:
            return range(0)
        return range(last + 1, last + 1 + window)


FIRST_NEIGHBOURS, NEIGHBOURS = 3, 15
"""Chunks after one that a start had to wait for which are fetched with it, at first and at most:
files that belong together are next to each other in a layer, and each wait costs a round trip and
a request. Whenever one of them is read there are twice as many the next time. What starts most
often wait for, `images.foresight` has brought. See "What can be foreseen" in docs/benchmarks.md."""

MOST_IN_VAIN = 8
"""Guesses in a row of which no chunk was read: who reads so is at random places."""


class Neighbours:
    """Guesses what else a start will read of one layer, for as long as that is worth it."""

    def __init__(self) -> None:
        self._guessed: set[int] = set()
        self._in_vain = 0
        self._count = FIRST_NEIGHBOURS

    def guess(self, chunk: int) -> range:
        """Somebody has to wait for a chunk: what to fetch with it.

        The range may go past the end of the layer.
        """
        if self._in_vain >= MOST_IN_VAIN:
            return range(0)
        self._in_vain += 1
        guessed = range(chunk + 1, chunk + 1 + self._count)
        self._guessed.update(guessed)
        return guessed

    def read(self, chunk: int) -> None:
        """A chunk is read, whether it was guessed or not."""
        if chunk in self._guessed:
            self._guessed.discard(chunk)
            self._in_vain = 0
            self._count = min(2 * self._count + 1, NEIGHBOURS)

    def forget(self) -> None:
        """The start is over."""
        self._guessed.clear()
        self._in_vain = MOST_IN_VAIN
