"""A network link as those who use it see it: the relay by itself, and all of it with a registry."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from snapshotter.bench.link.counters import Carried, Counters
from snapshotter.bench.link.link import DistantRegistry
from snapshotter.bench.link.namespaces import Connector
from snapshotter.bench.link.profiles import LinkProfile
from snapshotter.bench.link.relay import Relay, Route
from snapshotter.demo.interruption import Interruption
from snapshotter.demo.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECONDS = 20.0
QUICK = LinkProfile(1e9, 0.0)
RTT = 0.1
FAR = LinkProfile(1e9, RTT)
GET = b"GET / HTTP/1.1\r\n\r\n"


class Relayed:
    """A relay in a thread, and what it has counted."""

    def __init__(self, counters: Counters, relay: Relay, port: int) -> None:
        self._counters = counters
        self.relay = relay
        self._port = port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), SECONDS)

    def carried(self, enough: Callable[[Carried], bool]) -> Carried:
        """Once there is enough: it is told when the turn is over that has passed bytes on."""
        end = time.monotonic() + SECONDS
        while not enough(carried := self._counters.read()) and time.monotonic() < end:
            time.sleep(0.005)
        return carried


@contextmanager
def echo_server() -> Iterator[tuple[str, int]]:
    """Sends back what it gets, until its client has no more to say."""

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with ExitStack() as opened:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                opened.enter_context(connection)
                thread = threading.Thread(target=answer, args=(connection,))
                thread.start()
                opened.callback(thread.join, SECONDS)
                opened.callback(end, connection)

    def end(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)


@contextmanager
def relayed(target: tuple[str, int], profile: LinkProfile, directory: Path) -> Iterator[Relayed]:
    def connect() -> socket.socket:
        made = socket.socket()
        made.setblocking(False)
        made.connect_ex(target)
        return made

    counters = Counters(directory / "counters")
    relay = Relay(counters)
    stop, stopped = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener, stop, stopped:
        relay.watch(stopped.fileno(), 1, lambda _: relay.stop())
        relay.listen(listener, Route(connect, profile))
        thread = threading.Thread(target=relay.run)
        thread.start()
        yield Relayed(counters, relay, listener.getsockname()[1])
        stop.send(b"x")
        thread.join(SECONDS)
        assert not thread.is_alive()


def receive(connection: socket.socket, count: int) -> bytes:
    answer = bytearray()
    while len(answer) < count and (data := connection.recv(1 << 16)):
        answer += data
    return bytes(answer)


def send_until_it_fails(connection: socket.socket) -> None:
    while True:
        connection.sendall(bytes(100_000))


def test_bytes_pass_unchanged_both_ways_in_many_connections(tmp_path: Path) -> None:
    rng = random.Random(1)
    contents = [rng.randbytes(rng.randrange(1, 3_000_000)) for _ in range(8)]

    def send(connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    with (
        echo_server() as server,
        relayed(server, LinkProfile(1e9, 0.002), tmp_path) as link,
        ExitStack() as opened,
    ):
        connections = [opened.enter_context(link.connect()) for _ in contents]
        senders = [
            threading.Thread(target=send, args=pair)
            for pair in zip(connections, contents, strict=True)
        ]
        for sender in senders:
            sender.start()
        for connection, data in zip(connections, contents, strict=True):
            assert receive(connection, len(data) + 1) == data  # and then the end
        for sender in senders:
            sender.join(SECONDS)
        size = sum(map(len, contents))
        carried = link.carried(lambda carried: carried.down == size)
    assert carried == Carried(size, size, 0, len(contents), 0)


def test_a_new_connection_costs_a_round_trip_and_every_exchange_one(tmp_path: Path) -> None:
    with echo_server() as server, relayed(server, FAR, tmp_path) as link:
        began = time.monotonic()
        with link.connect() as connection:
            times = []
            for _ in range(3):
                connection.sendall(GET)
                assert receive(connection, len(GET)) == GET
                times.append(time.monotonic() - began)
        carried = link.carried(lambda carried: carried.requests == 3)
    assert times[0] >= 2 * RTT
    assert times[1] - times[0] >= RTT
    assert times[2] - times[1] >= RTT
    assert carried == Carried(3 * len(GET), 3 * len(GET), 3, 1, 0)


def test_the_delay_is_of_the_way_and_not_of_each_piece(tmp_path: Path) -> None:
    count = 200
    with echo_server() as server, relayed(server, FAR, tmp_path) as link, link.connect() as far:
        began = time.monotonic()
        for _ in range(count):
            far.sendall(b"x" * 1000)
            time.sleep(0.001)
        assert len(receive(far, count * 1000)) == count * 1000
        # Each for itself would take twice that: far from what a busy machine adds.
        assert time.monotonic() - began < count * RTT / 2


def test_failed_requests_do_not_arrive_and_others_do(tmp_path: Path) -> None:
    count = 60
    with (
        echo_server() as server,
        relayed(server, LinkProfile(1e9, 0.0, 0.5), tmp_path) as link,
        link.connect() as connection,
    ):
        link.relay.chances.seed(1)
        answers = []
        for _ in range(count):
            connection.sendall(GET)
            answers.append(connection.recv(1000))
        carried = link.carried(lambda carried: carried.requests == count)
    failures = sum(answer.startswith(b"HTTP/1.1 503 ") for answer in answers)
    assert answers.count(GET) == count - failures
    assert count / 4 < failures < 3 * count / 4
    assert carried.failed == failures


def test_a_server_that_is_not_there_ends_connections(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        target = unused.getsockname()
    with (
        relayed(target, QUICK, tmp_path) as link,
        link.connect() as connection,
        contextlib.suppress(ConnectionResetError),  # just as good as an end
    ):
        assert connection.recv(1) == b""


def test_a_client_that_goes_away_in_mid_answer_is_told_to_the_server(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        relayed(listener.getsockname(), QUICK, tmp_path) as link,
    ):
        connection = link.connect()
        server, _ = listener.accept()
        with server:
            server.settimeout(SECONDS)
            server.sendall(b"x" * 1000)
            assert connection.recv(10)
            connection.close()  # with bytes unread: a reset
            with pytest.raises(ConnectionError):
                send_until_it_fails(server)


def test_a_client_that_does_not_read_holds_the_server_back(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        relayed(listener.getsockname(), QUICK, tmp_path) as link,
        link.connect() as connection,
    ):
        server, _ = listener.accept()
        with server:
            server.settimeout(0.3)
            sent = 0
            with contextlib.suppress(TimeoutError):
                while sent < 1 << 28:
                    sent += server.send(bytes(1 << 20))
            assert sent < 1 << 28
            assert len(receive(connection, sent)) == sent


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    warnings: list[str] = []
    with Interruption() as interruption, Workspace(interruption, warnings.append) as workspace:
        yield workspace
    assert warnings == []


@pytest.mark.root
def test_a_registry_at_the_far_end(workspace: Workspace) -> None:
    """Requests to it are slow, bytes from it no faster than the link, and it goes without trace."""
    rate, size = 40e6, 2_000_000
    distant = DistantRegistry(workspace, LinkProfile(rate, RTT))
    blob = put_blob(distant.direct, os.urandom(size))
    assert distant.link.carried() == Carried(0, 0, 0, 0, 0)

    began = time.monotonic()
    assert len(get(distant.host, blob)) == size
    assert time.monotonic() - began >= 2 * RTT + 0.9 * size / (rate / 8)
    carried = distant.link.carried()
    assert size < carried.down < size + 1000
    assert (carried.requests, carried.connections) == (1, 1)

    slow = LinkProfile(1e9, 2 * RTT)
    distant.link.change(slow)
    began = time.monotonic()
    assert len(get(distant.host, blob)) == size
    assert time.monotonic() - began >= 2 * slow.rtt

    connector = Connector(distant.link.far)
    connector.connect(5000, SECONDS).close()
    connector.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 5000), SECONDS)

    distant.link.stop()
    assert not distant.link.near.exists()


@pytest.mark.root
def test_a_command_runs_beside_a_link_and_gives_its_exit_status() -> None:
    script = "curl -s http://$FIRSTBYTE_LINK/v2/ http://$FIRSTBYTE_DIRECT/v2/; exit 7"
    command = [sys.executable, "-m", "snapshotter.cli.main", "bench", "link"]
    command += ["--profile", "100mbit-1ms", "--", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 7, done.stderr
    assert done.stdout == "{}{}"
    assert "1 requests (0 failed), 1 connections" in done.stderr


def put_blob(host: str, data: bytes) -> str:
    """Upload a blob by hand; where it can be got."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    connection = http.client.HTTPConnection(host, timeout=SECONDS)
    connection.request("POST", "/v2/bench/blobs/uploads/")
    answer = connection.getresponse()
    answer.read()
    connection.request("PUT", f"{answer.headers['Location']}&digest={digest}", data)
    answer = connection.getresponse()
    assert answer.status == http.HTTPStatus.CREATED, answer.read()
    connection.close()
    return f"/v2/bench/blobs/{digest}"


def get(host: str, path: str) -> bytes:
    connection = http.client.HTTPConnection(host, timeout=SECONDS)
    connection.request("GET", path)
    data = connection.getresponse().read()
    connection.close()
    return data
