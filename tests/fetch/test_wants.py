"""The states of a chunk: every want is queued or in flight, with the urgency of who wants it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from index.errors import IntegrityError
from snapshotter.fetch.errors import FetchError
from snapshotter.fetch.source import Origin
from snapshotter.fetch.wants import ChunkState, Priority, Waiter, Want, WantTable

CHUNKS = 5
chunks = st.integers(0, CHUNKS - 1)
priorities = st.sampled_from(list(Priority))


class FakeStore:
    def __init__(self, key: bytes) -> None:
        self.key = key
        self.chunks: set[int] = set()

    def has(self, chunk: int) -> bool:
        return chunk in self.chunks


class FakeRun:
    """What the table touches of a run."""

    def __init__(self) -> None:
        self.wants: dict[int, Want] = {}
        self.urgencies = [0] * len(Priority)


class Chunks(RuleBasedStateMachine):
    """Two images share layer A, a third has layer B."""

    def __init__(self) -> None:
        super().__init__()
        self.table = WantTable()
        self.stores = [FakeStore(b"A"), FakeStore(b"B")]
        nothing: object = None
        self.origins = [
            Origin(nothing, self.stores[store], nothing)  # type: ignore[arg-type]
            for store in (0, 0, 1)
        ]
        self.waiters: list[Waiter] = []
        self.runs: list[FakeRun] = []

    def wants(self) -> list[Want]:
        return [want for layer in self.table.layers() for want in layer.wants.values()]

    def pick(self, data: st.DataObject, *, flying: bool) -> Want | None:
        found = [want for want in self.wants() if (want.run is not None) == flying]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(image=st.integers(0, 2), some=st.sets(chunks, min_size=1), priority=priorities)
    def wait(self, image: int, some: set[int], priority: Priority) -> None:
        waiter = Waiter(self.origins[image], priority)
        for chunk in some:
            if not waiter.origin.stored.has(chunk):
                want = self.table.want(waiter, chunk)
                assert want.priority is not None
                assert want.priority >= priority
        if waiter.pending:
            self.waiters.append(waiter)

    @rule(image=st.integers(0, 2), chunk=chunks, priority=priorities)
    def advise(self, image: int, chunk: int, priority: Priority) -> None:
        origin = self.origins[image]
        if not origin.stored.has(chunk):
            self.table.advise(origin, chunk, priority)
            assert self.table.state(origin, chunk) is not ChunkState.ABSENT

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        want = self.pick(data, flying=False)
        if want is not None:
            run: object = FakeRun()
            assert isinstance(run, FakeRun)
            self.runs.append(run)
            self.table.take(want, run)  # type: ignore[arg-type]
            assert self.table.state(want.origin, want.chunk) is ChunkState.IN_FLIGHT

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        want = self.pick(data, flying=True)
        if want is not None:
            self.table.give_back(want)
            assert self.table.state(want.origin, want.chunk) is ChunkState.WANTED

    @rule(data=st.data(), flying=st.booleans())
    def arrive(self, data: st.DataObject, flying: bool) -> None:
        want = self.pick(data, flying=flying)
        if want is not None:
            origin, waiters = want.origin, list(want.waiters)
            origin.stored.chunks.add(want.chunk)  # type: ignore[attr-defined]
            self.table.arrive(want, b"data", None)
            assert self.table.state(origin, want.chunk) is ChunkState.STORED
            for waiter in waiters:
                blocked = waiter.priority is Priority.BLOCKED
                assert waiter.arrived.get(want.chunk) == (b"data" if blocked else None)

    @rule(data=st.data(), flying=st.booleans())
    def fail(self, data: st.DataObject, flying: bool) -> None:
        want = self.pick(data, flying=flying)
        if want is not None:
            origin, waiters = want.origin, list(want.waiters)
            error = IntegrityError("bad")
            self.table.fail(want, error)
            assert self.table.state(origin, want.chunk) is ChunkState.ABSENT
            assert all(waiter.error is error for waiter in waiters)

    @rule(data=st.data())
    def reject(self, data: st.DataObject) -> None:
        want = self.pick(data, flying=True)
        if want is not None:
            origin, waiters = want.origin, list(want.waiters)
            self.table.reject(want, origin, IntegrityError("bad"))
            assert want.run is None
            for waiter in waiters:
                assert (waiter.error is not None) == (waiter.origin is origin)

    @rule(data=st.data())
    def hand_over(self, data: st.DataObject) -> None:
        want = self.pick(data, flying=True)
        if want is not None:
            run = want.run
            assert run is not None
            run.origin = want.origin
            others = [waiter for waiter in want.waiters if waiter.origin is not run.origin]
            assert self.table.hand_over(run) == bool(others)
            if others:
                assert want.origin is not run.origin

    @precondition(lambda self: self.waiters)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(self.waiters))
        self.waiters.remove(waiter)
        idle = self.table.leave(waiter)
        assert all(not run.wants for run in idle)
        assert not waiter.pending

    @rule(image=st.integers(0, 2))
    def unmount(self, image: int) -> None:
        origin = self.origins[image]
        readers = [w for w in self.waiters if w.origin is origin and w.pending]
        self.table.withdraw(origin, FetchError("unmounted"))
        assert all(waiter.error is not None for waiter in readers)
        assert all(want.origin is not origin for want in self.wants())

    @invariant()
    def every_want_has_its_place(self) -> None:
        queued = {want for queue in self.table.queues.values() for want in queue}
        flying = {want for run in self.runs for want in run.wants.values()}
        assert queued | flying == set(self.wants())
        assert not queued & flying
        for priority, queue in self.table.queues.items():
            assert all(want.priority is priority and want.run is None for want in queue)
        for want in self.wants():
            assert want.priority is want.urgency() is not None
            assert not want.origin.stored.has(want.chunk)

    @invariant()
    def the_counts_are_right(self) -> None:
        for priority in Priority:
            counted = [want for want in self.wants() if want.priority is priority]
            assert self.table.count(priority) == len(counted)
        for run in self.runs:
            for priority in Priority:
                counted = [want for want in run.wants.values() if want.priority is priority]
                assert run.urgencies[priority] == len(counted)

    @invariant()
    def a_waiter_is_done_when_nothing_is_pending(self) -> None:
        for waiter in self.waiters:
            assert waiter.done.is_set() == (not waiter.pending)
            for chunk, want in waiter.pending.items():
                assert want.chunk == chunk
                assert waiter in want.waiters

    @invariant()
    def nothing_is_kept_of_layers_that_nobody_wants(self) -> None:
        assert all(layer.wants for layer in self.table.layers())


Chunks.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestChunks = Chunks.TestCase
