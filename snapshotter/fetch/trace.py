"""What the start of an image waited for, and what was fetched for it: recorded by itself.

Only what goes over the network is recorded, and who waits for it: a read of what is here leaves
nothing behind. All of it is bounded, in time and in number.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from index.profile import Touch
    from snapshotter.fetch.source import Origin
    from snapshotter.fetch.wants import Priority

WINDOW = 300.0
"""Seconds from the opening of an image on that are recorded: a guess at what is still its start."""

MOST = 4096
"""Stalls, and requests, that are recorded; 0.5 MB of memory each."""

MOST_CHUNKS = 16384
"""Chunks (4 GiB) whose arrival is recorded; 2 MB of memory."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of opening the image. `at` and `seconds` count from the beginning of the record."""

    name: str
    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Stall:
    """A read that waited: of `length` bytes at `offset` of a layer's raw space."""

    layer: int
    offset: int
    length: int
    at: float
    seconds: float


class Exchange:
    """One request of a class, with `size` compressed bytes so far. `answered` is when the first
    byte came, `ended` when nothing more did; they are negative before that."""

    __slots__ = ("_epoch", "answered", "at", "ended", "kind", "layer", "size")

    def __init__(self, layer: int, kind: Priority, epoch: float = 0.0) -> None:
        """`epoch` is when the record began, on trio's clock."""
        self._epoch = epoch
        self.layer = layer
        self.kind = kind
        self.at = trio.current_time() - epoch
        self.answered = self.ended = -1.0
        self.size = 0

    def answer(self) -> None:
        self.answered = trio.current_time() - self._epoch

    def end(self) -> None:
        self.ended = trio.current_time() - self._epoch


class StartTrace:
    """The record of one image. For the trio thread; `layer` is a layer's number in its index."""

    def __init__(self) -> None:
        self._began = trio.current_time()
        self.began_ns = time.time_ns()
        self.steps: list[Step] = []
        self.stalls: list[Stall] = []
        self.exchanges: list[Exchange] = []
        self.arrived: dict[tuple[int, int], Priority | None] = {}
        """Why chunks were fetched, by layer and number; None: they were on the way."""
        self.touches: Sequence[Touch] = ()
        """First reads of chunks, as somebody else records them."""

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return trio.current_time() - self._began

    def step(self, name: str, began: float) -> float:
        """Something that began at `began` (trio's clock) is done; returns the time now."""
        now = trio.current_time()
        self.steps.append(Step(name, began - self._began, now - began))
        return now

    def stalled(self, layer: int, offset: int, length: int, began: float) -> None:
        """A read waited from `began` until now."""
        if self.age < WINDOW and len(self.stalls) < MOST:
            seconds = trio.current_time() - began
            self.stalls.append(Stall(layer, offset, length, began - self._began, seconds))

    def exchange(self, layer: int, kind: Priority) -> Exchange:
        """A request is made now. Whoever makes it goes on to fill the record in."""
        made = Exchange(layer, kind, self._began)
        if made.at < WINDOW and len(self.exchanges) < MOST:
            self.exchanges.append(made)
        return made

    def arrive(self, layer: int, chunk: int, cause: Priority | None) -> None:
        """A chunk has been decoded."""
        if len(self.arrived) < MOST_CHUNKS and self.age < WINDOW:
            self.arrived.setdefault((layer, chunk), cause)


@contextmanager
def traced(origin: Origin, kind: Priority) -> Iterator[Exchange]:
    """The record of one request, for the image whose source it goes to, if that is recorded."""
    if origin.trace is None:
        record = Exchange(origin.number, kind)
    else:
        record = origin.trace.exchange(origin.number, kind)
    try:
        yield record
    finally:
        record.end()


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The time that spans (begin, end) cover together."""
    return sum(end - begin for begin, end in _merged(sorted(spans)))


def _merged(spans: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    current: tuple[float, float] | None = None
    for begin, end in spans:
        if current is not None and begin <= current[1]:
            current = current[0], max(current[1], end)
            continue
        if current is not None:
            yield current
        current = begin, end
    if current is not None:
        yield current
