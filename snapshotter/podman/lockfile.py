"""The lock files of containers/storage, as its `pkg/lockfile` has them.

Each JSON file of a graph root has a lock file beside it. Readers and writers take POSIX record
locks on all of it. It holds 64 bytes that name the last writer: a long-lived reader (podman's
service, CRI-O) compares them with those that it saw, and reads the JSON again if they differ.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from snapshotter.store.errors import StoreError, store_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_WRITER_BYTES = 64
_WAIT_SECONDS = 30.0  # readers hold the lock while they parse, and while they add up a layer's size
_POLL_SECONDS = 0.01


@contextmanager
def locked_for_writing(path: Path) -> Iterator[None]:
    """Hold a lock file, made if it is not there; afterwards it names a new writer.

    For one thread of a process at a time, as POSIX locks are. Blocks. Raises StoreError.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise store_error(error, path, "cannot open the lock file") from error
    try:
        _acquire(handle, path)
        try:
            yield
        finally:  # what was written may be seen even if not all was
            os.pwrite(handle, os.urandom(_WRITER_BYTES), 0)
    finally:
        os.close(handle)  # which releases the lock


def _acquire(handle: int, path: Path) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise store_error(error, path, "cannot lock") from error
        else:
            return
        if time.monotonic() > deadline:
            raise StoreError(
                f"{path} is locked for more than {_WAIT_SECONDS:.0f} s",
                hint=f"end the podman that hangs (fuser -v {path} lists it), and try again",
            )
        time.sleep(_POLL_SECONDS)
