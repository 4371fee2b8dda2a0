"""Pacing on simulated links: fill uses them fully, and a reader hardly notices it."""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass
from itertools import count, pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.fetch.pacing import (
    ALONE,
    BLOCKED,
    EXPECTING,
    FIRST_FAN,
    LARGEST_FAN,
    LARGEST_SEGMENT,
    LARGEST_WINDOW,
    SMALLEST_SEGMENT,
    Exchange,
    Mood,
    Pacing,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PACKET = 16 << 10
READ = 300_000
"""Bytes of a reader's request: a chunk of 256 KiB with what it takes to decode it."""


@dataclass(eq=False)
class Response:
    """What is still to be sent to one request; `arrived` is called with its packets' sizes."""

    left: int
    arrived: Callable[[int], None]


class Link:
    """Carries `rate` bytes a second, in turn for all responses; a byte takes `delay` / 2 each way.

    At most `connection_rate` bytes a second for each response.
    """

    def __init__(self, rate: float, delay: float, connection_rate: float = 1e12) -> None:
        self.now = 0.0
        self.carried = 0
        self._rate, self._delay, self._connection_rate = rate, delay, connection_rate
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._sending: deque[Response] = deque()
        self._busy = False

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), what))

    def request(self, size: int, arrived: Callable[[int], None]) -> None:
        response = Response(size, arrived)
        self.after(self._delay / 2, lambda: self._offer(response))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = until

    def _offer(self, response: Response) -> None:
        self._sending.append(response)
        if not self._busy:
            self._send()

    def _send(self) -> None:
        self._busy = bool(self._sending)
        if not self._busy:
            return
        response = self._sending.popleft()
        size = min(PACKET, response.left)
        response.left -= size
        taken = size / self._rate

        def sent() -> None:
            self.carried += size
            self.after(self._delay / 2, lambda: response.arrived(size))
            if response.left:
                pause = size / self._connection_rate - taken
                if pause > 0:
                    self.after(pause, lambda: self._offer(response))
                else:
                    self._sending.append(response)
            self._send()

        self.after(taken, sent)


class Node:
    """Fills all the time if `fill`, and may have one reader who thinks between reads."""

    def __init__(self, link: Link, *, fill: bool = True, mood: Mood = ALONE) -> None:
        self.link = link
        self.pacing = Pacing()
        self.stalls: list[float] = []
        self.most_runs = self.requests = 0
        self._fill, self._calm_mood = fill, mood
        self._runs = 0
        self._blocked = 0
        self._start_fill()

    @property
    def mood(self) -> Mood:
        return BLOCKED if self._blocked else self._calm_mood

    def _start_fill(self) -> None:
        while (
            self._fill
            and self._runs < self.pacing.fan + 1
            and self.pacing.may_begin(self.mood, self.link.now)
        ):
            self._runs += 1
            self.most_runs = max(self.most_runs, self._runs)
            self._request(self.pacing.segment(self.mood), self._fill_ended)

    def _fill_ended(self) -> None:
        self._runs -= 1

    def _request(self, size: int, ended: Callable[[], None]) -> None:
        self.requests += 1
        exchange = self.pacing.begin(self.link.now, size)
        answered = False

        def arrived(length: int) -> None:
            nonlocal answered
            if not answered:
                exchange.answered(self.link.now)
                answered = True
            exchange.received(self.link.now, length)
            if not exchange.left:
                exchange.ended(self.link.now)
                ended()
            self._start_fill()

        self.link.request(size, arrived)

    def read_after(self, seconds: float, rng: random.Random) -> None:
        def read() -> None:
            began = self.link.now
            self._blocked += 1

            def ended() -> None:
                self._blocked -= 1
                self.stalls.append(self.link.now - began)
                self.read_after(rng.uniform(0.001, 0.03), rng)

            self._request(READ, ended)

        self.link.after(seconds, read)


LINKS = [
    pytest.param(125e6, 0.0005, id="1 Gbit/s, 0.5 ms"),
    pytest.param(62.5e6, 0.005, id="500 Mbit/s, 5 ms"),
    pytest.param(25e6, 0.02, id="200 Mbit/s, 20 ms"),
    pytest.param(12.5e6, 0.05, id="100 Mbit/s, 50 ms"),
    pytest.param(2.5e6, 0.15, id="20 Mbit/s, 150 ms"),
    pytest.param(125e6, 0.08, id="1 Gbit/s, 80 ms"),
]


@pytest.mark.parametrize(("rate", "delay"), LINKS)
@pytest.mark.parametrize("mood", [ALONE, EXPECTING], ids=["alone", "expecting"])
def test_fill_uses_the_link(rate: float, delay: float, mood: Mood) -> None:
    link = Link(rate, delay)
    Node(link, mood=mood)
    link.run(4)
    before = link.carried
    link.run(14)
    assert (link.carried - before) / 10 > (0.98 if mood is ALONE else 0.88) * rate


@pytest.mark.parametrize(("rate", "delay"), LINKS)
def test_a_reader_hardly_notices_fill(rate: float, delay: float) -> None:
    def ninety_ninth(*, fill: bool) -> float:
        link = Link(rate, delay)
        node = Node(link, fill=fill, mood=EXPECTING)
        node.read_after(3, random.Random(7))
        link.run(60)
        return sorted(node.stalls)[len(node.stalls) * 99 // 100]

    # Two segments may have been asked for just before.
    queued = 2 * SMALLEST_SEGMENT / rate
    assert ninety_ninth(fill=True) <= 1.2 * ninety_ninth(fill=False) + queued


@pytest.mark.parametrize(("rate", "delay"), LINKS)
def test_beside_a_reader_fill_uses_what_is_left(rate: float, delay: float) -> None:
    link = Link(rate, delay)
    node = Node(link, mood=EXPECTING)
    node.read_after(3, random.Random(7))
    link.run(20)
    assert link.carried / 20 > 0.7 * rate


def test_on_a_short_link_fill_asks_for_much_at_a_time() -> None:
    link = Link(125e6, 0.0005)
    node = Node(link)
    link.run(4)
    carried, requests = link.carried, node.requests
    link.run(14)
    assert (link.carried - carried) / (node.requests - requests) > 2e6
    assert node.pacing.outstanding < 2.5 * 125e6 * (0.0005 + ALONE.queue)


def test_more_connections_where_each_is_slow() -> None:
    link = Link(125e6, 0.02, connection_rate=12e6)
    node = Node(link)
    link.run(60)
    before = link.carried
    link.run(70)
    assert node.most_runs > 2 * FIRST_FAN
    assert (link.carried - before) / 10 > 0.7 * 125e6


def test_no_more_connections_than_help() -> None:
    link = Link(25e6, 0.02)
    node = Node(link)
    link.run(60)
    assert node.pacing.fan == FIRST_FAN


def test_a_link_that_became_slower_is_noticed() -> None:
    link = Link(125e6, 0.02)
    node = Node(link)
    link.run(10)
    link._rate = 12.5e6
    link.run(60)
    assert node.pacing.rate < 1.2 * 12.5e6
    assert node.pacing.outstanding < 12.5e6


def test_a_registry_that_complains_is_asked_for_less_and_then_for_more_again() -> None:
    pacing = Pacing()
    window, fan = pacing.window(ALONE), pacing.fan
    for _ in range(3):
        pacing.begin(0, 9).ended(0, failed=True)
    assert pacing.window(ALONE) < window / 2
    assert pacing.fan < fan
    for _ in range(20):
        exchange = pacing.begin(1, 9)
        exchange.answered(1)
        exchange.received(1, 9)
        exchange.ended(1)
    assert (pacing.window(ALONE), pacing.fan) == (window, fan)


def test_a_registry_that_says_so_is_left_alone() -> None:
    pacing = Pacing()
    pacing.begin(10, 9).ended(10, failed=True, retry_after=7)
    assert not pacing.may_begin(ALONE, 16.9)
    assert pacing.may_begin(ALONE, 17)


def test_a_server_that_answers_late_is_overloaded() -> None:
    link = Link(25e6, 0.02)
    node = Node(link)
    link.run(5)
    window = node.pacing.window(ALONE)
    exchange = node.pacing.begin(link.now, 9)
    exchange.answered(link.now + 2)
    assert node.pacing.window(ALONE) < window


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["begin", "answered", "received", "ended", "failed"]),
            st.floats(0, 30),
            st.integers(1, 40 << 20),
        ),
        max_size=60,
    )
)
def test_whatever_happens_the_bounds_hold(steps: list[tuple[str, float, int]]) -> None:
    pacing, now = Pacing(), 0.0
    running: list[Exchange] = []
    for what, seconds, size in steps:
        now += seconds
        if what == "begin":
            running.append(pacing.begin(now, size))
        elif running and what == "answered":
            running[size % len(running)].answered(now)
        elif running and what == "received":
            running[size % len(running)].received(now, size)
        elif running:
            running.pop(size % len(running)).ended(now, failed=what == "failed")
        assert pacing.outstanding == sum(exchange.left for exchange in running)
        assert 1 <= pacing.fan <= LARGEST_FAN
        windows = [pacing.window(mood) for mood in (BLOCKED, EXPECTING, ALONE)]
        assert all(0 <= one <= LARGEST_WINDOW for one in windows)
        assert all(lower <= higher for lower, higher in pairwise(windows))
        for mood in (EXPECTING, ALONE):
            assert SMALLEST_SEGMENT <= pacing.segment(mood) <= LARGEST_SEGMENT
            assert running or pacing.may_begin(mood, max(now, pacing.rests_until))
