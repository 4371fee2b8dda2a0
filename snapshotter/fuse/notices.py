"""CREATE, MKNOD and RMDIR in live views: nothing is made or removed, but it may mean something.

These are answered here and not by pyfuse3, which does not tell the number of a request. That is all
by which a request can be known again that a predecessor has read, and may have acted upon.
"""

from __future__ import annotations

import errno
import logging
from functools import partial
from typing import TYPE_CHECKING

from snapshotter.fuse import device
from snapshotter.fuse.live import Call, LiveView
from snapshotter.fuse.view import unpack_inode
from snapshotter.fuse.wire import CHANGED_NAME, RESENT, Opcode, error_reply

if TYPE_CHECKING:
    from collections.abc import Coroutine

    import trio

    from snapshotter.fuse.failures import FailureLog
    from snapshotter.fuse.view import Views
    from snapshotter.fuse.waiters import Waiters


log = logging.getLogger(__name__)


class Notices:
    """All of a session. Its tasks run in `nursery`."""

    def __init__(
        self,
        fuse: int,
        views: Views,
        failures: FailureLog,
        waiters: Waiters,
        nursery: trio.Nursery,
    ) -> None:
        self._fuse = fuse
        self._views = views
        self._failures = failures
        self._waiters = waiters
        self._nursery = nursery

    def begin(self, opcode: int, unique: int, nodeid: int, thread: int, body: memoryview) -> bool:
        """Answer a request by a thread later, if it is about a directory of a live view; tells
        whether it is."""
        slot, nid = unpack_inode(nodeid)
        view = self._views.in_slot(slot)
        if not isinstance(view, LiveView):
            return False
        call = Call(unique & ~RESENT, again=bool(unique & RESENT))
        if view.has_noticed(call):  # whether or not the inode is known here
            log.info("request %d was heeded before", call.number)
            device.write(self._fuse, error_reply(unique, errno.ENOENT))
            return True
        if not view.knows(nid):
            return False
        name = bytes(body[CHANGED_NAME[Opcode(opcode)] : -1])
        noticed = view.noticed_rmdir if opcode == Opcode.RMDIR else view.noticed_create
        self._waiters.add(unique, thread, partial(self._give_up, unique))
        self._nursery.start_soon(self._notice, partial(noticed, nid, name, call), unique, nodeid)
        return True

    async def _notice(
        self, noticed: partial[Coroutine[None, None, bool]], unique: int, nodeid: int
    ) -> None:
        number = errno.EROFS
        try:
            if await noticed():
                number = errno.ENOENT
        except Exception as error:
            self._failures.note("a change", nodeid, error)
            number = errno.EIO
        device.write(self._fuse, error_reply(unique, number))
        self._waiters.remove(unique)

    def _give_up(self, unique: int) -> None:
        """Let go who is being killed; it is noticed all the same."""
        device.write(self._fuse, error_reply(unique, errno.EINTR))
        self._waiters.remove(unique)
