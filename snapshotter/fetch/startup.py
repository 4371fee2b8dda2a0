"""What a start touches, in order: recorded by itself, replayed by `Scheduler.replay`."""

from __future__ import annotations

from typing import NamedTuple

import trio

MAX_TOUCHES = 16384
"""Chunks (4 GiB) after which nothing more is recorded: that is no start any more."""


class Touch(NamedTuple):
    """The first read of a chunk: `after` is in seconds since recording began."""

    layer: int
    chunk: int
    after: float


class StartupRecorder:
    """Records first touches of one mounted image. `layer` is the layer's number in its index."""

    def __init__(self) -> None:
        self._began = trio.current_time()
        self._seen: set[tuple[int, int]] = set()
        self.touches: list[Touch] = []

    def touch(self, layer: int, first: int, last: int) -> None:
        """Chunks `first` ... `last` are being read."""
        for chunk in range(first, last + 1):
            if (layer, chunk) in self._seen or len(self.touches) >= MAX_TOUCHES:
                continue
            self._seen.add((layer, chunk))
            self.touches.append(Touch(layer, chunk, trio.current_time() - self._began))
