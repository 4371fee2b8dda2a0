"""Fill waits for a pull and for a start, for one that only computes as well, and never for ever."""

from __future__ import annotations

import math
import os
import time

import pytest
import trio
import trio.testing

from snapshotter.fetch import hold as holds
from snapshotter.fetch import processors
from snapshotter.fetch.hold import Hold
from snapshotter.fetch.processors import Processors


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How many processors are idle, until the list is changed."""
    idle = [2.0]
    monkeypatch.setattr(Processors, "spare", lambda _: idle[0])
    return idle


async def _until(hold: Hold) -> float:
    """Seconds for which it holds."""
    began = trio.current_time()
    while hold.holds():  # noqa: ASYNC110  (it ends by itself)
        await trio.sleep_until(hold.until)
    return round(trio.current_time() - began, 6)


async def test_a_pull_whose_next_step_does_not_come_is_given_up(
    autojump_clock: trio.testing.MockClock, spare: list[float]
) -> None:
    hold = Hold()
    assert not hold.holds()
    hold.pull()
    assert await _until(hold) == holds.HELD_BACK


async def test_a_start_is_over_when_it_neither_reads_nor_computes(
    autojump_clock: trio.testing.MockClock, spare: list[float]
) -> None:
    hold = Hold()
    hold.expect_start()
    assert await _until(hold) == holds.BEFORE_START
    hold.note_touch()
    assert await _until(hold) == holds.SETTLED


async def test_while_it_computes_it_goes_on_but_not_for_ever(
    autojump_clock: trio.testing.MockClock, spare: list[float]
) -> None:
    spare[0] = holds.SPARE / 2
    hold = Hold()
    hold.expect_start()
    assert await _until(hold) == holds.LONGEST_COMPUTING
    hold.note_touch()
    assert await _until(hold) == holds.LONGEST_COMPUTING


async def test_what_computes_later_is_no_start(
    autojump_clock: trio.testing.MockClock, spare: list[float]
) -> None:
    hold = Hold()
    hold.expect_start()
    await _until(hold)
    spare[0] = 0
    assert not hold.holds()


async def test_a_start_that_reads_on_and_on_is_not_waited_for(
    autojump_clock: trio.testing.MockClock, spare: list[float]
) -> None:
    spare[0] = 0
    hold = Hold()
    hold.expect_start()
    began = trio.current_time()
    while hold.holds():
        hold.note_touch()
        await trio.sleep(0.1)
    assert trio.current_time() - began == pytest.approx(holds.LONGEST_START, abs=0.2)


async def test_a_pull_that_is_over_is_not_waited_for(
    autojump_clock: trio.testing.MockClock, spare: list[float]
) -> None:
    hold = Hold()
    hold.expect_start()
    hold.release()
    assert not hold.holds()


def test_no_more_processors_are_idle_than_there_are() -> None:
    looked = Processors()
    time.sleep(0.1)
    assert 0 <= looked.spare() <= (os.cpu_count() or 1) + 0.5  # it is counted in ticks of 10 ms


def test_where_nobody_counts_all_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "_idle_seconds", lambda: math.inf)
    assert Processors().spare() == math.inf
