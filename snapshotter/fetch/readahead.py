"""Who reads on and on, or here and there while it starts, and what they will want next."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from index.tables import CHUNK_SIZE

if TYPE_CHECKING:
    from collections.abc import Collection

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

CREDIT, MOST_CREDIT = 60, 120
"""Guessed chunks that may be in vain, at first and at most. Half of what is left of that is guessed
at once: who reads at random places has used it up soon."""

WORTH = 10
"""Guesses in vain that one which is read makes up for. With 6 two of four images started 6 to 10 %
later (python-web, scipy, 200 Mbit/s and 20 ms), because too little was guessed."""


class Neighbours:
    """Guesses what else a start will read of one layer, for as long as that is worth it."""

    def __init__(self) -> None:
        self._guessed: set[int] = set()
        self._credit = CREDIT
        self._count = FIRST_NEIGHBOURS

    def guess(self, chunk: int, foreseen: Collection[int] = ()) -> range:
        """Somebody has to wait for a chunk: what to fetch with it.

        The range may go past the end of the layer. What of it was `foreseen` is no guess: that it
        is read says nothing about those around it.
        """
        count = min(self._count, self._credit // 2)
        guessed = [at for at in range(chunk + 1, chunk + 1 + count) if at not in foreseen]
        self._credit -= len(guessed)
        self._guessed.update(guessed)
        return range(chunk + 1, chunk + 1 + count)

    def read(self, chunk: int) -> None:
        """A chunk is read, whether it was guessed or not."""
        if chunk in self._guessed:
            self._guessed.discard(chunk)
            self._credit = min(self._credit + WORTH, MOST_CREDIT)
            self._count = min(2 * self._count + 1, NEIGHBOURS)

    def forget(self) -> None:
        """The start is over."""
        self._guessed.clear()
        self._credit = 0
