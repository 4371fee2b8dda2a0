"""Which chunks are wanted, by whom and how urgently: every chunk's state and its transitions.

              want                      take                    arrive
    ABSENT ----------> WANTED --------------------> IN_FLIGHT ----------> STORED
      ^                 |  ^                          |  |
      |  leave, fail    |  |        give_back         |  |
      +-----------------+  +--------------------------+  |
      |                  leave, fail                     |
      +--------------------------------------------------+

ABSENT and STORED have no record here: the store knows which it is. That a fetch failed is not
recorded anywhere, so the next one who wants the chunk starts afresh.

Nothing here waits or does I/O. All of it runs in the trio thread.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from index.errors import FirstByteError
    from snapshotter.fetch.source import Origin
    from snapshotter.store.errors import StoreError


class Priority(enum.IntEnum):
    """How urgent a chunk is, least urgent first."""

    FILL = 0
    """Will make the image fully local."""
    STARTUP = 1
    """Was needed by earlier starts."""
    READAHEAD = 2
    """Comes next for somebody who reads on and on."""
    BLOCKED = 3
    """Somebody waits for it now."""


class Carrier(Protocol):
    """What brings chunks of one layer: a run of its own, or a lane of a startup pack.

    `urgencies` counts its wants by priority. `scope` may be cancelled when nobody wants anything of
    it any more; `progressed_at` is when bytes came last, in trio's time.
    """

    origin: Origin
    wants: dict[int, Want]
    urgencies: list[int]
    scope: trio.CancelScope
    nudged: bool

    @property
    def progressed_at(self) -> float: ...
    @property
    def expensive_to_leave(self) -> bool: ...

    def covers(self, chunk: int) -> bool:
        """Whether it will bring a chunk, or can `reach` for it."""

    def reach(self, chunk: int) -> None:
        """See to it that it brings a chunk that it covers."""

    def ahead(self, chunk: int) -> float:
        """Bytes that come before a run made for this chunk alone would have to begin."""

    def leave(self, chunk: int) -> list[Want]:
        """The wants that are better given back, so that somebody else brings this chunk soon."""


MOST_URGENT_FIRST = tuple(reversed(Priority))


class ChunkState(enum.Enum):
    ABSENT = "absent"
    WANTED = "wanted"
    IN_FLIGHT = "in flight"
    STORED = "stored"


class Waiter:
    """One caller, waiting for some chunks of one layer.

    `done` is set when all have arrived, or when `error` is. A BLOCKED waiter gets the bytes in
    `arrived`; the others want the chunks in the store, and fail if the disk does not take them.
    """

    __slots__ = ("arrived", "done", "error", "origin", "pending", "priority")

    def __init__(self, origin: Origin, priority: Priority) -> None:
        self.origin = origin
        self.priority = priority
        self.pending: dict[int, Want] = {}
        self.arrived: dict[int, bytes] = {}
        self.error: FirstByteError | None = None
        self.done = trio.Event()


class Want:
    """One chunk that is wanted (`run` is None) or in flight.

    `advice` keeps a chunk wanted although nobody waits. `refetched` tells that it has arrived
    damaged once, `avoid` whose source is in trouble.
    """

    __slots__ = ("advice", "avoid", "chunk", "layer", "priority", "refetched", "run", "waiters")

    def __init__(self, layer: LayerWants, chunk: int) -> None:
        self.layer = layer
        self.chunk = chunk
        self.priority: Priority | None = None
        self.advice: tuple[Priority, Origin] | None = None
        self.waiters: list[Waiter] = []
        self.run: Carrier | None = None
        self.refetched = False
        self.avoid: Origin | None = None

    @property
    def origin(self) -> Origin:
        """How to get it: as the most urgent of those who want it would, `avoid` aside."""
        if self.waiters:
            return max(
                self.waiters, key=lambda waiter: (waiter.origin is not self.avoid, waiter.priority)
            ).origin
        assert self.advice is not None
        return self.advice[1]

    def urgency(self) -> Priority | None:
        """How urgent it is to those who want it now; None if nobody does."""
        found = [waiter.priority for waiter in self.waiters]
        if self.advice is not None:
            found.append(self.advice[0])
        return max(found, default=None)


class LayerWants:
    """The wants and the runs of one layer's content."""

    __slots__ = ("key", "runs", "wants")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.wants: dict[int, Want] = {}
        self.runs: list[Carrier] = []


class WantTable:
    """All wants of the node. `queues` has those that no run has taken, oldest first."""

    def __init__(self) -> None:
        self._layers: dict[bytes, LayerWants] = {}
        self._counts = [0] * len(Priority)
        self.queues: dict[Priority, OrderedDict[Want, None]] = {
            priority: OrderedDict() for priority in Priority
        }

    def state(self, origin: Origin, chunk: int) -> ChunkState:
        layer = self._layers.get(origin.stored.key)
        if layer is not None and (want := layer.wants.get(chunk)) is not None:
            return ChunkState.WANTED if want.run is None else ChunkState.IN_FLIGHT
        return ChunkState.STORED if origin.stored.has(chunk) else ChunkState.ABSENT

    def count(self, priority: Priority) -> int:
        """Chunks of this priority that are wanted or in flight."""
        return self._counts[priority]

    def layer(self, origin: Origin) -> LayerWants:
        """The record of a layer's content, made if need be."""
        layer = self._layers.get(origin.stored.key)
        if layer is None:
            layer = self._layers[origin.stored.key] = LayerWants(origin.stored.key)
        return layer

    def layers(self) -> list[LayerWants]:
        return list(self._layers.values())

    # --- transitions ---

    def want(self, waiter: Waiter, chunk: int) -> Want:
        """`waiter` waits for a chunk that is not stored: absent to wanted, or one more waiter."""
        want = self._find(self.layer(waiter.origin), chunk)
        want.waiters.append(waiter)
        waiter.pending[chunk] = want
        self._update(want)
        return want

    def advise(self, origin: Origin, chunk: int, priority: Priority) -> Want:
        """A chunk should come although nobody waits for it yet."""
        want = self._find(self.layer(origin), chunk)
        if want.advice is None or want.advice[0] < priority:
            want.advice = (priority, origin)
            self._update(want)
        return want

    def take(self, want: Want, run: Carrier) -> None:
        """Wanted to in flight."""
        assert want.run is None
        assert want.priority is not None
        del self.queues[want.priority][want]
        want.run = run
        run.wants[want.chunk] = want
        run.urgencies[want.priority] += 1

    def give_back(self, want: Want) -> None:
        """In flight to wanted: its run will not get to it."""
        run = want.run
        assert run is not None
        assert want.priority is not None
        del run.wants[want.chunk]
        run.urgencies[want.priority] -= 1
        want.run = None
        self.queues[want.priority][want] = None

    def arrive(self, want: Want, data: bytes | None, problem: StoreError | None) -> None:
        """In flight (or wanted, when another run came by) to stored; to absent if the disk did not
        take it (`problem`).

        `data` are the verified bytes, or None if they are in the store alone.
        """
        waiters = want.waiters
        self._remove(want)
        for waiter in waiters:
            del waiter.pending[want.chunk]
            if waiter.priority is not Priority.BLOCKED:
                if problem is not None:
                    self._fail(waiter, problem)
            elif data is not None:
                waiter.arrived[want.chunk] = data
            if not waiter.pending:
                waiter.done.set()

    def fail(self, want: Want, error: FirstByteError) -> None:
        """Back to absent; those who wait for it are told why."""
        waiters = want.waiters
        self._remove(want)
        for waiter in waiters:
            del waiter.pending[want.chunk]
            self._fail(waiter, error)

    def reject(self, want: Want, origin: Origin, error: FirstByteError) -> None:
        """In flight to absent for one image, whose source cannot bring the chunk; to wanted, if
        another wants it, too."""
        for waiter in [waiter for waiter in want.waiters if waiter.origin is origin]:
            self._fail(waiter, error)
        if want.advice is not None and want.advice[1] is origin:
            want.advice = None
            self._update(want)
        if want.run is not None:
            want.refetched = False
            self.give_back(want)

    def hand_over(self, run: Carrier) -> bool:
        """Let the sources of other images bring what this run was to bring, if any wants it."""
        origin = run.origin
        wants = list(run.wants.values())
        if all(waiter.origin is origin for want in wants for waiter in want.waiters):
            return False
        for want in wants:
            want.avoid = origin
            self.give_back(want)
        return True

    def leave(self, waiter: Waiter) -> list[Carrier]:
        """`waiter` waits no more. What nobody else wants is absent again.

        Returns the runs that have nothing left to do.
        """
        runs = set()
        for want in list(waiter.pending.values()):
            run = want.run
            want.waiters.remove(waiter)
            self._update(want)
            if run is not None and not run.wants:
                runs.add(run)
        waiter.pending.clear()
        return list(runs)

    def withdraw(self, origin: Origin, error: FirstByteError) -> None:
        """An image goes away: its readers are told so, its advice is void."""
        layer = self._layers.get(origin.stored.key)
        for want in list(layer.wants.values()) if layer is not None else []:
            for waiter in [waiter for waiter in want.waiters if waiter.origin is origin]:
                self._fail(waiter, error)
            if want.advice is not None and want.advice[1] is origin:
                want.advice = None
                self._update(want)

    def discard_idle(self, layer: LayerWants) -> None:
        """Forget a layer that has neither wants nor runs."""
        if not layer.wants and not layer.runs:
            self._layers.pop(layer.key, None)

    # --- how transitions are recorded ---

    def _find(self, layer: LayerWants, chunk: int) -> Want:
        want = layer.wants.get(chunk)
        if want is None:
            want = layer.wants[chunk] = Want(layer, chunk)
        return want

    def _fail(self, waiter: Waiter, error: FirstByteError) -> None:
        if waiter.error is None:
            waiter.error = error
        self.leave(waiter)
        waiter.done.set()

    def _remove(self, want: Want) -> None:
        want.waiters = []
        want.advice = None
        self._update(want)

    def _update(self, want: Want) -> None:
        """Put a want where its urgency belongs; without any it is absent."""
        old, new = want.priority, want.urgency()
        if old is new:
            return
        run = want.run
        if old is not None:
            self._counts[old] -= 1
            if run is not None:
                run.urgencies[old] -= 1
            else:
                del self.queues[old][want]
        want.priority = new
        if new is not None:
            self._counts[new] += 1
            if run is not None:
                run.urgencies[new] += 1
            else:
                self.queues[new][want] = None
        else:
            del want.layer.wants[want.chunk]
            if run is not None:
                del run.wants[want.chunk]
                want.run = None
            self.discard_idle(want.layer)
