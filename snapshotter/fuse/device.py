"""/dev/fuse as a server sees it: open, read requests, write answers.

The device is non-blocking. A process that is killed takes its waiting request with it, and if that
happens after the device became readable and before it is read, there is nothing to read any more;
a blocking read would wait with the whole process.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from typing import TYPE_CHECKING

from snapshotter.fuse.wire import data_header
from snapshotter.mounts.errors import MountError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from index.erofs.reader import Buffer
    from snapshotter.fuse.view import Data

log = logging.getLogger(__name__)

FILE_SYSTEM = "fuse.firstbyte"
"""The type of our mounts in /proc/self/mountinfo, on every bind of them too."""

_PATH = "/dev/fuse"
_SELECTABLE = 1024  # FD_SETSIZE; the device is one of the first files that are opened

# ENODEV is an unmount, ECONNABORTED somebody who wrote to /sys/fs/fuse/connections/*/abort.
_GONE = frozenset((errno.ENODEV, errno.ECONNABORTED))
# The request that was to be read is not wanted any more, or it was too large and is answered.
_TAKEN_BACK = frozenset((errno.ENOENT, errno.EINTR))
# Whoever asked is gone (it was killed, or RESEND came between), or the mount is.
_UNWANTED = frozenset((errno.ENOENT, *_GONE))


class DisconnectedError(Exception):
    """The mount is gone everywhere: there will be no more requests."""


def open_device() -> int:
    """A new connection, for a mount to come. Raises MountError."""
    try:
        return os.open(_PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        hint = "run this as root" if os.geteuid() else f"chmod 666 {_PATH}, as udev does it"
        raise MountError(f"no permission to open {_PATH}", hint=hint) from error
    except OSError as error:
        raise MountError(
            f"cannot open {_PATH}: {error.strerror}",
            hint="load the kernel module (modprobe fuse) or give the container the device",
        ) from error


def is_connected(device: int) -> bool:
    """Whether it is still mounted somewhere."""
    poll = select.poll()
    poll.register(device, select.POLLIN)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def wait(device: int, seconds: float) -> bool:
    """Block until there is a request, for so long at most; whether there is one.

    False at once for a number that select(2) cannot take. Costs 1 µs.
    """
    return device < _SELECTABLE and bool(select.select((device,), (), (), seconds)[0])


def read(device: int, buffer: Sequence[bytearray]) -> int:
    """The length of the next request, which is then in the buffer.

    0 if there was one and is not any more. Raises BlockingIOError if there is none, and
    DisconnectedError.
    """
    try:
        return os.readv(device, buffer)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _TAKEN_BACK:
            return 0
        if error.errno in _GONE:
            raise DisconnectedError from error
        raise


def write(device: int, message: Buffer) -> None:
    """Send an answer. It is logged if the kernel does not take it, since somebody then waits."""
    try:
        os.write(device, message)
    except OSError as error:
        _complain(error)


def write_data(device: int, unique: int, data: Data) -> None:
    """Answer a READ, without a copy of the data."""
    try:
        os.writev(device, (data_header(unique, len(data)), data))
    except OSError as error:
        _complain(error)


def _complain(error: OSError) -> None:
    if error.errno not in _UNWANTED:
        log.error("the kernel does not take an answer: %s", error.strerror)
