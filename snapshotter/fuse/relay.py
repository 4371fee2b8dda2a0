"""The kernel's requests, taken from the device one by one: answered here, or passed on to pyfuse3.

        /dev/fuse ──► Relay ──► Answers    names, attributes, listings: at once
            ▲           ├─────► Reads      data: at once, or when it is here
            │           ├─────► Notices    changes that mean something, and are none
            │           └─────► socket ──► pyfuse3 (operations)
            └────────── replies ◄─────────────┘

A request costs pyfuse3 a lock, a wait and a task of trio's; here it is a wait, or nothing while
there are others. And only here can opening files cost nothing: the kernel stops asking if it is
told so, but then has no handle to give back, and a handle is all that pyfuse3 is told of a file.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

import trio

from snapshotter.fuse import device, wire
from snapshotter.fuse.notices import Notices
from snapshotter.fuse.reads import Reads
from snapshotter.fuse.waiters import Waiters
from snapshotter.fuse.wire import IN_HEADER, Opcode

if TYPE_CHECKING:
    import socket

    from snapshotter.fuse.answers import Answers
    from snapshotter.fuse.failures import FailureLog
    from snapshotter.fuse.view import Views

# The kernel wants room for the largest write, although there are none; pages that are not used
# take no memory.
_BUFFER = wire.MAX_TRANSFER + 4096

# Everything else in the daemon waits while requests are answered: a checkpoint after so many, of
# which each counts 1, and each 32 KiB of data 1 more. A checkpoint costs as much as half a LOOKUP.
_BURST = 8
# Who walks a tree asks again at once, and trio's way to wait for that costs more than the answer.
# Not while somebody waits for data: then there is other work.
_LINGER_SECONDS = 50e-6
_DATA_SHIFT = 15

_HANDLES = frozenset((Opcode.READ, Opcode.READDIRPLUS))
"""What is passed on with a handle; it begins what comes after the header."""


class Relay:
    """Between the kernel at `fuse` and pyfuse3 at the other end of `library`; see above."""

    def __init__(
        self,
        fuse: int,
        library: socket.socket,
        answers: Answers,
        views: Views,
        failures: FailureLog,
    ) -> None:
        """`fuse` is an open device, `library` a socket that keeps messages apart. Neither blocks,
        and neither is closed here. Requests are counted in `views`."""
        self._fuse = fuse
        self._library = library
        self._answers = answers
        self._views = views
        self._failures = failures

    async def run(self) -> None:
        """Answer until cancelled, or until the mount is gone."""
        async with trio.open_nursery() as nursery:
            waiters = Waiters(self._fuse, nursery)
            nursery.start_soon(self._copy_replies, waiters, nursery)
            reads = Reads(self._fuse, self._failures, waiters, nursery)
            notices = Notices(self._fuse, self._views, self._failures, waiters, nursery)
            try:
                await self._take_requests(waiters, reads, notices)
            except device.DisconnectedError:
                nursery.cancel_scope.cancel()

    async def _take_requests(self, waiters: Waiters, reads: Reads, notices: Notices) -> None:
        buffer = bytearray(_BUFFER)
        request = memoryview(buffer)
        buffers = (buffer,)
        fuse, answers, views = self._fuse, self._answers, self._views
        left = _BURST
        while True:
            # Mostly one process asks, and the next request is not here yet: to find that out by
            # reading costs more.
            if not device.wait(fuse, 0.0 if waiters.any else _LINGER_SECONDS):
                await trio.lowlevel.wait_readable(fuse)
                left = _BURST
            try:
                length = device.read(fuse, buffers)
            except BlockingIOError:
                continue
            left -= 1
            if length:
                views.requests += 1
                opcode, unique, nodeid = wire.REQUEST.unpack_from(buffer)
                body = request[IN_HEADER.size : length]
                if opcode == Opcode.READ and (view := answers.view(nodeid)) is not None:
                    (thread,) = wire.THREAD.unpack_from(buffer)
                    offset, size = wire.READ_IN.unpack_from(body)
                    left -= size >> _DATA_SHIFT
                    reads.begin(view, unique, nodeid, thread, offset, size)
                    view = None  # or an image that goes would stay until somebody reads another
                    await waiters.wait_for_room()
                elif opcode == Opcode.INTERRUPT:
                    waiters.interrupt(*wire.INTERRUPT_IN.unpack_from(body))
                elif (reply := answers.answer(opcode, unique, nodeid, body)) is None:
                    (thread,) = wire.THREAD.unpack_from(buffer)
                    changes = opcode in wire.CHANGED_NAME
                    if not changes or not notices.begin(opcode, unique, nodeid, thread, body):
                        await self._pass_on(buffer, length, waiters)
                elif reply:
                    device.write(fuse, reply)
            if left <= 0:
                await trio.lowlevel.checkpoint()
                left = _BURST

    async def _pass_on(self, buffer: bytearray, length: int, waiters: Waiters) -> None:
        """Give a request to pyfuse3, which reads what is in the handle."""
        opcode, unique, nodeid = wire.REQUEST.unpack_from(buffer)
        if opcode in _HANDLES:
            wire.HANDLE.pack_into(buffer, IN_HEADER.size, nodeid)
        (thread,) = wire.THREAD.unpack_from(buffer)
        await waiters.wait_for_room()
        waiters.add(unique, thread, partial(self._give_up, unique, waiters))
        message = memoryview(buffer)[:length]
        while True:
            try:
                self._library.send(message)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._library)
            else:
                return

    def _give_up(self, unique: int, waiters: Waiters) -> None:
        """Answer for pyfuse3, whose own answer the kernel will refuse."""
        device.write(self._fuse, wire.error_reply(unique, errno.EINTR))
        waiters.remove(unique)

    async def _copy_replies(self, waiters: Waiters, nursery: trio.Nursery) -> None:
        """Give the kernel what pyfuse3 says: answers, and notifications."""
        buffer = memoryview(bytearray(_BUFFER))
        while True:
            try:
                length = self._library.recv_into(buffer)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._library)
                continue
            _, _, unique = wire.OUT_HEADER.unpack_from(buffer)
            if unique:
                waiters.remove(unique)
                device.write(self._fuse, buffer[:length])
            else:
                nursery.start_soon(self._notify, bytes(buffer[:length]))

    async def _notify(self, message: bytes) -> None:
        """In a thread: the kernel may hold a lock that it needs for this, in a request that is yet
        to be answered here."""
        await trio.to_thread.run_sync(device.write, self._fuse, message, abandon_on_cancel=True)
