"""A server that was killed while one of its own threads asked its mount for something.

The thread waits for an answer, which not even SIGKILL ends once the request was read, and with it
the process keeps its locks. Only somebody else can answer it, who has the device.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from snapshotter.fuse.handshake import RESEND
from snapshotter.fuse.wire import IN_HEADER, OUT_HEADER

_REQUEST_BUFFER = 2 << 20  # more than the largest request; the kernel refuses to be read with less


def is_dying(pid: int) -> bool:
    """Whether a process has been killed and is not gone, because some of its threads are not."""
    try:
        # "PID (NAME) STATE …", where the name may hold anything
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state == "Z" and len(_threads(pid)) > 1


def let_go(device: int, pid: int) -> None:
    """Fail what the threads of a dying process wait for; it can end then.

    What others wait for is read as well, and stays unanswered: whoever serves the mount next has it
    delivered again (RESEND). Without Linux 6.9 this changes nothing.
    """
    with suppress(OSError):  # EAGAIN: that was all
        os.write(device, RESEND)
        while True:
            _, _, unique, _, _, _, caller, _, _ = IN_HEADER.unpack_from(
                os.read(device, _REQUEST_BUFFER)
            )
            if caller in _threads(pid):
                os.write(device, OUT_HEADER.pack(OUT_HEADER.size, -errno.EIO, unique))


def _threads(pid: int) -> set[int]:
    try:
        return set(map(int, os.listdir(f"/proc/{pid}/task")))
    except OSError:  # it is gone
        return set()
