"""A process that ends before one of its steps on the disk, as if it had been killed there."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

KILLED = 9
"""The exit status of such a process."""

STEPS = frozenset({"os.mkdir", "os.rename", "os.chmod", "os.chown", "os.remove", "os.rmdir"})
"""What Python tells of the steps that change names, by audit events."""


def in_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own; its exit status."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Killer:
    """Ends this process before a step, counted from when it is armed."""

    def __init__(self, step: int, events: Collection[str] = STEPS) -> None:
        self._left = step
        self._armed = False
        sys.addaudithook(lambda event, _: self.count() if event in events else None)

    def arm(self) -> None:
        self._armed = True

    def count(self) -> None:
        """A step is about to be done."""
        if self._armed:
            self._left -= 1
            if self._left == 0:
                os._exit(KILLED)
