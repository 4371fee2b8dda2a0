"""Ctrl-C and its relatives, as a flag that every wait looks at.

A signal that raised wherever the program happens to be could come between starting a process and
noting that it has to be stopped. Here it only sets a flag: work ends at the next `check`, which is
never more than POLL_SECONDS away, and nothing is ever half started. Work that has no such places,
as computing has none, is done in a block of `at_once`.
"""

from __future__ import annotations

import select
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

POLL_SECONDS = 0.1

REPEAT_SECONDS = 2.0
"""Until work that should have ended at once is interrupted again: Python drops what is raised while
it calls back for an object that goes."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptedBySignal(BaseException):
    """Somebody wants this to end. Not an Exception: nothing may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class Interruption:
    """Catches SIGINT, SIGTERM and SIGHUP as long as the block lasts. For the main thread only."""

    def __init__(self) -> None:
        self._arrived = 0
        self._armed = True
        self._at_once = False
        self._former: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self._arrived = not self._arrived, self._arrived or number
        if first and self._at_once:
            signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS, REPEAT_SECONDS)
            signal.raise_signal(signal.SIGINT)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the block wherever it is. What is half started then, the workspace finds
        by its marks.

        It is Python's own Ctrl-C until it leaves the block: trio knows what to do with that one.
        """
        former = signal.signal(signal.SIGINT, signal.default_int_handler)
        again = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        report = sys.unraisablehook
        sys.unraisablehook = lambda it: None if it.exc_type is KeyboardInterrupt else report(it)
        self._at_once = True
        try:
            yield
        except (KeyboardInterrupt, BaseExceptionGroup) as error:
            if isinstance(error, BaseExceptionGroup) and not error.subgroup(KeyboardInterrupt):
                raise
            raise InterruptedBySignal(self._arrived or signal.SIGINT) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._at_once = False
            sys.unraisablehook = report
            signal.signal(signal.SIGALRM, again)
            signal.signal(signal.SIGINT, former)

    def check(self) -> None:
        """Raise InterruptedBySignal if a signal has arrived."""
        if self._arrived and self._armed:
            raise InterruptedBySignal(self._arrived)

    def disarm(self) -> None:
        """From here on signals change nothing: what is left to do is to clean up."""
        self._armed = False

    def wait(self, descriptor: int, seconds: float) -> bool:
        """Wait until `descriptor` can be read; False if that takes longer than `seconds`."""
        end = time.monotonic() + seconds
        while True:
            self.check()
            left = end - time.monotonic()
            if select.select([descriptor], [], [], max(0.0, min(left, POLL_SECONDS)))[0]:
                return True
            if left <= 0:
                return False

    def sleep(self, seconds: float) -> None:
        """Sleep, but end as soon as a signal arrives."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, POLL_SECONDS))
        self.check()
