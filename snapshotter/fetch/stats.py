"""What fetching has cost so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from snapshotter.fetch.wants import Priority


def _zeros() -> dict[Priority, int]:
    return dict.fromkeys(Priority, 0)


@dataclass(slots=True)
class FetchStats:
    """Counters since the start. `requests` and `received_bytes` (compressed, as they came over
    the network) go by the most urgent thing that a run had to bring at that moment.

    `retries` counts requests that failed and were made again, `damaged` chunks that did not have
    their digest and spans that could not be decoded.
    """

    requests: dict[Priority, int] = field(default_factory=_zeros)
    received_bytes: dict[Priority, int] = field(default_factory=_zeros)
    retries: int = 0
    damaged: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(self.received_bytes.values())
