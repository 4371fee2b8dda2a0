"""When a request cannot be answered: a log line for people. The kernel is told EIO."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from index.errors import FirstByteError
from snapshotter.fuse.view import unpack_inode

if TYPE_CHECKING:
    from snapshotter.fuse.view import Views

log = logging.getLogger(__name__)

# A program that reads a whole tree while the registry is away fails thousands of times a second,
# each time for the same reason. Both numbers are guesses at what an administrator wants to see.
_BURST = 20
_WINDOW_SECONDS = 10.0


class FailureLog:
    """At most _BURST log lines a window, and a count of the rest.

    A program only sees "Input/output error", so the log line has to carry the cause.
    """

    def __init__(self, views: Views) -> None:
        self._views = views
        self._window_end = 0.0
        self._lines = 0
        self._unsaid = 0

    def note(self, request: str, inode: int, error: Exception) -> None:
        """Log that a request about an inode of the mount failed with `error`.

        Anything but a FirstByteError is a mistake in the program and gets its traceback logged;
        it must not end the session, which serves other containers too.
        """
        if self._may_speak():
            slot, nid = unpack_inode(inode)
            view = self._views.in_slot(slot)
            image = view.reference if view else "no image"
            what = f"{image}: {request} of inode {nid}"
            if isinstance(error, FirstByteError):
                log.error("%s failed: %s", what, error)
            else:
                log.error("%s failed by a mistake in FirstByte", what, exc_info=error)

    def _may_speak(self) -> bool:
        now = time.monotonic()
        if now >= self._window_end:
            if self._unsaid:
                log.error("%d more requests failed and were not logged", self._unsaid)
            self._window_end = now + _WINDOW_SECONDS
            self._lines = self._unsaid = 0
        self._lines += 1
        if self._lines <= _BURST:
            return True
        self._unsaid += 1
        return False
