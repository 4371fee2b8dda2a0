"""What containerd has called, how that ended, and how long it took."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallCount:
    """All calls of one method that ended with one code.

    `code` is the name of a gRPC status, as "OK" or "NOT_FOUND".
    """

    method: str
    code: str
    count: int
    seconds: float  # of all of them together


class CallCounters:
    """Counts calls, from any thread. Those that are refused for being too many are not seen."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._ended: dict[tuple[str, str], tuple[int, float]] = {}

    def begin(self) -> None:
        """A call has come."""
        with self._lock:
            self._in_flight += 1

    def end(self, method: str, code: str, seconds: float) -> None:
        """A call that began has been answered."""
        with self._lock:
            self._in_flight -= 1
            count, total = self._ended.get((method, code), (0, 0.0))
            self._ended[method, code] = (count + 1, total + seconds)

    @property
    def in_flight(self) -> int:
        """Calls that began and have not ended."""
        return self._in_flight

    def snapshot(self) -> tuple[CallCount, ...]:
        """What has ended so far, in the order of method and code."""
        with self._lock:
            ended = sorted(self._ended.items())
        return tuple(CallCount(*key, *value) for key, value in ended)
