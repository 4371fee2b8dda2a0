"""The link that slows the way from the registry down."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from snapshotter.demo.link import Link

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 20.0
FAST = 1e9  # bytes a second


@contextmanager
def echo_server() -> Iterator[str]:
    """Sends back what it gets, until its client has no more to say."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)


def connect(link: Link) -> socket.socket:
    address, _, port = link.host.rpartition(":")
    return socket.create_connection((address, int(port)), SECONDS)


def exchange(connection: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    answer = bytearray()
    while len(answer) < len(data):
        answer += connection.recv(1 << 16)
    sender.join()
    return bytes(answer)


def test_bytes_pass_unchanged_and_are_counted() -> None:
    data = bytes(range(256)) * 4000
    with echo_server() as server:
        link = Link(server, FAST)
        with connect(link) as connection:
            assert exchange(connection, data) == data
        assert link.carried == len(data)
        link.stop()


def test_it_is_never_faster_than_its_rate() -> None:
    data, rate = bytes(400_000), 1e6
    with echo_server() as server:
        link = Link(server, rate)
        with connect(link) as connection:
            start = time.monotonic()
            exchange(connection, data)
            assert time.monotonic() - start >= 0.95 * len(data) / rate
        link.stop()


def test_an_end_that_goes_away_is_seen_by_the_other() -> None:
    with echo_server() as server:
        link = Link(server, FAST)
        with connect(link) as connection:
            assert exchange(connection, b"x") == b"x"
            link.stop()
            assert connection.recv(1) == b""


def test_without_a_target_connections_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    link = Link(f"127.0.0.1:{port}", FAST)
    with connect(link) as connection:
        assert connection.recv(1) == b""
    link.stop()
    link.stop()
