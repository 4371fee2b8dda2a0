"""Whether anybody else has a file open: asked of the kernel, which knows for certain.

A native mount keeps the raw files of its layers open, in whichever mount namespace it is, also when
it was detached and only a container still uses it, and whichever daemon has made it. The mount
table shows none of that. But a write lease (fcntl(2), F_SETLEASE) is granted only if nobody else
has the file open, and who opens it while we have the lease waits until we give it back.
"""

from __future__ import annotations

import fcntl
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# fcntl.h; Python has neither. On every architecture of Linux.
_F_SETSIG = 10
_F_SETLEASE = 1024


@contextmanager
def sole_access(descriptor: int) -> Iterator[bool]:
    """Whether this descriptor, open for writing, is the only one of its file.

    If it is, it stays that while the block runs: who opens the file waits for us, for
    /proc/sys/fs/lease-break-time (45 s) at most. False where the file system knows no leases, too.
    """
    try:
        # Who waits for us makes the kernel send a signal, which would be a deadly SIGIO.
        fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, _F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.fcntl(descriptor, _F_SETLEASE, fcntl.F_UNLCK)


def is_open_elsewhere(path: Path) -> bool:
    """Whether anybody has a file open; one that is not there nobody has."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        with sole_access(descriptor) as alone:
            return not alone
    finally:
        os.close(descriptor)
