"""How far the kernel reads ahead on an EROFS mount of plain files.

Such a mount has a device of its own for that (`erofs-N` in /sys/class/bdi), and nothing says which
mount has which: it is the one that has appeared.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

_DEVICES = Path("/sys/class/bdi")
_PREFIX = "erofs-"
_one_at_a_time = threading.Lock()


@contextmanager
def read_ahead(kib: int) -> Iterator[None]:
    """Set the read-ahead of the one EROFS that is made in the block, by this or any process.

    If it cannot be told which that is, or set, files are read in smaller pieces, and nothing else.
    """
    with _one_at_a_time:
        before = _devices()
        yield
        made = _devices() - before
    if len(made) != 1:
        log.info("read-ahead stays as it is: %d EROFS mounts were made at once", len(made))
        return
    (device,) = made
    try:
        (_DEVICES / device / "read_ahead_kb").write_text(str(kib))
    except OSError as error:
        log.info("read-ahead of %s stays as it is: %s", device, error.strerror)


def _devices() -> set[str]:
    try:
        return {name for name in os.listdir(_DEVICES) if name.startswith(_PREFIX)}
    except OSError:  # no /sys here
        return set()
