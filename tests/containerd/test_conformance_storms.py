"""Many calls at once, asked of the services of `test_conformance.py`."""

from __future__ import annotations

import itertools
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import grpc
import pytest
import trio

from snapshotter.containerd import snapshotter as module
from snapshotter.containerd.errors import NotFoundError
from snapshotter.containerd.snapshots import Kind
from snapshotter.containerd.snapshotter import Snapshotter
from tests.support.conformance import (
    ALREADY_EXISTS,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    NOT_FOUND,
    Client,
    Session,
    write,
)
from tests.support.lazy_images import DirectoryImages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

THREADS = 32
WORKERS = 8
ROUNDS = 25  # of each worker
EXPLAINED = (NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT)


def answers(*calls: Callable[[], object]) -> list[grpc.StatusCode]:
    """How calls end that begin at once."""
    begin = threading.Barrier(len(calls))

    def make(call: Callable[[], object]) -> grpc.StatusCode:
        begin.wait(30)
        try:
            call()
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(make, calls))


def check_consistent(session: Session) -> None:
    """Each snapshot has its directory, and all that it stands on; there is no other directory."""
    session.collect()
    found = {info.name: info for info in session.calls.list()}
    assert len(session.directories()) == len(found)
    for info in found.values():
        assert not info.parent or found[info.parent].kind is Kind.COMMITTED
        if info.kind is not Kind.COMMITTED:
            for directory in _directories_of(session, info.name):
                assert os.path.isdir(directory)


def _directories_of(session: Session, key: str) -> list[str]:
    (mount,) = session.calls.mounts(key)
    if mount.type == "bind":
        return [mount.source]
    options = dict(option.split("=", 1) for option in mount.options)
    own = [options[name] for name in ("upperdir", "workdir") if name in options]
    return [*own, *options["lowerdir"].split(":")]


class TestOneName:
    @pytest.mark.parametrize("parent", ["", "low"])
    def test_one_of_many_prepares_gets_the_key(self, session: Session, parent: str) -> None:
        session.add_layer("low", change=write("file", "content"))
        codes = answers(*[partial(session.calls.prepare, "key", parent)] * THREADS)
        assert sorted(codes, key=str) == [ALREADY_EXISTS] * (THREADS - 1) + [grpc.StatusCode.OK]
        assert session.calls.names() == {"low", "key"}
        with session.shown(session.calls.mounts("key")) as place:
            assert os.listdir(place) == (["file"] if parent else [])
        check_consistent(session)

    def test_one_of_prepares_and_views_gets_the_key(self, session: Session) -> None:
        calls = [partial(session.calls.prepare, "key"), partial(session.calls.view, "key")]
        codes = answers(*calls * 8)
        assert codes.count(grpc.StatusCode.OK) == 1
        assert codes.count(ALREADY_EXISTS) == 15
        check_consistent(session)

    def test_one_of_many_commits_gets_the_name(self, session: Session) -> None:
        keys = [f"{number}" for number in range(8)]
        for key in keys:
            session.calls.prepare(key)
        codes = answers(*[partial(session.calls.commit, "name", key) for key in keys])
        assert codes.count(grpc.StatusCode.OK) == 1
        assert codes.count(ALREADY_EXISTS) == 7
        winner = keys[codes.index(grpc.StatusCode.OK)]
        assert session.calls.names() == {"name", *keys} - {winner}
        check_consistent(session)

    def test_one_of_many_removes_removes(self, session: Session) -> None:
        session.calls.prepare("key")
        codes = answers(*[partial(session.calls.remove, "key")] * 8)
        assert codes.count(grpc.StatusCode.OK) == 1
        assert codes.count(NOT_FOUND) == 7
        check_consistent(session)

    def test_a_parent_is_removed_or_used(self, session: Session) -> None:
        for number in range(8):
            session.add_layer(f"low {number}")
            codes = answers(
                partial(session.calls.remove, f"low {number}"),
                partial(session.calls.prepare, f"on {number}", f"low {number}"),
            )
            assert codes in (
                [grpc.StatusCode.OK, NOT_FOUND],
                [FAILED_PRECONDITION, grpc.StatusCode.OK],
            )
        check_consistent(session)


class TestRemovedMeanwhile:
    """Between two steps of a call another one removes the snapshot, and its directory is deleted.

    Storms come to that once in many runs; so here FirstByte's steps are interrupted, in process.
    """

    @pytest.fixture
    async def snapshotter(self, tmp_path: Path) -> AsyncIterator[Snapshotter]:
        images = DirectoryImages(tmp_path / "images")
        made = Snapshotter(tmp_path / "root", images, tmp_path / "idmapped")
        yield made
        made.close()

    @pytest.fixture
    def remove_before(
        self, snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[str, str], None]:
        """Have a snapshot removed before a function of the snapshotter's module runs."""

        async def remove(key: str) -> None:
            await snapshotter.remove(key)
            await snapshotter.cleanup()

        def interrupt(function: str, key: str) -> None:
            go_on = getattr(module, function)

            def interrupted(*arguments: object) -> object:
                trio.from_thread.run(remove, key)
                return go_on(*arguments)

            monkeypatch.setattr(module, function, interrupted)

        return interrupt

    async def test_usage(
        self, snapshotter: Snapshotter, remove_before: Callable[[str, str], None]
    ) -> None:
        await snapshotter.prepare("active", "", {})
        remove_before("tree_usage", "active")
        with pytest.raises(NotFoundError):
            await snapshotter.usage("active")

    async def test_commit(
        self, snapshotter: Snapshotter, remove_before: Callable[[str, str], None]
    ) -> None:
        await snapshotter.prepare("active", "", {})
        remove_before("tree_usage", "active")
        with pytest.raises(NotFoundError):
            await snapshotter.commit("low", "active", {}, "")

    async def test_prepare(
        self, snapshotter: Snapshotter, remove_before: Callable[[str, str], None]
    ) -> None:
        await snapshotter.prepare("extract", "", {})
        await snapshotter.commit("low", "extract", {}, "")
        remove_before("_owner_of_nearest", "low")
        with pytest.raises(NotFoundError):
            await snapshotter.prepare("active", "low", {})
        assert await snapshotter.list([]) == []


class TestStorms:
    def test_of_different_names(self, session: Session) -> None:
        session.add_layer("low", change=write("low", ""))
        session.add_layer("high", "low", write("high", ""))
        with ThreadPoolExecutor(WORKERS) as threads, _collecting(session):
            models = list(threads.map(partial(_work_alone, session), range(WORKERS)))
        expected = {"low": (Kind.COMMITTED, ""), "high": (Kind.COMMITTED, "low")}
        for model in models:
            expected |= model
        found = {info.name: (info.kind, info.parent) for info in session.calls.list()}
        assert found == expected
        check_consistent(session)

    def test_of_the_same_names(self, session: Session) -> None:
        with ThreadPoolExecutor(WORKERS) as threads, _collecting(session):
            surprises = list(threads.map(partial(_work_against_others, session), range(WORKERS)))
        assert surprises == [[]] * WORKERS
        check_consistent(session)


@contextmanager
def _collecting(session: Session) -> Iterator[None]:
    """Directories of removed snapshots are deleted all the while."""
    enough = threading.Event()

    def collect() -> None:
        while not enough.is_set():
            session.collect()

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(collect)
        try:
            yield
        finally:
            enough.set()
            done.result(60)


def _work_alone(session: Session, worker: int) -> dict[str, tuple[Kind, str]]:
    """Make, commit and remove snapshots with names of the worker's own; those that are left."""
    random_ = random.Random(worker)
    model: dict[str, tuple[Kind, str]] = {}
    numbers = itertools.count()

    def of_kind(*kinds: Kind) -> list[str]:
        return [name for name, (kind, _) in model.items() if kind in kinds]

    def parents() -> list[str]:
        return ["", "low", "high", *of_kind(Kind.COMMITTED)]

    def removable() -> list[str]:
        return sorted(model.keys() - {parent for _, parent in model.values()})

    with session.another_client() as calls:
        for _ in range(ROUNDS):
            name = f"{worker} {next(numbers)}"
            parent = random_.choice(parents())
            active = of_kind(Kind.ACTIVE)
            match random_.choice(["prepare", "view", "commit", "commit", "remove", "look"]):
                case "view":
                    calls.view(name, parent)
                    model[name] = (Kind.VIEW, parent)
                case "commit" if active:
                    key = random_.choice(active)
                    calls.commit(name, key)
                    model[name] = (Kind.COMMITTED, model.pop(key)[1])
                case "remove" if model:
                    gone = random_.choice(removable())
                    calls.remove(gone)
                    del model[gone]
                case "look" if model:
                    looked = random_.choice(list(model))
                    info = calls.stat(looked)
                    assert (info.kind, info.parent) == model[looked]
                    calls.usage(looked)
                    calls.update(looked, {"looked": "at"})
                    assert {info.name for info in calls.list()} >= model.keys()
                case _:
                    calls.prepare(name, parent)
                    model[name] = (Kind.ACTIVE, parent)
    return model


def _work_against_others(session: Session, worker: int) -> list[tuple[grpc.StatusCode, str]]:
    """Calls with names that all workers use; errors that no order of the calls explains."""
    random_ = random.Random(worker)
    surprises = []

    def one_of(kind: str) -> str:
        return f"{kind} {random_.randrange(4)}"

    with session.another_client() as calls:
        for _ in range(ROUNDS):
            try:
                _call_anything(calls, random_, one_of)
            except grpc.RpcError as error:
                if error.code() not in EXPLAINED:
                    surprises.append((error.code(), error.details()))
    return surprises


def _call_anything(calls: Client, random_: random.Random, one_of: Callable[[str], str]) -> None:
    parent = random_.choice(["", one_of("name"), one_of("name"), one_of("key")])
    match random_.choice(
        ["prepare", "prepare", "view", "commit", "commit", "remove", "remove", "look", "update"]
    ):
        case "prepare":
            calls.prepare(one_of("key"), parent)
        case "view":
            calls.view(one_of("key"), parent)
        case "commit":
            calls.commit(one_of("name"), one_of("key"))
        case "remove":
            calls.remove(one_of(random_.choice(["name", "key"])))
        case "look":
            calls.mounts(one_of("key"))
            calls.usage(one_of("name"))
            calls.list()
        case "update":
            calls.update(one_of("name"), {"a": f"{random_.random()}"}, ["labels.a"])
