"""What the daemon tells systemd: sd_notify(3), as datagrams to the socket $NOTIFY_SOCKET."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = logging.getLogger(__name__)

READY = "READY=1"
STOPPING = "STOPPING=1"
_WATCHDOG = "WATCHDOG=1"
_SEND_SECONDS = 5.0


def under_systemd() -> bool:
    """Whether somebody wants to be told."""
    return "NOTIFY_SOCKET" in os.environ


def notify(state: str, descriptors: Sequence[int] = ()) -> None:
    """Tell systemd, if it listens; lines of KEY=VALUE. Not being heard is logged."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract sockets
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(_SEND_SECONDS)
            channel.connect(address)
            socket.send_fds(channel, [state.encode()], list(descriptors))
    except OSError as error:
        log.warning("systemd is not told %r: %s", state.partition("\n")[0], error)


def watchdog_seconds() -> float | None:
    """How often systemd wants a sign of life from this process, at least; None if it does not."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 1e6 if text.isdecimal() and int(text) > 0 else None


async def beat(check: Callable[[], Awaitable[None]]) -> None:
    """Give systemd signs of life for as long as `check` returns in time; ends if it wants none.

    `check` may hang: then there is no sign, and systemd acts.
    """
    interval = watchdog_seconds()
    if interval is None:
        return
    while True:
        with trio.move_on_after(interval / 2) as late:
            await check()
        if not late.cancelled_caught:
            notify(_WATCHDOG)
        await trio.sleep(interval / 3)
