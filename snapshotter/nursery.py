"""A nursery whose callers see one error instead of a group."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from index.errors import FirstByteError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """Like `trio.open_nursery`, for tasks that work on one thing together.

    When tasks fail with nothing but FirstByteErrors, the first of these is raised by itself:
    whoever catches our errors need not know that several tasks were at work.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        ours, rest = group.split(FirstByteError)
        if ours is None or rest is not None:
            raise
        raise _first(ours) from group


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
