"""Network namespaces without a name: they are there as long as somebody holds a descriptor of one.

Sources: network_namespaces(7), setns(2), unshare(2), timerfd_create(2) for what Python 3.11 lacks.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

_CLONE_NEWNET = 0x4000_0000  # linux/sched.h
_CLOCK_MONOTONIC = 1  # linux/time.h, time.monotonic's
_TFD_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_TFD_TIMER_ABSTIME = 1
_ITIMERSPEC = struct.Struct("=4q")  # interval, then first expiration: seconds, nanoseconds
_NANOSECONDS = 1_000_000_000


def enter(descriptor: int) -> None:
    """Have this thread make its sockets in the network namespace of a descriptor."""
    _check(_libc.setns(descriptor, _CLONE_NEWNET), "setns")


def make() -> int:
    """Enter a new network namespace with this thread; a descriptor of it."""
    _check(_libc.unshare(_CLONE_NEWNET), "unshare")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


class Timer:
    """A descriptor that can be read once a time has come, exact to microseconds: the timeouts of
    epoll are whole milliseconds."""

    def __init__(self) -> None:
        self.descriptor = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC)
        _check(self.descriptor, "timerfd_create")

    def set(self, when: float | None) -> None:
        """To a time of time.monotonic, or to none. What was set before is forgotten."""
        # A time of 0 would be none at all.
        nanoseconds = 0 if when is None else max(1, int(when * _NANOSECONDS))
        seconds, rest = divmod(nanoseconds, _NANOSECONDS)
        value = _ITIMERSPEC.pack(0, 0, seconds, rest)
        _check(
            _libc.timerfd_settime(self.descriptor, _TFD_TIMER_ABSTIME, value, None),
            "timerfd_settime",
        )


class Connector:
    """Connects to ports on the loopback of another network namespace; call `close` at the end."""

    def __init__(self, namespace: Path) -> None:
        # A socket stays in the namespace where it was made, whoever uses it then; only threads
        # are moved about.
        self._thread = ThreadPoolExecutor(1, initializer=partial(_enter_path, namespace))

    def connect(self, port: int, seconds: float) -> socket.socket:
        """Raises OSError."""
        return self._thread.submit(socket.create_connection, ("127.0.0.1", port), seconds).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def _enter_path(namespace: Path) -> None:
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        enter(descriptor)
    finally:
        os.close(descriptor)


def _check(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
