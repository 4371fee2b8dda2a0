"""How a run is carried out: requests, giving way, retries, and what to do about bad bytes."""

from __future__ import annotations

import logging
import math
import random
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError, FormatError
from snapshotter.fetch.errors import FetchError
from snapshotter.fetch.hold import Hold
from snapshotter.fetch.pacing import ALONE, BLOCKED, EXPECTING, FIRST_FAN, Mood, Pacing
from snapshotter.fetch.run import GUESS_MARGIN
from snapshotter.fetch.trace import traced
from snapshotter.fetch.wants import Priority
from snapshotter.registry.errors import NetworkError, ProtocolError, RegistryError
from snapshotter.registry.retry import RetryPolicy

if TYPE_CHECKING:
    from index.errors import IntegrityError
    from snapshotter.fetch.pacing import Exchange
    from snapshotter.fetch.run import Arrival, Run
    from snapshotter.fetch.stats import FetchStats
    from snapshotter.fetch.wants import Carrier, Want, WantTable

log = logging.getLogger(__name__)

BATCH = 256 << 10
"""Compressed bytes that are decoded together when nobody is blocked: a hop to a worker thread
and back costs 110 us."""

FILL_BATCH = 1 << 20
"""The same while nobody has been blocked for a while: threads take turns in Python, too, and wait
for each other."""

DRAIN = 0.01
"""Seconds, and a round trip, for which a body is read on although nobody wants it, so that the
connection can be used again. A new one costs two or three round trips. What was asked for in case
that a guess is wrong is read in any case, or it would be asked for again."""

NEAR = 512 << 10
OVERHEAD = 0.005
"""How far a run in flight may be from a chunk that somebody is blocked on and still be the one to
bring it: NEAR compressed bytes, or what comes while a request of its own makes its round trip, and
OVERHEAD seconds for all that is done for one. Less makes runs that stop in the middle of a
response, whose rest is lost."""

QUIET = 2.0
"""Seconds without a blocked read after which fill may use the link as if it were alone. A start
reads, computes, and reads again: what fill has asked for meanwhile lies in the way of the next
read. With four requests of 2 MiB at 200 Mbit/s each read waited 0.3 s for them. A guess at the
pauses of a start; what fill loses meanwhile is little (`pacing.EXPECTING`)."""

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
        decoders: int,
    ) -> None:
        self._wants = wants
        self._stats = stats
        self._source_timeout = source_timeout
        self._give_way_bound = give_way
        # Of their own, so that a reader's bytes need not wait for a thread.
        self._decoders = trio.CapacityLimiter(decoders)
        self._fill_decoders = trio.CapacityLimiter(decoders)
        self._paused = trio.lowlevel.ParkingLot()
        self._turns = trio.lowlevel.ParkingLot()
        self._in_turn: set[Run] = set()
        self._quiet_at = -math.inf
        self.hold = Hold()
        self._pacings: dict[str, Pacing] = {}
        self._rng = random.Random()  # noqa: S311  (spreads load, guards nothing)

    def expect_reads(self) -> None:
        """Somebody is blocked, or is about to read: fill keeps the queue short for a while."""
        self._quiet_at = trio.current_time() + QUIET

    @property
    def fan(self) -> int:
        """Requests of fill that are worth making side by side."""
        return max((pacing.fan for pacing in self._pacings.values()), default=FIRST_FAN)

    def near(self, run: Carrier) -> int:
        """Compressed bytes that come sooner in a run that is in flight than with a request."""
        return max(NEAR, self._pacing(run).carries(OVERHEAD))

    def pacing(self, site: str) -> Pacing:
        """What is known of the way to one registry."""
        return self._pacings.setdefault(site, Pacing())

    def _pacing(self, run: Carrier) -> Pacing:
        return self.pacing(run.origin.source.site)

    @property
    def _mood(self) -> Mood:
        if self._wants.count(Priority.BLOCKED):
            return BLOCKED
        return EXPECTING if trio.current_time() < self._quiet_at else ALONE

    def notice(self) -> None:
        """Call whenever fill may go on: nobody is blocked any more, or less is outstanding."""
        turns = bool(self._turns) and not self.hold.holds()
        if (self._paused or turns) and (
            not self._wants.count(Priority.BLOCKED)
            or any(one.holds and one.has_room(BLOCKED) for one in self._pacings.values())
        ):
            self._paused.unpark_all()
            if turns:
                self._turns.unpark_all()

    def nudge(self, run: Carrier) -> None:
        """Somebody is blocked on a chunk of this run now: neither pause nor back off."""
        run.nudged = True
        self._paused.unpark_all()
        self.hasten(run)

    def hasten(self, run: Carrier) -> None:
        """A run is to bring more than fill now: it need not wait for its turn."""
        if run in self._in_turn:
            self._turns.unpark_all()

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
        finally:
            self._paused.unpark_all()

    def _fail(self, run: Run, error: FirstByteError) -> None:
        for want in list(run.wants.values()):
            self._wants.reject(want, run.origin, error)

    # --- requests and retries ---

    async def _requests(self, run: Run) -> None:
        failures = 0
        while True:
            if run.can_advance():
                await self._decode(run)
            if not run.wants and not run.expensive_to_leave:
                return
            if await self._join(run):
                continue
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

    async def _join(self, run: Run) -> bool:
        """Wait while another run is about to bring the end of the next chunk. Whether it has.

        That one is hurried, if it is less urgent. Who is more urgent than fill waits for it as long
        as fill gives way at most, and then goes on alone.
        """
        bringer: Run | None = None
        deadline = math.inf
        try:
            while run.wants and (found := run.head_bringer()) is not None:
                bringer = found
                now = trio.current_time()
                if run.priority is not Priority.FILL:
                    deadline = min(deadline, now + self._give_way_bound)
                if now >= deadline:
                    return False
                if run.priority > bringer.priority:
                    bringer.awaited = run.priority
                    self.nudge(bringer)
                with trio.move_on_at(deadline):
                    await self._paused.park()
        finally:
            if bringer is not None:
                bringer.awaited = Priority.FILL
        return bringer is not None

    async def _back_off(self, run: Run, delay: float, *, told: float | None) -> None:
        """Wait before the next request; a new reader need not, unless the registry said so."""
        run.nudged = False
        with trio.move_on_after(delay):
            while told is not None or not run.nudged:
                await self._paused.park()

    async def give_way(self) -> None:
        """Pause work in the background while somebody is blocked, or a pull goes on.

        Bounded, so that it gets on although somebody is blocked all the time.
        """
        with trio.move_on_after(self._give_way_bound):
            while True:
                now = trio.current_time()
                if not self._wants.count(Priority.BLOCKED) and not self.hold.holds():
                    break
                await self._wait_for_change(now, self._paused)

    async def _wait_for_change(self, now: float, where: trio.lowlevel.ParkingLot) -> None:
        """Until those who wait there are told, or until the mood changes by itself. `now` is from
        before that was asked for: it may have changed meanwhile."""
        moments = [pacing.rests_until for pacing in self._pacings.values()]
        moments += [self.hold.until, self._quiet_at]
        with trio.move_on_at(min((one for one in moments if one > now), default=math.inf)):
            await where.park()

    async def _take_turn(self, run: Run) -> None:
        """Wait until a run of fill may make a request; the others need not wait."""
        if run.priority is not Priority.FILL:
            return
        pacing = self._pacing(run)
        deadline = trio.current_time() + self._give_way_bound
        self._in_turn.add(run)
        try:
            while run.priority is Priority.FILL:
                now, mood = trio.current_time(), self._mood
                overdue = mood is BLOCKED and now >= max(deadline, pacing.rests_until)
                if not self.hold.holds() and (overdue or pacing.may_begin(mood, now)):
                    return
                with trio.move_on_at(deadline if mood is BLOCKED and now < deadline else math.inf):
                    await self._wait_for_change(now, self._turns)
        finally:
            self._in_turn.discard(run)

    def _must_give_way(self, run: Run) -> bool:
        """Whether more of a run of fill would only be in the way of who is blocked."""
        return (
            run.priority is Priority.FILL
            and self._mood is BLOCKED
            and not self._pacing(run).has_room(BLOCKED)
        )

    async def _pause(self, run: Run) -> None:
        with trio.move_on_after(self._give_way_bound):
            while self._must_give_way(run):
                await self._paused.park()

    async def _request(self, run: Run) -> None:
        """One request, decoded as it comes. Returns when its body is of no more use.

        Raises what the source raises, NetworkError when it says nothing for too long or ends
        too early, ProtocolError when it sends too much.
        """
        await self._take_turn(run)
        pacing = self._pacing(run)
        end = run.request_end(segment=pacing.segment(self._mood), holds=pacing.holds)
        if end <= run.position:
            raise FormatError(f"{run.origin.table} has no bytes for {run.span}")
        self._stats.requests[run.priority] += 1
        exchange = pacing.begin(trio.current_time(), end - run.position)
        failure: RegistryError | None = None
        try:
            await self._receive(run, end, exchange)
        except RegistryError as error:
            failure = error
            raise
        finally:
            exchange.ended(
                trio.current_time(),
                failed=failure is not None and failure.transient,
                retry_after=getattr(failure, "retry_after", None),
            )
            self.notice()

    async def _receive(self, run: Run, end: int, exchange: Exchange) -> None:
        with traced(run.origin, run.priority) as record, trio.CancelScope() as patience:
            self._expect_byte(patience)
            began = trio.current_time()
            async with run.origin.source.open_range(run.position, end) as body:
                exchange.answered(trio.current_time())
                self._stats.latencies.add(trio.current_time() - began)
                record.answer()
                async for piece in body:
                    self._stats.received_bytes[run.priority] += len(piece)
                    record.size += len(piece)
                    run.receive(piece)
                    exchange.received(trio.current_time(), len(piece))
                    self.notice()
                    if run.position > end:
                        raise ProtocolError(f"more of {run.origin.table} came than was asked for")
                    if self._due(run, end):
                        patience.deadline = math.inf  # it is not the source that is slow now
                        if not await self._decode(run):
                            self._expect_byte(patience)
                            return
                    if not run.wants and not run.expensive_to_leave:
                        rest = end - run.position
                        if rest > max(GUESS_MARGIN, self._pacing(run).carries(DRAIN)):
                            return
                    elif self._must_give_way(run):
                        patience.deadline = math.inf
                        await self._pause(run)
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
        alone = run.priority is Priority.FILL and self._mood is ALONE
        if run.position == end or run.buffered >= (FILL_BATCH if alone else BATCH):
            return True
        return run.priority is Priority.BLOCKED and run.worth_decoding()

    async def _decode(self, run: Run) -> bool:
        """Decode what has come. False if the run has to start anew, with another request."""
        fill = run.priority is Priority.FILL
        limiter = self._fill_decoders if fill else self._decoders
        batch = await trio.to_thread.run_sync(run.advance, not fill, limiter=limiter)
        run.passed()
        self._paused.unpark_all()
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
        trace = run.origin.trace
        if trace is not None and (arrival.damage or arrival.unsaved) is None:
            trace.arrive(run.origin.number, arrival.chunk, want.priority if want else None)
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
