"""First touches are recorded until a start has settled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from index.profile import MAX_TOUCHES
from index.tables import CHUNK_SIZE, Codec
from snapshotter.fetch.startup import LONGEST, QUIET, StartupRecorder
from tests.support.blobs import make_layer, sample_bytes

if TYPE_CHECKING:
    from trio.testing import MockClock

    from tests.support.fetching import Node


def touched(recorder: StartupRecorder) -> list[tuple[int, int]]:
    return [touch.place for touch in recorder.touches]


async def test_each_chunk_is_recorded_once_with_its_time(autojump_clock: MockClock) -> None:
    recorder = StartupRecorder()
    await trio.sleep(100)  # nobody reads yet
    recorder.touch(1, 5, 6)
    await trio.sleep(0.25)
    recorder.touch(0, 5, 5)
    recorder.touch(1, 6, 7)
    assert [tuple(touch) for touch in recorder.touches] == [
        (1, 5, 0, 1),
        (1, 6, 0, 1),
        (0, 5, 250, 1),
        (1, 7, 250, 1),
    ]


async def test_a_start_settles_when_nothing_new_is_touched(autojump_clock: MockClock) -> None:
    recorder = StartupRecorder()
    began = trio.current_time()

    async def start() -> None:
        await trio.sleep(3 * LONGEST)  # the image is pulled long before it is started
        for chunk in range(4):
            recorder.touch(0, chunk, chunk)
            await trio.sleep(QUIET - 1)
            recorder.touch(0, 0, 0)  # nothing new

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        await recorder.settled()
        assert trio.current_time() - began == 3 * LONGEST + 3 * (QUIET - 1) + QUIET
    assert len(recorder.touches) == 4


async def test_who_goes_on_touching_is_at_work(autojump_clock: MockClock) -> None:
    recorder = StartupRecorder()

    async def work() -> None:
        for chunk in range(1000):
            recorder.touch(0, chunk, chunk)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await recorder.settled()
        recorder.stop()
        nursery.cancel_scope.cancel()
    assert len(recorder.touches) in range(round(LONGEST), round(LONGEST) + 2)


async def test_the_number_of_touches_is_bounded(autojump_clock: MockClock) -> None:
    recorder = StartupRecorder()
    recorder.touch(0, 0, 2 * MAX_TOUCHES)
    await recorder.settled()
    assert len(recorder.touches) == MAX_TOUCHES


async def test_nothing_is_recorded_after_the_stop(autojump_clock: MockClock) -> None:
    recorder = StartupRecorder()
    recorder.touch(0, 1, 1)
    recorder.stop()
    recorder.touch(0, 2, 2)
    assert touched(recorder) == [(0, 1)]


async def test_reads_of_another_image_are_noted_without_being_served(node: Node) -> None:
    lazy, source = node.mount(make_layer(sample_bytes(4 * CHUNK_SIZE), Codec.PLAIN))
    recorder = StartupRecorder()
    lazy._recorder, lazy._number = recorder, 2
    lazy.note(CHUNK_SIZE + 5, CHUNK_SIZE)
    assert touched(recorder) == [(2, 1), (2, 2)]
    assert source.requests == []
    lazy.close()
