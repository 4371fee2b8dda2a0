"""A snapshotter that answers as it is told, behind a real server, and who calls it."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import trio

from snapshotter.containerd import server
from snapshotter.containerd.counters import CallCounters
from snapshotter.containerd.messages import METHODS
from tests.support.grpc_clients import SnapshotsClient, open_channel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from snapshotter.containerd.snapshots import Info, Mount, Usage

SOON = 30.0  # seconds; for what happens at once unless the machine is busy
_CODE = grpc.StatusCode
T = TypeVar("T")


class Spoken:
    """A service that answers what it is told to, and remembers what it was asked.

    An answer that is an error is raised. Without an answer, a call waits until it is cancelled or
    let go.
    """

    def __init__(self, **answers: object) -> None:
        self.answers = answers
        self.asked: list[tuple[object, ...]] = []
        self.waiting = self.cancelled = 0
        self.let_go = trio.Event()

    async def _answer(self, call: str, *arguments: object) -> Any:
        self.asked.append((call, *arguments))
        if call not in self.answers:
            await self._wait()
            return ()
        await trio.lowlevel.checkpoint()
        answer = self.answers[call]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _wait(self) -> None:
        self.waiting += 1
        try:
            await self.let_go.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1

    async def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        return await self._answer("prepare", key, parent, labels)

    async def view(self, key: str, parent: str, labels: Mapping[str, str]) -> Sequence[Mount]:
        return await self._answer("view", key, parent, labels)

    async def mounts(self, key: str) -> Sequence[Mount]:
        return await self._answer("mounts", key)

    async def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str) -> None:
        await self._answer("commit", name, key, labels, parent)

    async def remove(self, key: str) -> None:
        await self._answer("remove", key)

    async def stat(self, key: str) -> Info:
        return await self._answer("stat", key)

    async def update(self, name: str, labels: Mapping[str, str], fieldpaths: Sequence[str]) -> Info:
        return await self._answer("update", name, labels, fieldpaths)

    async def list(self, filters: Sequence[str]) -> Sequence[Info]:
        return await self._answer("list", filters)

    async def usage(self, key: str) -> Usage:
        return await self._answer("usage", key)

    async def cleanup(self) -> None:
        await self._answer("cleanup")


@asynccontextmanager
async def serving(
    service: Spoken, address: Path, counters: CallCounters | None = None
) -> AsyncIterator[Path]:
    async def serve(task_status: trio.TaskStatus[None]) -> None:
        await server.serve(
            service,
            address,
            counters=counters or CallCounters(),
            task_status=task_status,
        )

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        yield address
        nursery.cancel_scope.cancel()


async def asking(address: Path, ask: Callable[[SnapshotsClient], T]) -> T:
    """What a client gets, which is synchronous, as containerd would see it."""

    def work() -> T:
        with SnapshotsClient(address) as client:
            return ask(client)

    return await trio.to_thread.run_sync(work)


async def until(what: Callable[[], bool]) -> None:
    with trio.fail_after(SOON):
        while not what():  # noqa: ASYNC110 - on what other threads do
            await trio.sleep(0.005)


@contextmanager
def channel_to(address: Path) -> Iterator[grpc.Channel]:
    channel = open_channel(address)
    try:
        yield channel
    finally:
        channel.close()


def request_of(name: str, **fields: object) -> bytes:
    return METHODS[name].request(**fields).SerializeToString()


async def ended(call: grpc.Future) -> _CODE:
    """The code that a call ends with."""
    await until(call.done)
    return call.code()
