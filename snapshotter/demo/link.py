"""A network link of limited bandwidth between this machine and the registry on it.

On loopback alone a full pull costs next to no time, which is not how images arrive on nodes. This
relay passes connections on to the registry and delays what comes back, so that all connections
together get a given rate. Delay is not modelled.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

_BURST_SECONDS = 0.005  # of idle time that may be made up for: sleeps end late
_PIECE = 16 << 10  # bytes passed on at once: 0.7 ms at 200 Mbit/s
_STOP_SECONDS = 5.0


class Link:
    """Listens on `host` (HOST:PORT) and relays to `target`, at `rate` bytes a second coming back.

    `carried` is how many bytes have come back so far. Works until `stop`.
    """

    def __init__(self, target: str, rate: float) -> None:
        address, _, port = target.rpartition(":")
        self._target = address, int(port)
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self.carried = 0
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Close the listener and all connections; fine if that was done."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(_STOP_SECONDS)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # stopped
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            with self._lock:
                self._open |= {client, server}
            for end in (client, server):
                # else the end of each answer waits 40 ms for the delayed ACK of what came before
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            up = threading.Thread(target=self._pass, args=(client, server), daemon=True)
            up.start()
            self._pass(server, client, delay=True)
            up.join()
            with self._lock:
                self._open -= {client, server}

    def _pass(self, source: socket.socket, sink: socket.socket, *, delay: bool = False) -> None:
        """Until either side ends; the other one is told then."""
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE):
                if delay:
                    self._wait_turn(len(data))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _wait_turn(self, size: int) -> None:
        """Wait until the link has carried these bytes too, after all that are before them."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() - _BURST_SECONDS)
            self._free_at += size / self._rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        with self._lock:
            self.carried += size
