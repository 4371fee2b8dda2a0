"""The command line's end of the control socket; starts the daemon when none runs.

It blocks, and does without trio: a command does one thing, and importing trio would be half of what
`firstbyte status` takes.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from snapshotter.daemon import protocol
from snapshotter.daemon.config import encode
from snapshotter.daemon.errors import ControlProtocolError, DaemonError
from snapshotter.daemon.places import locked

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.daemon.config import Config
    from snapshotter.daemon.places import Places
    from snapshotter.daemon.protocol import FromDaemon, Reply, Request

_GREETING_SECONDS = 30.0  # it took 10 where 200 mounts at once met a machine with a load of 20
_START_SECONDS = 60.0  # a predecessor may be ending, and a slow disk has libraries to read
_END_SECONDS = 20.0  # a daemon that ends by itself has only its own mount left to take down
_POLL_SECONDS = 0.02
_RECEIVE = 64 << 10


def ask(
    places: Places,
    request: Request,
    *,
    start: Config | None,
    on_progress: Callable[[protocol.Progress], None] = lambda _: None,
    within: float = math.inf,
) -> Reply | None:
    """Send one request and wait for its reply; None if no daemon runs and none is to be started.

    `start` is the configuration for one that is started. `within` is how many seconds a daemon
    that runs may take to greet, and then to reply.

    An exception meanwhile, such as KeyboardInterrupt, interrupts the request in the daemon too.
    Raises DaemonError, with the daemon's own words if it refused, and TimeoutError.
    """
    of_any_version = isinstance(request, protocol.HandOverRequest | protocol.StopRequest)
    connection = _connect(places, of_any_version=of_any_version, within=within)
    if connection is None and start is not None:
        _start(places, start)
        connection = _connect(places)
        if connection is None:
            raise DaemonError("the daemon ended right after its start", hint=f"see {places.log}")
    if connection is None:
        return None
    with connection:
        deadline = time.monotonic() + within
        connection.send(request)
        while isinstance(message := connection.receive(deadline), protocol.Progress):
            on_progress(message)
    if isinstance(message, protocol.Failed):
        raise DaemonError(message.message, hint=message.hint)
    if isinstance(message, protocol.Hello):
        raise ControlProtocolError("the daemon greeted twice")
    return message


def wait_ended(places: Places) -> None:
    """Wait until the daemon of these places is gone, for a while at most."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        with locked(places.daemon_lock) as free:
            if free:
                return
        time.sleep(_POLL_SECONDS)


class _Connection:
    """A connection to a daemon, to be closed."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._reader = protocol.answer_reader()
        self._messages: list[FromDaemon] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

    def send(self, request: Request) -> None:
        self._stream.settimeout(_GREETING_SECONDS)  # the socket's buffer takes all of it at once
        try:
            self._stream.sendall(protocol.encode(request))
        except ConnectionError as error:
            raise _EndedError from error

    def receive(self, deadline: float) -> FromDaemon:
        """The next message, before `time.monotonic()` is `deadline`.

        Raises ControlProtocolError, DaemonError if none will come, or TimeoutError.
        """
        while not self._messages:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._stream.settimeout(left if left < math.inf else None)
            try:
                data = self._stream.recv(_RECEIVE)
            except ConnectionError as error:
                raise _EndedError from error
            if not data:
                raise _EndedError
            self._messages = self._reader.feed(data)
        return self._messages.pop(0)


class _EndedError(DaemonError):
    def __init__(self) -> None:
        super().__init__("the daemon ended the connection", hint="its log says why")


def _connect(
    places: Places, *, of_any_version: bool = False, within: float = _GREETING_SECONDS
) -> _Connection | None:
    """A connection to a daemon that has greeted us, or None if there is no living one."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.setblocking(False)  # where too many wait already, it is an error, and no more waiting
    connection = _Connection(stream)
    with ExitStack() as unless_greeted:
        unless_greeted.enter_context(connection)
        try:
            stream.connect(os.fspath(places.socket))
            greeting = connection.receive(time.monotonic() + min(within, _GREETING_SECONDS))
        except (FileNotFoundError, ConnectionRefusedError, _EndedError):
            return None  # the last was ending just now
        except PermissionError as error:
            raise DaemonError(
                f"no permission to talk to the daemon at {places.socket}", hint="run this as root"
            ) from error
        except TimeoutError as error:
            raise DaemonError(
                f"the daemon at {places.socket} does not answer", hint=f"its log is {places.log}"
            ) from error
        except OSError as error:
            raise DaemonError(
                f"cannot connect to {places.socket}: {error.strerror or error}"
            ) from error
        _check_greeting(greeting, of_any_version=of_any_version)
        unless_greeted.pop_all()
    return connection


def _check_greeting(message: FromDaemon, *, of_any_version: bool = False) -> None:
    if not isinstance(message, protocol.Hello):
        raise ControlProtocolError("the daemon did not greet")
    if message.version != protocol.VERSION and not of_any_version:
        raise DaemonError(
            f"the daemon (process {message.pid}) is of another version",
            hint="restart it, or have it replaced: firstbyte daemon --replace",
        )


def _start(places: Places, config: Config) -> None:
    """Have a daemon running, started by us or by somebody else who does the same right now."""
    places.create()
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with locked(places.start_lock) as mine:
            if mine:
                connection = _connect(places)
                if connection is None:
                    try:
                        _spawn(places, config, deadline)
                    except TimeoutError:
                        break
                    except DaemonError:
                        # A service manager may have been about to start one, too.
                        connection = _connect(places)
                        if connection is None:
                            raise
                if connection is not None:
                    connection.close()
                return
        time.sleep(_POLL_SECONDS)
    raise DaemonError(
        f"the daemon did not start within {_START_SECONDS:.0f} seconds", hint=f"see {places.log}"
    )


def _spawn(places: Places, config: Config, deadline: float) -> None:
    """Start a daemon that outlives us, and wait until it serves.

    Raises its own DaemonError, or TimeoutError.
    """
    ours, theirs = socket.socketpair()
    with _Connection(ours) as connection:
        command = [sys.executable, "-m", "snapshotter.daemon"]
        command += ["--config", encode(config), "--ready", str(theirs.fileno())]
        with theirs, places.log.open("ab") as log:
            # setsid: the daemon is in a session of its own and nobody's child.
            subprocess.run(
                ["setsid", "--fork", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                cwd="/",
                check=True,
            )
        try:
            message = connection.receive(deadline)
        except _EndedError as error:
            raise DaemonError("the daemon cannot start", hint=f"see {places.log}") from error
    if isinstance(message, protocol.Failed):
        raise DaemonError(message.message, hint=message.hint)
    _check_greeting(message)
