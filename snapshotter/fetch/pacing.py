"""How much to ask of one registry at a time: what the link holds, and no more. Sans-IO.

A link holds `rate` x `delay` bytes. With less than that outstanding (asked for and not here yet)
it idles; what is outstanding beyond it waits in a queue, and a reader's answer behind it. Both are
learnt from the requests that are made anyway: the delay is the shortest time to a first byte
lately, the rate the highest at which bytes came. So the window grows by its gain with every
measurement until more of it brings nothing more. (TCP's BBR does that with packets: Cardwell and
others, "BBR: congestion-based congestion control", ACM Queue 14(5), 2016.)

Only fill is paced. What somebody waits for is asked for at once, and counts as outstanding.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

DELAY_MEMORY = 120.0
"""Seconds for which the shortest delay is believed; long, since it shows only without a queue. A
guess at how often a node's way to a registry changes."""

RATE_MEMORY = 20.0
"""Seconds for which the highest rate is believed. A guess."""

SHORTEST_SAMPLE = 0.1
"""Seconds over which a rate is measured at least: bytes come in bursts of 256 KiB, and more when
the event loop was busy."""

FIRST_WINDOW = 1 << 20
"""Bytes outstanding while nothing is known of the link: 40 ms at 200 Mbit/s."""

LARGEST_WINDOW = 32 << 20

SMALLEST_SEGMENT = 128 << 10
"""Bytes of one request. Each costs 0.5 ms of processor time, as decoding so many bytes does."""

LARGEST_SEGMENT = 8 << 20

FIRST_FAN = 4
LARGEST_FAN = 12
"""Requests of fill side by side. When the rate has stopped growing, two more are tried for a
while: a connection has limits of its own on long links, and at some servers."""

TRIAL = 4
"""Measurements without growth before more connections are tried, and for which they are."""

REST = 200
"""Measurements until that is tried again: 20 s and more."""

GROWTH = 1.1
"""What counts as growth: a tenth is more than the noise of a steady link."""

GROWING = 2.0
"""The window's gain while the rate still grows, as in BBR's startup: it doubles each time."""

SLOW_ANSWER = 4.0
"""Times as long as expected that an answer may take before the server counts as overloaded: a
new connection with TLS takes three round trips more."""

RECOVERY = 1 / 16
"""What of its window a registry gets back with each request that succeeds."""


@dataclass(frozen=True, slots=True)
class Mood:
    """How fill uses the link: `gain` times what it holds, what it carries in `queue` seconds, and
    in any case `segments` requests."""

    gain: float
    queue: float
    segments: int


BLOCKED = Mood(gain=0.9, queue=0.0, segments=0)
"""Somebody is blocked: what the link holds beside their requests, and no queue in their way. With
these numbers, on simulated links from 0.5 to 150 ms, readers wait a fifth longer than without fill
(plus one segment where the link holds less than that), and 0.7 to 0.98 of the link is used."""

EXPECTING = Mood(gain=1.0, queue=0.001, segments=2)
"""The next read is not far: a queue that it will hardly notice."""

ALONE = Mood(gain=2.0, queue=0.02, segments=2)
"""Nobody waits: a queue, so that the link never idles."""


class Exchange:
    """One request of `size` bytes. Call `answered`, `received` and, in any case, `ended`."""

    __slots__ = ("_pacing", "_queue", "_since", "left")

    def __init__(self, pacing: Pacing, now: float, size: int) -> None:
        self._pacing = pacing
        self._since = now
        self._queue = pacing.outstanding
        self.left = size

    def answered(self, now: float) -> None:
        """The first byte is here."""
        self._pacing.note_delay(now, now - self._since, queue=self._queue)

    def received(self, now: float, size: int) -> None:
        """More bytes than asked for count no more."""
        size = min(size, self.left)
        self.left -= size
        self._pacing.note_bytes(now, size)

    def ended(self, now: float, *, failed: bool = False, retry_after: float | None = None) -> None:
        """Nothing more comes of it. `failed`: the server did not do what it should; if it said so,
        `retry_after` is for how many seconds it wants to be left alone."""
        self._pacing.note_end(now, self.left, failed=failed, retry_after=retry_after)
        self.left = 0


class Pacing:
    """What is known of the way to one registry. Times are seconds of one clock.

    `outstanding` are bytes that were asked for and are not here yet, for whomever. `rests_until`:
    before that fill asks for nothing, because the registry said so.
    """

    def __init__(self) -> None:
        self.outstanding = 0
        self.rests_until = -math.inf
        self._fan = self._proven_fan = FIRST_FAN
        self._share = 1.0
        self._delays: deque[tuple[float, float]] = deque()  # rising: the first is the shortest
        self._rates: deque[tuple[float, float]] = deque()  # falling: the first is the highest
        self._sample_since: float | None = None
        self._sample_bytes = 0
        self._calm = 0
        self._calm_rate = 0.0

    @property
    def delay(self) -> float:
        """Seconds from a request to its first byte if nothing queues; 0 if that is not known."""
        return self._delays[0][1] if self._delays else 0.0

    @property
    def rate(self) -> float:
        """Bytes a second that the link brings; 0 if that is not known."""
        return self._rates[0][1] if self._rates else 0.0

    @property
    def holds(self) -> int:
        """Bytes that are under way when the link is busy and nothing queues."""
        return int(self.rate * self.delay)

    def carries(self, seconds: float) -> int:
        """Bytes that come in a round trip and so many seconds."""
        return int(self.rate * (self.delay + seconds))

    @property
    def fan(self) -> int:
        """Requests of fill to make side by side."""
        return max(1, round(self._fan * self._share))

    def window(self, mood: Mood) -> int:
        """Bytes that should be outstanding."""
        window = float(FIRST_WINDOW if mood.segments else 0)
        if self.rate:
            growing = mood.segments and self._calm < TRIAL - 1
            gain = max(mood.gain, GROWING) if growing else mood.gain
            window = gain * self.rate * (self.delay + mood.queue)
        window = min(window, LARGEST_WINDOW) * self._share
        return max(int(window), mood.segments * SMALLEST_SEGMENT)

    def segment(self, mood: Mood) -> int:
        """Bytes of one request of fill. On short links a few large ones: each costs as much
        processor time as decoding a quarter of a megabyte."""
        short = self.rate > 0 and self.delay < mood.queue
        segment = self.window(mood) // (min(self.fan, 2) if short else self.fan)
        return min(max(segment, SMALLEST_SEGMENT), LARGEST_SEGMENT)

    def may_begin(self, mood: Mood, now: float) -> bool:
        """Whether fill may make another request."""
        if now < self.rests_until:
            return False
        # Half a segment more, half a segment less: on average it is the window.
        return self.outstanding + self.segment(mood) // 2 <= self.window(mood)

    def has_room(self, mood: Mood) -> bool:
        """Whether no more is outstanding than should be."""
        return self.outstanding <= self.window(mood)

    def begin(self, now: float, size: int) -> Exchange:
        """A request is made, of whatever class."""
        exchange = Exchange(self, now, size)
        if not self.outstanding:
            self._sample_since = None  # the link was idle, which says nothing about its rate
        self.outstanding += size
        return exchange

    # --- what exchanges tell ---

    def note_delay(self, now: float, seconds: float, *, queue: int) -> None:
        """A first byte came after so long, with `queue` bytes outstanding before its request."""
        _remember(self._delays, now, seconds, DELAY_MEMORY, lambda old: old >= seconds)
        if self.rate:
            expected = self.delay + queue / self.rate
            if seconds > SLOW_ANSWER * expected + SHORTEST_SAMPLE:
                self._share = max(RECOVERY, self._share * 0.75)

    def note_bytes(self, now: float, size: int) -> None:
        self.outstanding -= size
        if self._sample_since is None:
            self._sample_since, self._sample_bytes = now, 0
            return
        self._sample_bytes += size
        length = now - self._sample_since
        if length < max(SHORTEST_SAMPLE, self.delay):
            return
        rate = self._sample_bytes / length
        self._sample_since, self._sample_bytes = now, 0
        full = self.outstanding >= self.holds
        _remember(self._rates, now, rate, RATE_MEMORY, lambda old: old <= rate)
        if full:
            self._try_more_connections()

    def note_end(self, now: float, left: int, *, failed: bool, retry_after: float | None) -> None:
        self.outstanding -= left
        if failed:
            self._share = max(RECOVERY, self._share * 0.5)
            self.rests_until = max(self.rests_until, now + (retry_after or 0.0))
        elif not left:
            self._share = min(1.0, self._share + RECOVERY)

    def _try_more_connections(self) -> None:
        if self.rate > GROWTH * self._calm_rate:
            self._calm, self._calm_rate = 0, self.rate
            self._proven_fan = self._fan
            return
        self._calm_rate = min(self._calm_rate, self.rate)  # higher ones have been forgotten
        self._calm += 1
        if self._calm == TRIAL:
            self._fan = min(self._fan + 2, LARGEST_FAN)
        elif self._calm == 2 * TRIAL:
            self._fan = self._proven_fan
        elif self._calm == REST:
            self._calm = TRIAL - 1


def _remember(
    kept: deque[tuple[float, float]],
    now: float,
    value: float,
    memory: float,
    surpassed: Callable[[float], bool],
) -> None:
    """Keep a value, and of the older ones those that may be the extreme one once more."""
    while kept and (kept[0][0] < now - memory):
        kept.popleft()
    while kept and surpassed(kept[-1][1]):
        kept.pop()
    kept.append((now, value))
