"""Who reads on and on, and what they will want next."""

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
