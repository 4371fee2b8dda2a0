"""Relays TCP connections, with a delay in each direction, in one thread.

Each byte is held back by half a round trip on its way, so one request costs a whole one, however
many go side by side. A new connection costs another: what its client says waits until the handshake
would have been over. Bandwidth is not this module's business but the kernel's, on the way to the
registry (`network.py`). What TCP does with a delay (slow start, retransmissions) is not modelled.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import select
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshotter.bench.link.counters import Carried
from snapshotter.bench.link.delay import DelayLine, End
from snapshotter.bench.link.namespaces import Timer
from snapshotter.bench.link.requests import RequestFinder

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.bench.link.counters import Counters
    from snapshotter.bench.link.profiles import LinkProfile

_PIECE = 128 << 10  # bytes read at once: 1 ms at 1 Gbit/s
_MIN_LIMIT = 1 << 20  # bytes on their way in one direction of one connection, at least
_FAILURE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
_BROKEN_EVENTS = select.EPOLLERR | select.EPOLLHUP


@dataclass(slots=True)
class Route:
    """Where connections of one listener go. `connect` gives a non-blocking socket that is
    connecting. Without a `profile` they are neither delayed nor counted; one that is changed is
    for connections that come afterwards."""

    connect: Callable[[], socket.socket]
    profile: LinkProfile | None = None


class Relay:
    """Works from `run` until `stop`."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._epoll = select.epoll()
        self._timer = Timer()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._due: list[tuple[float, int, _Pipe]] = []
        self._order = itertools.count()
        self._open: set[_Connection] = set()
        self._running = True
        self.chances = random.Random()  # noqa: S311  (of failures)
        self.down = self.up = self.requests = self.connections = self.failed = 0
        self.watch(self._timer.descriptor, select.EPOLLIN, self._on_timer)

    def listen(self, listener: socket.socket, route: Route) -> None:
        """Relay what connects to a listening socket."""
        listener.setblocking(False)
        self.watch(listener.fileno(), select.EPOLLIN, lambda _: self._accept(listener, route))

    def watch(self, descriptor: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler` with the events of a descriptor."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, events)

    def change(self, descriptor: int, events: int) -> None:
        """Watch a descriptor for other events."""
        self._epoll.modify(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """Watch a descriptor no more; fine if it is not watched."""
        if self._handlers.pop(descriptor, None):
            self._epoll.unregister(descriptor)

    def schedule(self, pipe: _Pipe, due: float) -> None:
        """Have a pipe pass on what it holds when the time has come."""
        heapq.heappush(self._due, (due, next(self._order), pipe))

    def run(self) -> None:
        """Until `stop`, which a handler may call; then all connections are closed."""
        while self._running:
            self._timer.set(self._due[0][0] if self._due else None)
            for descriptor, events in self._epoll.poll():
                # One event of a turn may end what another one is about.
                if handler := self._handlers.get(descriptor):
                    handler(events)
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2].pass_on(now, timed=True)
            self._counters.write(
                Carried(self.down, self.up, self.requests, self.connections, self.failed)
            )
        for connection in tuple(self._open):
            connection.close()

    def stop(self) -> None:
        """Return from `run`."""
        self._running = False

    def closed(self, connection: _Connection) -> None:
        """Forget a connection."""
        self._open.discard(connection)

    def _on_timer(self, _: int) -> None:
        os.read(self._timer.descriptor, 8)

    def _accept(self, listener: socket.socket, route: Route) -> None:
        try:
            client, _ = listener.accept()
        except OSError:
            return  # it has gone away again
        client.setblocking(False)
        self.connections += route.profile is not None
        self._open.add(_Connection(self, client, route.connect(), route.profile))


class _Connection:
    def __init__(
        self, relay: Relay, client: socket.socket, server: socket.socket, link: LinkProfile | None
    ) -> None:
        self.relay = relay
        self.link = link
        self.rtt = link.rtt if link else 0.0
        self.usable_at = time.monotonic() + self.rtt  # the handshake is over
        held = int(2 * link.bandwidth / 8 * link.rtt) if link else 0
        limit = max(_MIN_LIMIT, held)
        self.up = _Pipe(self, client, server, limit)
        self.down = _Pipe(self, server, client, limit)
        self._ends = ((client, self.up, self.down), (server, self.down, self.up))
        self._watched = dict.fromkeys((client, server), select.EPOLLIN)
        self._closed = False
        for end, outgoing, _ in self._ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            relay.watch(end.fileno(), self._watched[end], outgoing.on_event)
        self._finder = RequestFinder()

    def opposite(self, pipe: _Pipe) -> _Pipe:
        return self.down if pipe is self.up else self.up

    def take_in(self, pipe: _Pipe, data: bytes, now: float) -> None:
        """Send on its way what came into a pipe."""
        relay, arrival = self.relay, max(now, self.usable_at) + self.rtt / 2
        if not self.link:
            pipe.put(data, now)
        elif pipe is self.down:
            relay.down += len(data)
            pipe.put(data, arrival)
        else:
            relay.up += len(data)
            for piece in self._finder.feed(data):
                relay.requests += piece.begins
                if piece.whole and relay.chances.random() < self.link.failures:
                    relay.failed += 1
                    relay.down += len(_FAILURE)
                    self.down.put(_FAILURE, arrival + self.rtt / 2)
                else:
                    pipe.put(piece.data, arrival)

    def update(self) -> None:
        """Watch both ends for what they are wanted for."""
        if self._closed:
            return
        for end, outgoing, incoming in self._ends:
            if outgoing.gone:
                self.relay.forget(end.fileno())
                continue
            events = select.EPOLLIN if outgoing.open and not outgoing.line.full else 0
            events |= select.EPOLLOUT if incoming.stuck else 0
            if events != self._watched[end]:
                self._watched[end] = events
                self.relay.change(end.fileno(), events)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.relay.closed(self)
            for end, pipe, _ in self._ends:
                self.relay.forget(end.fileno())
                pipe.line.clear()
                end.close()

    @property
    def closed(self) -> bool:
        return self._closed


class _Pipe:
    """One direction of a connection."""

    def __init__(
        self, connection: _Connection, source: socket.socket, sink: socket.socket, limit: int
    ) -> None:
        self._connection = connection
        self._source = source
        self._sink = sink
        self._scheduled = False
        self._deaf = False  # the sink takes nothing any more
        self._finished = False  # the sink was told the end
        self.line = DelayLine(limit)
        self.open = True  # the source has not ended yet
        self.gone = False  # nor is it of any use
        self.stuck = False  # the sink takes nothing at the moment

    def on_event(self, events: int) -> None:
        """Of the source; that it can be written to is the opposite pipe's business."""
        connection, now = self._connection, time.monotonic()
        if events & select.EPOLLOUT:
            opposite = connection.opposite(self)
            opposite.stuck = False
            opposite.pass_on(now)
        if not connection.closed and events & (select.EPOLLIN | _BROKEN_EVENTS):
            if self.open:
                self._receive(now)
            elif events & _BROKEN_EVENTS:
                self._break(now)
        connection.update()

    def put(self, piece: bytes | End, due: float) -> None:
        if self._deaf:
            return
        self.line.put(piece, due)
        if not self._scheduled and not self.stuck:
            self._schedule()

    def pass_on(self, now: float, *, timed: bool = False) -> None:
        """Give the sink what it is time for."""
        if timed:
            self._scheduled = False
        if self._connection.closed or self.stuck:
            return
        was_full = self.line.full
        while (piece := self.line.ripe(now)) is not None:
            if isinstance(piece, End):
                self.line.take()
                self._end(piece)  # may close everything, and so empty the line
                continue
            try:
                sent = self._sink.send(piece)
            except BlockingIOError:
                self.stuck = True
                break
            except OSError:
                self._lose_sink(now)
                break
            self.line.take(sent)
        if self.stuck or was_full:
            self._connection.update()
        if not self.stuck and not self._scheduled:
            self._schedule()

    def _schedule(self) -> None:
        if self.line.due is not None:
            self._scheduled = True
            self._connection.relay.schedule(self, self.line.due)

    def _receive(self, now: float) -> None:
        try:
            data = self._source.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            self._break(now)
            return
        if data:
            self._connection.take_in(self, data, now)
        else:
            self.open = False
            self.put(End.FINISHED, now + self._connection.rtt / 2)
            if self._deaf:
                self._connection.close()

    def _break(self, now: float) -> None:
        self.open = False
        self.gone = True
        self.put(End.BROKEN, now + self._connection.rtt / 2)
        if self._deaf:
            self._connection.close()

    def _lose_sink(self, now: float) -> None:
        """What comes from the source is of no use now; it is told, as late as anything else."""
        self._deaf = True
        self.line.clear()
        opposite = self._connection.opposite(self)
        if opposite.open or not opposite.gone:
            opposite._break(now)

    def _end(self, end: End) -> None:
        connection = self._connection
        self._finished = True
        if end is End.BROKEN or connection.opposite(self)._finished:
            connection.close()
            return
        try:
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            connection.close()
