"""Who decides which bytes to fetch next: one scheduler for the node, strict classes.

A read that misses the store *wants* chunks. Wanted chunks that lie together become a *run*, as
soon as a connection is free for their class; a run that will pass a wanted chunk anyway brings
it. So every chunk is in flight once, however many containers read it.

Background fill gives way: while anybody is blocked, runs that bring nothing more urgent than fill
neither start a request nor read on, but for what the link holds beside the reader's requests, and
one piece each `give_way` seconds. For a while after that it keeps the queue before the link short,
because the next read of a start is not far. `pacing` knows how much that is.
"""

from __future__ import annotations

import logging
import math
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError
from snapshotter.fetch.decoding import SuspendedDecodings
from snapshotter.fetch.errors import FetchError
from snapshotter.fetch.plan import plan_run
from snapshotter.fetch.stats import FetchStats
from snapshotter.fetch.transfer import Transfer
from snapshotter.fetch.wants import MOST_URGENT_FIRST, Priority, Waiter, Want, WantTable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from snapshotter.fetch.pacing import Exchange
    from snapshotter.fetch.run import Run
    from snapshotter.fetch.source import Origin
    from snapshotter.fetch.wants import LayerWants
    from snapshotter.store.errors import StoreError

log = logging.getLogger(__name__)

RESERVED: Mapping[Priority, int] = {
    Priority.FILL: 1,
    Priority.STARTUP: 3,
    Priority.READAHEAD: 5,
    Priority.BLOCKED: 9,
}
"""A run starts while fewer run, of whatever class, than fill has requests, and so many more: each
class leaves some connections to the more urgent ones. Fill has one that waits for its turn."""

MAX_ADVICE = 4096
"""Chunks of one class (1 GiB) that may be wanted without anybody waiting; more is ignored."""

MAX_READERS = 1024
"""Reads that may be blocked at once; others wait until one is done."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    `read`: a blocked read fails after so long without any progress on its way. `source`: a
    request counts as failed after so long without a byte. `give_way`: fill reads a piece after so
    long, even if somebody is blocked all the time.
    """

    read: float = 120
    source: float = 30
    give_way: float = 1


class Scheduler:
    """Made by `open_scheduler`. All methods are for the trio thread."""

    def __init__(self, nursery: trio.Nursery, patience: Patience) -> None:
        self.stats = FetchStats()
        self.wants = WantTable()
        self._nursery = nursery
        self._patience = patience
        self._runs: set[Run] = set()
        self._suspended = SuspendedDecodings()
        self._workers = 0
        self._readers = trio.Semaphore(MAX_READERS)
        self._transfer = Transfer(
            self.wants,
            self.stats,
            source_timeout=patience.source,
            give_way=patience.give_way,
            decoders=os.cpu_count() or 1,
        )
        self._closed = False

    # --- what others ask for ---

    async def read(self, origin: Origin, chunks: Iterable[int]) -> dict[int, bytes]:
        """Bring chunks that a reader is blocked on, and return their verified bytes.

        Chunks that the store has meanwhile are left out. Raises FetchError.
        """
        try:
            self._readers.acquire_nowait()
        except trio.WouldBlock:
            await self._readers.acquire()
        try:
            self.expect_reads()
            waiter = self._want(origin, chunks, Priority.BLOCKED)
            if waiter.pending:
                await self._wait(waiter)
            return waiter.arrived
        finally:
            self.expect_reads()  # the next one of the same start
            self._readers.release()

    async def fill(self, origin: Origin, chunks: Iterable[int]) -> None:
        """Bring chunks into the store, when nothing else is to be done, however long that takes.

        Raises FetchError, also if the disk does not take them.
        """
        await self._bring(origin, chunks, Priority.FILL)

    async def prepare(self, origin: Origin, chunks: Iterable[int]) -> None:
        """As `fill`, but before anything that no start needs."""
        await self._bring(origin, chunks, Priority.STARTUP)

    async def _bring(self, origin: Origin, chunks: Iterable[int], priority: Priority) -> None:
        waiter = self._want(origin, chunks, priority)
        if waiter.pending:
            await self._wait(waiter)

    def expect_reads(self) -> None:
        """A start is going on, or about to begin: fill leaves most of the link to it."""
        self._transfer.expect_reads()

    def hold_fill(self) -> None:
        """A pull goes on, whose next step is near: nothing is done in the background for a moment,
        or until `release_fill`."""
        self._transfer.hold.pull()

    def release_fill(self) -> None:
        """The pull is over, and no start will follow."""
        self.expect_reads()
        self._transfer.hold.release()
        self._transfer.notice()

    def expect_start(self) -> None:
        """The pull is over, and a start is about to begin. Fill would only take the processors from
        it, and the link from what it waits for: it waits until the start has settled. If none
        comes, nobody reads."""
        self._transfer.hold.expect_start()

    def note_touch(self) -> None:
        """A start goes on: chunks were read for the first time."""
        self._transfer.hold.note_touch()

    async def give_way(self) -> None:
        """Pause background work, briefly, while somebody is blocked."""
        await self._transfer.give_way()

    def advise(self, origin: Origin, chunks: Iterable[int], priority: Priority) -> None:
        """Chunks that will probably be read. Nobody is told whether they came."""
        for chunk in chunks:
            if self._closed or self.wants.count(priority) >= MAX_ADVICE:
                break
            if not origin.stored.has(chunk):
                self._place(self.wants.advise(origin, chunk, priority))
        self._wake()

    def replay(self, touches: Iterable[tuple[Origin, int]]) -> None:
        """Bring the chunks that earlier starts touched, in that order."""
        for origin, chunk in touches:
            self.advise(origin, (chunk,), Priority.STARTUP)

    def land(self, layer: LayerWants, chunk: int, data: bytes, problem: StoreError | None) -> None:
        """A chunk has come in a startup pack, verified; stored, too, unless there is a problem."""
        want = layer.wants.get(chunk)
        if want is not None:
            self.wants.arrive(want, data, problem)
            self._transfer.notice()

    def requeue(self, wants: Iterable[Want]) -> None:
        """What a startup pack was to bring is to be fetched from its layer."""
        for want in wants:
            self.wants.give_back(want)
        self._wake()

    def begin_exchange(self, site: str, size: int) -> Exchange:
        """A request of `size` bytes that is not of a run: fill leaves the link to it, too."""
        return self._transfer.pacing(site).begin(trio.current_time(), size)

    def notice(self) -> None:
        """Call when less of such a request is outstanding."""
        self._transfer.notice()

    def detach(self, origin: Origin) -> None:
        """An image goes away: its readers get FetchError, runs that use its source end.

        What others want of the same content is fetched from theirs.
        """
        self.wants.withdraw(origin, FetchError(f"{origin.table} was unmounted"))
        for run in self._runs:
            if run.origin is origin:
                run.detached = True
                run.scope.cancel()
        self._suspended.discard(origin.table)
        self._transfer.notice()

    # --- waiting ---

    def _want(self, origin: Origin, chunks: Iterable[int], priority: Priority) -> Waiter:
        if self._closed:
            raise FetchError(f"{origin.table} cannot be fetched: FirstByte is shutting down")
        waiter = Waiter(origin, priority)
        for chunk in chunks:
            if not origin.stored.has(chunk):
                self._place(self.wants.want(waiter, chunk))
        self._wake()
        return waiter

    async def _wait(self, waiter: Waiter) -> None:
        try:
            if waiter.priority is Priority.BLOCKED:
                await self._wait_patiently(waiter)
            else:
                await waiter.done.wait()
        finally:
            if waiter.pending:
                self._abandon(waiter)
        if waiter.error is not None:
            message = f"{waiter.origin.table} cannot be read: {waiter.error}"
            raise FetchError(message) from waiter.error

    async def _wait_patiently(self, waiter: Waiter) -> None:
        """A stream with one seek point may take long to pass a chunk, so progress counts."""
        patience = self._patience.read
        deadline = trio.current_time() + patience
        while deadline > trio.current_time():
            with trio.move_on_at(deadline):
                await waiter.done.wait()
                return
            runs = [want.run for want in waiter.pending.values() if want.run is not None]
            deadline = max((run.progressed_at + patience for run in runs), default=-math.inf)
        raise FetchError(
            f"{waiter.origin.table} cannot be read: no byte has come for {patience:g} seconds",
            hint="is the registry reachable?",
        )

    def _abandon(self, waiter: Waiter) -> None:
        for run in self.wants.leave(waiter):
            if not run.expensive_to_leave:
                run.scope.cancel()
        self._transfer.notice()

    # --- who brings what ---

    def _place(self, want: Want) -> None:
        """Let a run in flight bring the chunk, unless one of its own would be much sooner."""
        blocked = want.priority is Priority.BLOCKED
        run = want.run
        if run is not None:
            if not blocked:
                if want.priority is not Priority.FILL:
                    self._transfer.hasten(run)
                return
            if run.ahead(want.chunk) > self._transfer.near(run):
                for left in run.leave(want.chunk):
                    self.wants.give_back(left)
            else:
                self._transfer.nudge(run)
            return
        able = [
            run
            for run in want.layer.runs
            if not run.scope.cancel_called
            and run.covers(want.chunk)
            and (not blocked or run.ahead(want.chunk) <= self._transfer.near(run))
        ]
        if able:
            run = min(able, key=lambda run: run.ahead(want.chunk))
            run.reach(want.chunk)
            self.wants.take(want, run)
            if blocked:
                self._transfer.nudge(run)
            elif want.priority is not Priority.FILL:
                self._transfer.hasten(run)

    def _wake(self) -> None:
        """See to it that somebody looks at the queues."""
        if self._closed or not any(self.wants.queues.values()):
            return
        if self._workers < self._limit(Priority.BLOCKED):
            self._workers += 1
            self._nursery.start_soon(self._work)
        elif self.wants.queues[Priority.BLOCKED]:
            for run in self._runs:
                if not run.wants:  # only finishing what it has begun
                    run.scope.cancel()
                    break

    async def _work(self) -> None:
        """Execute runs until there is none that may start."""
        try:
            while (run := self._next_run()) is not None:
                self._wake()
                await self._execute(run)
        finally:
            self._workers -= 1

    def _limit(self, priority: Priority) -> int:
        return self._transfer.fan + RESERVED[priority]

    def _next_run(self) -> Run | None:
        for priority in MOST_URGENT_FIRST:
            queue = self.wants.queues[priority]
            while queue and len(self._runs) < self._limit(priority):
                want = next(iter(queue))
                self._place(want)  # what is in flight may have come near it meanwhile
                if want.run is not None:
                    continue
                try:
                    run = plan_run(self.wants, want, self._suspended)
                except FirstByteError as error:
                    self.wants.fail(want, error)
                    continue
                self._runs.add(run)
                return run
        return None

    async def _execute(self, run: Run) -> None:
        """Bring what a run was made for; whatever it leaves undone is wanted again."""
        stored = run.origin.stored
        stored.retain()
        run.layer.runs.append(run)
        self._take_over(run)
        try:
            with run.scope:
                await self._transfer.carry_out(run)
        finally:
            complete = stored.complete
            stored.close()
            if complete or run.detached:
                self._suspended.discard(run.origin.table)
            else:
                self._suspended.keep(run.origin.table, run.decoding)
            run.layer.runs.remove(run)
            self._runs.remove(run)
            for want in list(run.wants.values()):
                self.wants.give_back(want)
            self.wants.discard_idle(run.layer)
            self._transfer.notice()

    def _take_over(self, run: Run) -> None:
        """What others that are behind a new run were to bring from where it begins would be fetched
        twice."""
        left = [
            want for other in self._runs if other.layer is run.layer for want in other.leave_to(run)
        ]
        for want in left:
            self.wants.give_back(want)
            self._place(want)
        self._wake()

    def close(self) -> None:
        """Tell everybody who waits that nothing will come any more."""
        self._closed = True
        error = FetchError("FirstByte is shutting down")
        for layer in self.wants.layers():
            for want in list(layer.wants.values()):
                if want.priority is not None:
                    self.wants.fail(want, error)


@asynccontextmanager
async def open_scheduler(patience: Patience = Patience()) -> AsyncIterator[Scheduler]:
    """A scheduler that works until the block ends; who still waits then gets FetchError."""
    async with trio.open_nursery() as nursery:
        scheduler = Scheduler(nursery, patience)
        try:
            yield scheduler
        finally:
            scheduler.close()
            nursery.cancel_scope.cancel()
