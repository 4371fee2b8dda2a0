"""Whether fill waits altogether: for the next step of a pull, or until a start has come to rest."""

from __future__ import annotations

import math

import trio

from snapshotter.fetch.processors import Processors

HELD_BACK = 2.0
"""Seconds for which fill waits for the next step of a pull: containerd takes 3 to 7 ms a layer.
A guess at the longest pause, after which the pull counts as given up."""

BEFORE_START = 1.0
"""Seconds from the end of a pull to the first read of its container for which fill waits: to make a
container takes runtimes 0.2 s of both of two cores, and twice that beside a download; redis without
a profile was ready after 1.1 s instead of 1.7 (1 Gbit/s, 0.5 ms) and 2.8 instead of 3.0 (100
Mbit/s, 50 ms). A guess at how long a kubelet takes."""

SETTLED = 0.5
"""Seconds without a first touch after which the next one of a start is not waited for any more. A
guess at the pauses of a start whose bytes are on their way."""

SPARE = 1.0
"""Processors that must have been idle since then. Fill can use as many, and a start that computes
for seconds reads nothing meanwhile that we would see: tomcat from a startup pack, on two cores, was
ready after 3.9 and 3.4 s, and beside fill after 5.3 and 5.7."""

LONGEST_COMPUTING = 3.0
"""Seconds from the last sign of a start for which that counts: the machine may be busy for ever."""

LONGEST_START = 10.0
"""Seconds after which fill goes on in any case, however much is still read for the first time."""


class Hold:
    """For the trio thread. `until` is when it ends, unless something happens before."""

    def __init__(self) -> None:
        self.until = -math.inf
        self._start_ends = -math.inf  # at the latest
        self._computes_until = -math.inf  # at the latest
        self._processors = Processors()

    def pull(self) -> None:
        """A pull goes on, whose next step is near: fill waits for that, and needs no processor."""
        self.until = trio.current_time() + HELD_BACK

    def release(self) -> None:
        """The pull is over, and no start will follow."""
        self.until = self._start_ends = self._computes_until = -math.inf

    def expect_start(self) -> None:
        """A container is about to start: fill waits until it has come to rest."""
        now = trio.current_time()
        self.until = now + BEFORE_START
        self._start_ends = now + LONGEST_START
        self._computes_until = min(now + LONGEST_COMPUTING, self._start_ends)
        self._processors.spare()

    def note_touch(self) -> None:
        """A start goes on: something was read that nobody had read before."""
        now = trio.current_time()
        if now < self._start_ends:
            self.until = max(self.until, min(now + SETTLED, self._start_ends))
            self._computes_until = min(now + LONGEST_COMPUTING, self._start_ends)

    def holds(self) -> bool:
        """Whether fill has to wait. It waits on while a start seems to compute."""
        now = trio.current_time()
        if self.until <= now < self._computes_until:
            if self._processors.spare() < SPARE:
                self.until = min(now + SETTLED, self._computes_until)
            else:
                self._computes_until = -math.inf
        return now < self.until
