"""What a start touches, in order: recorded by itself, replayed by `Scheduler.replay`."""

from __future__ import annotations

import math

import trio

from index.profile import MAX_TOUCHES, Touch

QUIET = 10.0
"""Seconds without a new first touch after which a start has settled. A guess: longer than the
pauses in which a start computes, or waits for a slow link."""

LONGEST = 60.0
"""Seconds after the first touch when a start has settled in any case: who still reads what was
never read before is at work."""


class StartupRecorder:
    """Records first touches of one image. `Touch.layer` is the layer's number in its index.

    Reads are recorded and not fetches: what is on the node already is touched as well. What the
    kernel has in its page cache is not seen, and its read-ahead touches what nobody asked for.
    """

    def __init__(self) -> None:
        self.touches: list[Touch] = []
        self._seen: set[tuple[int, int]] = set()
        self._began = trio.Event()
        self._first = self._latest = math.inf
        self.stopped = False

    def touch(self, layer: int, first: int, last: int) -> bool:
        """Chunks `first` ... `last` are being read. Whether one of them is recorded for that."""
        if self.stopped:
            return False
        before = len(self.touches)
        for chunk in range(first, last + 1):
            if (layer, chunk) in self._seen or len(self.touches) >= MAX_TOUCHES:
                continue
            now = self._latest = trio.current_time()
            if not self.touches:
                self._first = now
                self._began.set()
            self._seen.add((layer, chunk))
            self.touches.append(Touch(layer, chunk, round(1000 * (now - self._first))))
        return len(self.touches) > before

    async def settled(self) -> None:
        """Wait until the start has settled."""
        await self._began.wait()
        while len(self.touches) < MAX_TOUCHES:
            until = min(self._latest + QUIET, self._first + LONGEST)
            if trio.current_time() >= until:
                return
            await trio.sleep_until(until)

    def stop(self) -> None:
        """Record nothing more."""
        self.stopped = True
        self._seen.clear()
