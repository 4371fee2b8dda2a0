"""How a run is carried out: requests, giving way, retries, and what to do about bad bytes."""

from __future__ import annotations

import logging
import math
import random
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError, FormatError
from snapshotter.fetch.errors import FetchError
from snapshotter.fetch.wants import Priority
from snapshotter.registry.errors import NetworkError, ProtocolError, RegistryError
from snapshotter.registry.retry import RetryPolicy

if TYPE_CHECKING:
    from index.errors import IntegrityError
    from snapshotter.fetch.run import Arrival, Run
    from snapshotter.fetch.stats import FetchStats
    from snapshotter.fetch.wants import Want, WantTable

log = logging.getLogger(__name__)

BATCH = 256 << 10
"""Compressed bytes that are decoded together when nobody is blocked: a hop to a worker thread
and back costs 110 us."""

DRAIN = 256 << 10
"""Compressed bytes of a body that are read to the end although nobody wants them, so that the
connection can be used again. A new one costs two or three round trips."""

QUIET = 1.0
"""Seconds without a blocked read after which fill may use the link as if it were alone. A start
reads, computes, and reads again: what fill has asked for meanwhile lies in the way of the next
read. With four requests of 2 MiB at 200 Mbit/s each read waited 0.3 s for them; with one of
256 KiB it waits 10 ms. A guess at the pauses of a start."""

FOR_READERS = RetryPolicy(attempts=1 << 30, base=0.2)
"""While somebody is blocked the reader's own deadline decides when to give up."""

HAND_OVER_AFTER = 3
"""Failures in a row after which another image that wants the same chunks lends its source."""

IN_BACKGROUND = RetryPolicy(attempts=5)


class Transfer:
    """Carries out runs. `notice` and `nudge` tell runs that wait that something has changed."""

    def __init__(
        self,
        wants: WantTable,
        stats: FetchStats,
        *,
        source_timeout: float,
        give_way: float,
        decoders: trio.CapacityLimiter,
    ) -> None:
        self._wants = wants
        self._stats = stats
        self._source_timeout = source_timeout
        self._give_way_bound = give_way
        self._decoders = decoders
        self._paused = trio.lowlevel.ParkingLot()
        self._quiet_at = -math.inf
        self._fill_requests = 0
        self._rng = random.Random()  # noqa: S311  (spreads load, guards nothing)

    def expect_reads(self) -> None:
        """Somebody is blocked, or is about to read: fill is cautious for a while."""
        self._quiet_at = trio.current_time() + QUIET

    @property
    def cautious(self) -> bool:
        """Whether fill keeps to one short request at a time, for a read may come any moment."""
        return trio.current_time() < self._quiet_at

    def notice(self) -> None:
        """Call whenever somebody may not be blocked any more."""
        if not self._wants.count(Priority.BLOCKED):
            self._paused.unpark_all()

    def nudge(self, run: Run) -> None:
        """Somebody is blocked on a chunk of this run now: neither pause nor back off."""
        run.nudged = True
        self._paused.unpark_all()

    async def carry_out(self, run: Run) -> None:
        """Bring all chunks of a run; those that cannot be brought fail for the run's image. What
        is left in `run.wants` is for others to bring."""
        try:
            await self._requests(run)
        except FirstByteError as error:
            log.warning("%s: %s", run.origin.table, error)
            self._fail(run, error)
        except Exception as error:
            log.exception("fetching %s failed in an unforeseen way", run.origin.table)
            problem = FetchError(f"fetching {run.origin.table} failed in an unforeseen way")
            problem.__cause__ = error
            self._fail(run, problem)

    def _fail(self, run: Run, error: FirstByteError) -> None:
        for want in list(run.wants.values()):
            self._wants.reject(want, run.origin, error)

    # --- requests and retries ---

    async def _requests(self, run: Run) -> None:
        failures = 0
        while run.wants or run.expensive_to_leave:
            before = run.position
            try:
                await self._request(run)
            except RegistryError as error:
                if not run.wants and not run.expensive_to_leave:
                    return  # it was only finishing what it had begun
                failures = failures + 1 if run.position == before else 1
                blocked = run.urgencies[Priority.BLOCKED] > 0
                policy = FOR_READERS if blocked else IN_BACKGROUND
                delay = policy.delay(failures, error, rng=self._rng)
                if delay is None:
                    raise
                log.info("%s: %s; trying again in %.1f s", run.origin.table, error, delay)
                self._stats.retries += 1
                await self._back_off(run, delay, told=getattr(error, "retry_after", None))
                if failures >= HAND_OVER_AFTER and self._wants.hand_over(run):
                    return

    async def _back_off(self, run: Run, delay: float, *, told: float | None) -> None:
        """Wait before the next request; a new reader need not, unless the registry said so."""
        run.nudged = False
        with trio.move_on_after(delay):
            while told is not None or not run.nudged:
                await self._paused.park()

    async def give_way(self, run: Run | None = None) -> None:
        """Pause while somebody is blocked and `run` brings nothing more urgent than fill.

        Bounded, so that fill gets on although somebody is blocked all the time.
        """
        if not self._must_give_way(run):
            return
        with trio.move_on_after(self._give_way_bound):
            while self._must_give_way(run):
                await self._paused.park()

    def _must_give_way(self, run: Run | None) -> bool:
        fill = run is None or run.priority is Priority.FILL
        return fill and self._wants.count(Priority.BLOCKED) > 0

    async def _take_turn(self, run: Run) -> None:
        """Wait until a run of fill may make a request; the others need not wait."""
        await self.give_way(run)
        while run.priority is Priority.FILL and self.cautious and self._fill_requests:
            with trio.move_on_at(self._quiet_at):
                await self._paused.park()
            await self.give_way(run)

    async def _request(self, run: Run) -> None:
        """One request, decoded as it comes. Returns when its body is of no more use.

        Raises what the source raises, NetworkError when it says nothing for too long or ends
        too early, ProtocolError when it sends too much.
        """
        await self._take_turn(run)
        end = run.request_end(cautious=self.cautious)
        if end <= run.position:
            raise FormatError(f"{run.origin.table} has no bytes for {run.span}")
        self._stats.requests[run.priority] += 1
        if run.priority is not Priority.FILL:
            await self._receive(run, end)
            return
        self._fill_requests += 1
        try:
            await self._receive(run, end)
        finally:
            self._fill_requests -= 1
            self.notice()

    async def _receive(self, run: Run, end: int) -> None:
        with trio.CancelScope() as patience:
            self._expect_byte(patience)
            async with run.origin.source.open_range(run.position, end) as body:
                async for piece in body:
                    self._stats.received_bytes[run.priority] += len(piece)
                    run.receive(piece)
                    if run.position > end:
                        raise ProtocolError(f"more of {run.origin.table} came than was asked for")
                    if self._due(run, end):
                        patience.deadline = math.inf  # it is not the source that is slow now
                        if not await self._decode(run):
                            self._expect_byte(patience)
                            return
                    if not run.wants and not run.expensive_to_leave:
                        if end - run.position > DRAIN:
                            return
                    elif self._must_give_way(run):
                        patience.deadline = math.inf
                        await self.give_way(run)
                    self._expect_byte(patience)
        if patience.cancelled_caught:
            raise NetworkError(
                f"no byte of {run.origin.table} has come for {self._source_timeout:g} seconds"
            )
        if run.position < end:
            raise NetworkError(f"a range of {run.origin.table} ended too early")

    def _expect_byte(self, patience: trio.CancelScope) -> None:
        patience.deadline = trio.current_time() + self._source_timeout

    # --- decoding ---

    def _due(self, run: Run, end: int) -> bool:
        """Whether to decode now, with `end` the end of the request."""
        if run.position == end or run.buffered >= BATCH:
            return True
        return run.urgencies[Priority.BLOCKED] > 0 and run.worth_decoding()

    async def _decode(self, run: Run) -> bool:
        """Decode what has come. False if the run has to start anew, with another request."""
        remember = run.priority is not Priority.FILL
        batch = await trio.to_thread.run_sync(run.advance, remember, limiter=self._decoders)
        run.passed()
        bad = [arrival.chunk for arrival in batch.arrivals if not self._land(run, arrival)]
        self.notice()
        if batch.error is not None:
            self._recover(run, batch.error)
            return False
        if bad:
            run.restart(min(bad), run.last_chunk)
            return False
        return True

    def _land(self, run: Run, arrival: Arrival) -> bool:
        """Hand a chunk to those who wait for it, whichever run was to bring it. False if this run
        has to fetch it anew."""
        want = run.layer.wants.get(arrival.chunk)
        if want is None:
            return True
        if arrival.damage is not None:
            return want.run is not run or self._tolerate(run, want, arrival.damage)
        if arrival.unsaved is None or arrival.data is not None:
            self._wants.arrive(want, arrival.data, arrival.unsaved)
        elif want.run is run:  # wanted since it was cut, and not kept
            self._wants.give_back(want)
        return True

    def _tolerate(self, run: Run, want: Want, damage: IntegrityError) -> bool:
        """False the first time that a chunk has not its digest, then those who wait are told."""
        self._stats.damaged += 1
        run.origin.source.doubt()
        log.error("%s, from %s", damage, run.span)
        if want.refetched:
            self._wants.reject(want, run.origin, damage)
            return True
        want.refetched = True
        return False

    def _recover(self, run: Run, error: FirstByteError) -> None:
        """What to do when the bytes of a span cannot be decoded: try once more, then fail those
        chunks for which there is no later point to start from."""
        self._stats.damaged += 1
        run.origin.source.doubt()
        log.error("%s: %s, in %s", run.origin.table, error, run.span)
        run.decode_failures += 1
        if run.decode_failures == 1 and run.wants:
            run.restart(min(run.wants), run.last_chunk)
            return
        for chunk, want in list(run.wants.items()):
            if run.reached(chunk):
                self._wants.reject(want, run.origin, error)
            else:
                self._wants.give_back(want)
        run.stop_before(run.next_chunk)
