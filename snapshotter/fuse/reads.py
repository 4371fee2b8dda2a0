"""READ: answered at once where the data is at hand, else by a task that waits for it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import trio

from snapshotter.fuse import device
from snapshotter.fuse.view import NID_MASK
from snapshotter.fuse.wire import error_reply

if TYPE_CHECKING:
    from snapshotter.fuse.failures import FailureLog
    from snapshotter.fuse.view import View
    from snapshotter.fuse.waiters import Waiters


class Reads:
    """All READs of a session. Its tasks run in `nursery`."""

    def __init__(
        self, fuse: int, failures: FailureLog, waiters: Waiters, nursery: trio.Nursery
    ) -> None:
        self._fuse = fuse
        self._failures = failures
        self._waiters = waiters
        self._nursery = nursery

    def begin(
        self, view: View, unique: int, nodeid: int, thread: int, offset: int, size: int
    ) -> None:
        """Answer a READ by a thread, now or later."""
        try:
            data = view.read_now(nodeid & NID_MASK, offset, size)
        except Exception as error:
            self._refuse(unique, nodeid, offset, size, error)
            return
        if data is not None:
            device.write_data(self._fuse, unique, data)
            return
        scope = trio.CancelScope()
        self._waiters.add(unique, thread, scope.cancel)
        self._nursery.start_soon(self._wait, scope, view, unique, nodeid, offset, size)

    async def _wait(
        self,
        scope: trio.CancelScope,
        view: View,
        unique: int,
        nodeid: int,
        offset: int,
        size: int,
    ) -> None:
        with scope:
            try:
                data = await view.read(nodeid & NID_MASK, offset, size)
            except Exception as error:
                self._refuse(unique, nodeid, offset, size, error)
            else:
                device.write_data(self._fuse, unique, data)
        if scope.cancelled_caught:
            device.write(self._fuse, error_reply(unique, errno.EINTR))
        self._waiters.remove(unique)

    def _refuse(self, unique: int, nodeid: int, offset: int, size: int, error: Exception) -> None:
        self._failures.note(f"read of {size} bytes at {offset}", nodeid, error)
        device.write(self._fuse, error_reply(unique, errno.EIO))
