"""pyfuse3's main loop, made to survive requests that the kernel takes back.

A process that is killed takes its waiting request with it. If that happens after the device became
readable and before it is read, there is nothing to read any more. pyfuse3 knows two ends for this:
on a blocking device it waits with the interpreter lock held, so the whole process stands still
until somebody else uses the mount; on a non-blocking one it is told EAGAIN, and raises. Eight
readers that were killed again and again brought about either in seconds.

So the device is non-blocking, and what raises is put back to work.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

# One task serves one request from start to end, so tasks are the limit on requests that wait for
# the network at the same time, and when all wait nobody answers lookups. Requests in flight are
# bounded by the threads that read (each waits for one) and the kernel's max_background. Idle tasks
# end by themselves; a waiting one costs some 10 KiB.
_MAX_TASKS = 4096


async def answer_requests() -> None:
    """Answer the kernel until cancelled or unmounted. The session's device is non-blocking."""
    await pyfuse3.main(max_tasks=_MAX_TASKS)


class _Tasks:
    """The nursery that pyfuse3 starts its tasks in."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def start_soon(
        self, task: Callable[..., Awaitable[Any]], *args: object, name: object = None
    ) -> None:
        self._nursery.start_soon(_repeat, task, *args, name=name)


async def _repeat(task: Callable[..., Awaitable[Any]], *args: object) -> None:
    """Run a task of pyfuse3's again for as long as it finds nothing to read.

    Only reading the device raises this, before there is a request, so none is lost.
    """
    while True:
        try:
            await task(*args)
        except BlockingIOError:
            continue
        return


@asynccontextmanager
async def _open_tasks() -> AsyncIterator[_Tasks]:
    async with trio.open_nursery() as nursery:
        yield _Tasks(nursery)


# pyfuse3 finds trio in this variable, which is there to be replaced (pyfuse3.asyncio does so).
_trio = SimpleNamespace(**{**vars(trio), "open_nursery": _open_tasks})
pyfuse3.trio = _trio  # type: ignore[attr-defined] # its annotations leave it out
