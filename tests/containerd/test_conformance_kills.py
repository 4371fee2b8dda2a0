"""What is left after kill -9, asked of the services of `test_conformance.py`."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from snapshotter.containerd.snapshots import Kind
from tests.support.conformance import (
    FIRSTBYTE,
    NOT_FOUND,
    SERVICES,
    Client,
    Service,
    Session,
    write,
)
from tests.support.instance import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

WORKERS = 6
ROUNDS = 4


def state(session: Session) -> dict[str, Any]:
    """All that the service says, and what is in each writable snapshot."""
    found: dict[str, Any] = {}
    for info in session.calls.list():
        found[info.name] = [info, session.calls.usage(info.name)]
        if info.kind is not Kind.COMMITTED:
            mounts = session.calls.mounts(info.name)
            with session.shown(mounts) as place:
                found[info.name] += [mounts, sorted(os.listdir(place))]
    return found


def pull_and_run(session: Session) -> Iterator[str]:
    """The calls for an image of two layers, a container on it, and the removal of both.

    It can be interrupted after each; then it says which it was.
    """

    def fill(key: str, name: str) -> None:
        with session.shown(session.calls.mounts(key)) as place:
            write(name, "x" * 10_000)(place)

    for parent, name in (("", "low"), ("low", "high")):
        key = f"extract {name}"
        session.calls.prepare(key, parent, {"containerd.io/snapshot.ref": name})
        yield f"prepare {name}"
        fill(key, f"of {name}")
        session.calls.usage(key)
        yield f"unpack {name}"
        session.calls.commit(name, key, {"layer": name})
        yield f"commit {name}"
        session.calls.stat(name)
        session.calls.update(name, {"used": "yes"}, ["labels.used"])
        yield f"update {name}"
    session.calls.view("look at it", "high")
    yield "view"
    session.calls.prepare("container", "high", {"container": "yes"})
    yield "prepare container"
    session.calls.mounts("container")
    fill("container", "of container")
    yield "run"
    session.calls.remove("look at it")
    yield "remove view"
    session.calls.remove("container")
    yield "remove container"
    session.calls.remove("high")
    session.collect()
    yield "remove high"
    session.calls.remove("low")
    yield "remove low"


# containerd 1.6 would tell nothing that 2.1 and the others do not.
@pytest.mark.parametrize(
    "service", [name for name in SERVICES if name != "firstbyte in 1.6"], indirect=True
)
def test_between_any_two_calls(session: Session) -> None:
    """Nothing has changed, and no directory is there that belongs to no snapshot."""
    for call in pull_and_run(session):
        before = state(session)
        session.kill_and_start()
        assert state(session) == before, call
        if session.behind_containerd:
            session.collect()  # FirstByte alone does that when it starts
        assert len(session.directories()) == len(before), call
    assert session.calls.list() == ()


def test_containers_go_on(session: Session) -> None:
    session.add_layer("low", change=write("below", "content"))
    with session.shown(session.calls.prepare("container", "low")) as place:
        (place / "before").touch()
        session.kill_and_start()
        assert (place / "below").read_text() == "content"
        (place / "after").touch()
        assert sorted(os.listdir(place)) == ["after", "before", "below"]
        with session.shown(session.calls.mounts("container")) as again:
            assert sorted(os.listdir(again)) == ["after", "before", "below"]


@pytest.mark.parametrize("service", ["firstbyte in 1.6", "firstbyte in 2.1"], indirect=True)
def test_containerd_goes_on_with_the_next_daemon(service: Service, session: Session) -> None:
    session.add_layer("low")
    assert service.daemon
    service.daemon.kill()
    with session.refused(UNAVAILABLE):
        session.calls.prepare("container", "low")
    service.daemon.start()

    def prepared() -> bool:
        try:
            session.calls.prepare("container", "low")
        except grpc.RpcError as error:
            if error.code() is not UNAVAILABLE:
                raise
            return False
        return True

    wait_until(prepared)
    assert session.calls.names() == {"low", "container"}
    session.collect()
    assert len(session.directories()) == 2


@pytest.mark.parametrize("service", [FIRSTBYTE], indirect=True)
def test_in_the_middle_of_calls(session: Session) -> None:
    """What was answered is so; what was not answered was done or not. All is whole.

    (containerd itself may lose a snapshot when it is killed between its database and that of the
    snapshotter.)
    """
    session.add_layer("low", change=write("file", "content"))
    for round_ in range(ROUNDS):
        begun = threading.Semaphore(0)
        with ThreadPoolExecutor(WORKERS) as threads:
            working = [
                threads.submit(_work_until_killed, session, f"{round_} {worker}", begun)
                for worker in range(WORKERS)
            ]
            for _ in range(random.Random(round_).randrange(1, 60)):
                assert begun.acquire(timeout=30)
            session.kill_and_start()
            made = [work.result(60) for work in working]

        assert len(session.directories()) == len(session.calls.list())
        for possible in made:
            for name, kinds in possible.items():
                assert _kind(session.calls, name) in kinds, name
        for info in session.calls.list(["kind!=committed"]):
            with session.shown(session.calls.mounts(info.name)) as place:
                assert os.listdir(place) == ["file"]


def _kind(calls: Client, name: str) -> Kind | None:
    try:
        return calls.stat(name).kind
    except grpc.RpcError as error:
        if error.code() is not NOT_FOUND:
            raise
        return None


def _work_until_killed(
    session: Session, worker: str, begun: threading.Semaphore
) -> dict[str, set[Kind | None]]:
    """What each snapshot that was worked on may be; None is not there."""
    may_be: dict[str, set[Kind | None]] = {}

    def attempt(call: Callable[[], object], **changes: tuple[str, Kind | None]) -> bool:
        for name, kind in changes.values():
            may_be.setdefault(name, {None}).add(kind)
        begun.release()
        try:
            call()
        except grpc.RpcError as error:
            if error.code() is not UNAVAILABLE:
                raise
            return False
        for name, kind in changes.values():
            may_be[name] = {kind}
        return True

    with session.another_client() as calls:
        for number in range(1000):
            key, name = f"{worker} {number} key", f"{worker} {number} name"
            if not attempt(partial(calls.prepare, key, "low"), made=(key, Kind.ACTIVE)):
                break
            match number % 3:
                case 0:
                    going_on = attempt(
                        partial(calls.commit, name, key),
                        made=(name, Kind.COMMITTED),
                        gone=(key, None),
                    )
                case 1:
                    going_on = attempt(partial(calls.remove, key), gone=(key, None))
                case _:
                    going_on = attempt(partial(calls.update, key, {"a": "1"}))
            if not going_on:
                break
    return may_be
