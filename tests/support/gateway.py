"""A way to a registry that can be slow, held up, closed and opened again, and counts bytes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PIECE = 16 << 10
_END_SECONDS = 5.0


class Gateway:
    """Relays connections to `target` (HOST:PORT). `host` stays the same while it is closed.

    `carried` is how many bytes have come back so far; `rate` is how many may in a second.
    """

    def __init__(self, target: str, rate: float) -> None:
        address, _, port = target.rpartition(":")
        self._target = address, int(port)
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._flowing = threading.Event()
        self._flowing.set()
        self._hold_at = b""
        self._holding = threading.Event()
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._port = 0
        self.carried = 0
        self.open()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._port}"

    def reference(self, repository: str) -> str:
        """The name of an image as it is pulled this way."""
        return f"{self.host}/{repository}:latest"

    def open(self) -> None:
        """Take connections (again)."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Refuse connections, and end those that are there."""
        if self._listener is None:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(_END_SECONDS)
        self._listener.close()
        self._listener = None
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Closed for as long as the block runs."""
        self.close()
        try:
            yield
        finally:
            self.open()

    @contextmanager
    def held_at(self, request: bytes) -> Iterator[threading.Event]:
        """From the first request that has these bytes in it, which sets the event, no answer comes
        until the end of the block.
        """
        self._hold_at, self._holding = request, threading.Event()
        try:
            yield self._holding
        finally:
            self._hold_at = b""
            self._flowing.set()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            with self._lock:
                self._connections |= {client, server}
            for end in (client, server):
                # else the end of each answer waits 40 ms for the delayed ACK of what came before
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            up = threading.Thread(target=self._pass, args=(client, server), daemon=True)
            up.start()
            self._pass(server, client, back=True)
            up.join()
            with self._lock:
                self._connections -= {client, server}

    def _pass(self, source: socket.socket, sink: socket.socket, *, back: bool = False) -> None:
        """Until either side ends; the other one is told then."""
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE):
                if back:
                    self._flowing.wait()
                    self._wait_turn(len(data))
                elif self._hold_at and self._hold_at in data:
                    self._flowing.clear()
                    self._holding.set()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _wait_turn(self, size: int) -> None:
        with self._lock:
            self.carried += size
            self._free_at = max(self._free_at, time.monotonic()) + size / self._rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


@contextmanager
def gateway(target: str, *, rate: float = 1e9) -> Iterator[Gateway]:
    """A gateway for as long as the block runs; the default rate is no limit."""
    made = Gateway(target, rate)
    try:
        yield made
    finally:
        made.close()
