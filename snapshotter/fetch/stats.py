"""What fetching has cost so far."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from snapshotter.fetch.wants import Priority

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds: what a histogram tells apart, from a page cache to a registry that does not answer."""


class Durations:
    """How often something took how long. `counts` has one for each of BOUNDS, an upper one, and one
    for what took longer; `total` is in seconds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


def _zeros() -> dict[Priority, int]:
    return dict.fromkeys(Priority, 0)


@dataclass(slots=True)
class FetchStats:
    """Counters since the start. `requests` and `received_bytes` (compressed, as they came over
    the network) go by the most urgent thing that a run had to bring at that moment.

    `retries` counts requests that failed and were made again, `damaged` chunks that did not have
    their digest and spans that could not be decoded. `hits` are reads of a layer that were
    answered at once, `stalls` those that had to wait; `latencies` are times from a request to its
    first byte.
    """

    requests: dict[Priority, int] = field(default_factory=_zeros)
    received_bytes: dict[Priority, int] = field(default_factory=_zeros)
    retries: int = 0
    damaged: int = 0
    hits: int = 0
    stalls: Durations = field(default_factory=Durations)
    latencies: Durations = field(default_factory=Durations)

    @property
    def total_bytes(self) -> int:
        return sum(self.received_bytes.values())
