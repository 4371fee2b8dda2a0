"""A socket that stays when the process behind it is replaced.

gRPC cannot be given a listening socket. So containerd connects to one of ours, which a successor
takes over, and each connection is passed on to gRPC's own, inside of the state directory: while no
daemon runs, containerd's connections wait instead of being refused. That costs a call 0.1 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from pathlib import Path

_CONNECTIONS = 256  # at once; containerd has one, and each costs four descriptors
_PIECE = 64 << 10


async def keep_door(listener: trio.SocketListener, behind: Path) -> None:
    """Pass every connection on to the socket `behind`, until cancelled; the listener stays open."""
    places = trio.CapacityLimiter(_CONNECTIONS)

    async def pass_on(outside: trio.SocketStream) -> None:
        async with places, outside:
            try:
                inside = await trio.open_unix_socket(behind)
            except OSError:  # ending: the caller connects again, and finds a successor
                return
            async with inside, trio.open_nursery() as nursery:
                nursery.start_soon(_pump, outside, inside)
                nursery.start_soon(_pump, inside, outside)

    async with trio.open_nursery() as nursery:
        while True:
            nursery.start_soon(pass_on, await listener.accept())


async def _pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    """Copy one direction to its end. A connection that breaks ends both."""
    try:
        while data := await source.receive_some(_PIECE):
            await sink.send_all(data)
        await sink.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        await trio.aclose_forcefully(source)
        await trio.aclose_forcefully(sink)
