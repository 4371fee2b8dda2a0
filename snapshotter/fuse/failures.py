"""When a request cannot be answered: a log line for people, an errno for the kernel."""

from __future__ import annotations

import errno
import logging
import time

import pyfuse3

from index.errors import FirstByteError

log = logging.getLogger(__name__)

# A program that reads a whole tree while the registry is away fails thousands of times a second,
# each time for the same reason. Both numbers are guesses at what an administrator wants to see.
_BURST = 20
_WINDOW_SECONDS = 10.0


class FailureLog:
    """Turns exceptions into errnos, with at most _BURST log lines a window and a count of the rest.

    A program only sees "Input/output error", so the log line has to carry the cause.
    """

    def __init__(self) -> None:
        self._window_end = 0.0
        self._lines = 0
        self._unsaid = 0

    def refuse(self, what: str, error: Exception) -> pyfuse3.FUSEError:
        """The EIO to raise for a request that failed with `error`; `what` names the request.

        Anything but a FirstByteError is a mistake in the program and gets its traceback logged;
        it must not end the session, which serves other containers too.
        """
        if self._may_speak():
            if isinstance(error, FirstByteError):
                log.error("%s failed: %s", what, error)
            else:
                log.error("%s failed by a mistake in FirstByte", what, exc_info=error)
        return pyfuse3.FUSEError(errno.EIO)

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
