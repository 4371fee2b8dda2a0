"""How much of this machine's processors nobody uses. Source: proc_stat(5)."""

from __future__ import annotations

import math
import os
import time

_HEAD = 256  # bytes that hold the first line, which counts all processors together
_IDLE, _WAITING = 4, 5  # its words


class Processors:
    """Counts from one look to the next."""

    def __init__(self) -> None:
        self._idle, self._at = _idle_seconds(), time.monotonic()

    def spare(self) -> float:
        """How many processors were idle since the last look; inf if that cannot be told."""
        idle, now = _idle_seconds(), time.monotonic()
        passed, spent = now - self._at, idle - self._idle
        self._idle, self._at = idle, now
        return spent / passed if passed > 0 and math.isfinite(idle) else math.inf


def _idle_seconds() -> float:
    """Of all processors together, since the machine's start; inf where there is no such file."""
    try:
        descriptor = os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return math.inf
    try:
        words = os.read(descriptor, _HEAD).split()
    finally:
        os.close(descriptor)
    return (int(words[_IDLE]) + int(words[_WAITING])) / os.sysconf("SC_CLK_TCK")
