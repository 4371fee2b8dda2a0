"""Bytes on their way in one direction of one connection. No sockets, no clock of its own."""

from __future__ import annotations

import enum
from collections import deque


class End(enum.Enum):
    """How a stream of bytes ends."""

    FINISHED = "finished"  # a FIN: the other direction may go on
    BROKEN = "broken"  # an RST, or an error


class DelayLine:
    """What goes in comes out in order, each piece not before its time, in seconds of any clock.

    Holds `limit` bytes and no more: who puts in looks at `full` before it takes from its source.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: deque[tuple[float, memoryview | End]] = deque()
        self._last = 0.0
        self.held = 0

    @property
    def full(self) -> bool:
        """Whether the source has to wait."""
        return self.held >= self._limit

    @property
    def due(self) -> float | None:
        """When the first piece comes out; None if there is none."""
        return self._pieces[0][0] if self._pieces else None

    def put(self, piece: bytes | End, due: float) -> None:
        """Add bytes, or the end. None overtakes what was put in before it."""
        self._last = max(self._last, due)
        if isinstance(piece, End):
            self._pieces.append((self._last, piece))
        else:
            self._pieces.append((self._last, memoryview(piece)))
            self.held += len(piece)

    def ripe(self, now: float) -> memoryview | End | None:
        """The first piece, if its time has come. It stays until `take`."""
        if self._pieces and self._pieces[0][0] <= now:
            return self._pieces[0][1]
        return None

    def take(self, count: int = 0) -> None:
        """Remove `count` bytes of the first piece, or an end."""
        due, piece = self._pieces.popleft()
        if isinstance(piece, End):
            return
        self.held -= count
        if count < len(piece):
            self._pieces.appendleft((due, piece[count:]))

    def clear(self) -> None:
        """Forget all that is on its way."""
        self._pieces.clear()
        self.held = 0
