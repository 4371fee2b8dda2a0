"""Who waits for an answer, and INTERRUPT: somebody who waits has been sent a signal.

It comes once a request, whatever signal it is. Only who is being killed is let go (EINTR): to all
others this is a file system on a disk, whose calls are not interrupted, and programs are not
prepared for it; a page fault would even become a SIGBUS. So those who were interrupted are looked
at until they are killed or have their answer.

INTERRUPT may overtake the request that it means, or come after its answer (Linux,
Documentation/filesystems/fuse, "Interrupting filesystem operations"). Then nobody is known here to
wait for that number, and EINTR is answered to it. If the kernel knows it neither, that changes
nothing; if the request is still to come, its INTERRUPT is sent again after it. If the kernel does
know it, a predecessor has read it, and nobody else will answer. EAGAIN, which the document asks
for, would have the kernel repeat itself at once, and for ever in this last case.
"""

from __future__ import annotations

import errno
import signal
from typing import TYPE_CHECKING, NamedTuple

import trio

from snapshotter.fuse import device
from snapshotter.fuse.wire import error_reply

if TYPE_CHECKING:
    from collections.abc import Callable

# Most wait for data that has to be fetched. Beyond this nothing is taken from the kernel until
# there are fewer. Its own limits are the threads that read, each of which waits for one request,
# and max_background. One costs some 10 KiB.
_MAX_WAITING = 4096

_LOOK_SECONDS = 1.0  # between two looks: as long as somebody who is killed may hang

# Signals that end nobody if they are not caught, as a set of /proc: bit n - 1 for signal n.
_HARMLESS = sum(
    1 << number - 1
    for number in (
        signal.SIGCHLD,
        signal.SIGCONT,
        signal.SIGSTOP,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGURG,
        signal.SIGWINCH,
    )
)


class _Waiter(NamedTuple):
    """The thread that waits, 0 if it is not known, and what has it answered EINTR."""

    thread: int
    give_up: Callable[[], None]


class Waiters:
    """Of one session. Looks at those that were interrupted in tasks of `nursery`."""

    def __init__(self, fuse: int, nursery: trio.Nursery) -> None:
        self._fuse = fuse
        self._nursery = nursery
        self._waiters: dict[int, _Waiter] = {}
        self._fewer = trio.Event()

    @property
    def any(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiters)

    def add(self, unique: int, thread: int, give_up: Callable[[], None]) -> None:
        """Somebody waits for an answer; `give_up` has it answered EINTR, if it still is due."""
        self._waiters[unique] = _Waiter(thread, give_up)

    def remove(self, unique: int) -> None:
        """It is answered."""
        self._waiters.pop(unique, None)
        self._fewer.set()

    async def wait_for_room(self) -> None:
        """Return when another one may wait: mostly at once, and then without a checkpoint."""
        while len(self._waiters) >= _MAX_WAITING:
            self._fewer = trio.Event()
            await self._fewer.wait()

    def interrupt(self, unique: int) -> None:
        """What INTERRUPT asks for."""
        if unique in self._waiters:
            self._nursery.start_soon(self._watch, unique)
        else:
            device.write(self._fuse, error_reply(unique, errno.EINTR))

    async def _watch(self, unique: int) -> None:
        while (waiter := self._waiters.get(unique)) is not None:
            if _is_being_killed(waiter.thread):
                waiter.give_up()
                return
            await trio.sleep(_LOOK_SECONDS)


def _is_being_killed(thread: int) -> bool:
    """Whether a signal is pending that will end the thread, as far as it is of our namespace."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            status = file.read()
    except OSError:  # not of our namespace: one that waits is never gone
        return False
    fields = dict(line.split(b":", 1) for line in status.splitlines())
    own, shared, blocked, ignored, caught = (
        int(fields[name], 16) for name in (b"SigPnd", b"ShdPnd", b"SigBlk", b"SigIgn", b"SigCgt")
    )
    return bool((own | shared) & ~(blocked | ignored | caught | _HARMLESS))
