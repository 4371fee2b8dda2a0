"""What a link has carried, in memory that two processes share: read at any time, without asking."""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT = struct.Struct("=5Q")


class Carried(NamedTuple):
    """Since the link is there. Bytes are those of HTTP, heads and bodies, without TCP's own:
    `down` came from the registry to this machine, `up` went there. `failed` are the requests that
    the link itself answered; they are among the `requests`."""

    down: int
    up: int
    requests: int
    connections: int
    failed: int

    def since(self, earlier: Carried) -> Carried:
        """What was carried after `earlier` was read."""
        return Carried(*(now - before for now, before in zip(self, earlier, strict=True)))


class Counters:
    """In the file at `path`, which is made if it is not there."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_FORMAT.size)
            self._memory = mmap.mmap(file.fileno(), _FORMAT.size)

    def read(self) -> Carried:
        """The newest numbers."""
        return Carried(*_FORMAT.unpack(self._memory[:]))

    def write(self, carried: Carried) -> None:
        """Tell those who read."""
        self._memory[:] = _FORMAT.pack(*carried)
