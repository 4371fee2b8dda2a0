"""The command line's end of the control socket; starts the daemon when none runs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Self

import trio

from snapshotter.daemon import protocol
from snapshotter.daemon.config import encode
from snapshotter.daemon.errors import ControlProtocolError, DaemonError
from snapshotter.daemon.places import locked

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.daemon.config import Config
    from snapshotter.daemon.places import Places
    from snapshotter.daemon.protocol import FromDaemon, Reply, Request

_GREETING_SECONDS = 10.0  # a daemon that lives says hello at once
_START_SECONDS = 60.0  # a predecessor may be ending, and a slow disk has libraries to read
_END_SECONDS = 20.0  # a daemon that ends by itself has only its own mount left to take down
_POLL_SECONDS = 0.02
_RECEIVE = 64 << 10


async def ask(
    places: Places,
    request: Request,
    *,
    start: Config | None,
    on_progress: Callable[[protocol.Progress], None] = lambda _: None,
) -> Reply | None:
    """Send one request and wait for its reply; None if no daemon runs and none is to be started.

    `start` is the configuration for one that is started.

    Being cancelled interrupts the request in the daemon too. Raises DaemonError, with the
    daemon's own words if it refused.
    """
    of_any_version = isinstance(request, protocol.HandOverRequest | protocol.StopRequest)
    connection = await _connect(places, of_any_version=of_any_version)
    if connection is None and start is not None:
        await _start(places, start)
        connection = await _connect(places)
        if connection is None:
            raise DaemonError("the daemon ended right after its start", hint=f"see {places.log}")
    if connection is None:
        return None
    async with connection:
        await connection.send(request)
        while isinstance(message := await connection.receive(), protocol.Progress):
            on_progress(message)
    if isinstance(message, protocol.Failed):
        raise DaemonError(message.message, hint=message.hint)
    if isinstance(message, protocol.Hello):
        raise ControlProtocolError("the daemon greeted twice")
    return message


async def wait_ended(places: Places) -> None:
    """Wait until the daemon of these places is gone, for a while at most."""
    with trio.move_on_after(_END_SECONDS):
        while True:
            with locked(places.daemon_lock) as free:
                if free:
                    return
            await trio.sleep(_POLL_SECONDS)


class _Connection:
    """A connection to a daemon, to be closed."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._reader = protocol.answer_reader()
        self._messages: list[FromDaemon] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def send(self, request: Request) -> None:
        try:
            await self._stream.send_all(protocol.encode(request))
        except trio.BrokenResourceError as error:
            raise _EndedError from error

    async def receive(self) -> FromDaemon:
        """The next message. Raises ControlProtocolError, or DaemonError if none will come."""
        while not self._messages:
            try:
                data = await self._stream.receive_some(_RECEIVE)
            except trio.BrokenResourceError as error:
                raise _EndedError from error
            if not data:
                raise _EndedError
            self._messages = self._reader.feed(bytes(data))
        return self._messages.pop(0)


class _EndedError(DaemonError):
    def __init__(self) -> None:
        super().__init__("the daemon ended the connection", hint="its log says why")


async def _connect(places: Places, *, of_any_version: bool = False) -> _Connection | None:
    """A connection to a daemon that has greeted us, or None if there is no living one."""
    try:
        connection = _Connection(await trio.open_unix_socket(places.socket))
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except PermissionError as error:
        raise DaemonError(
            f"no permission to talk to the daemon at {places.socket}", hint="run this as root"
        ) from error
    except OSError as error:
        raise DaemonError(f"cannot connect to {places.socket}: {error.strerror}") from error
    try:
        with trio.move_on_after(_GREETING_SECONDS):
            _check_greeting(await connection.receive(), of_any_version=of_any_version)
            return connection
    except _EndedError:  # it was ending just now
        await connection.close()
        return None
    except BaseException:
        await connection.close()
        raise
    await connection.close()
    raise DaemonError(
        f"the daemon at {places.socket} does not answer", hint=f"its log is {places.log}"
    )


def _check_greeting(message: FromDaemon, *, of_any_version: bool = False) -> None:
    if not isinstance(message, protocol.Hello):
        raise ControlProtocolError("the daemon did not greet")
    if message.version != protocol.VERSION and not of_any_version:
        raise DaemonError(
            f"the daemon (process {message.pid}) is of another version",
            hint="restart it, or have it replaced: firstbyte daemon --replace",
        )


async def _start(places: Places, config: Config) -> None:
    """Have a daemon running, started by us or by somebody else who does the same right now."""
    places.create()
    with trio.move_on_after(_START_SECONDS):
        while True:
            with locked(places.start_lock) as mine:
                if mine:
                    connection = await _connect(places)
                    if connection is None:
                        try:
                            await _spawn(places, config)
                        except DaemonError:
                            # A service manager may have been about to start one, too.
                            connection = await _connect(places)
                            if connection is None:
                                raise
                    if connection is not None:
                        await connection.close()
                    return
            await trio.sleep(_POLL_SECONDS)
    raise DaemonError(
        f"the daemon did not start within {_START_SECONDS:.0f} seconds", hint=f"see {places.log}"
    )


async def _spawn(places: Places, config: Config) -> None:
    """Start a daemon that outlives us, and wait until it serves. Raises its own DaemonError."""
    readable, writable = os.pipe()
    with places.log.open("ab") as log:
        command = [sys.executable, "-m", "snapshotter.daemon"]
        command += ["--config", encode(config)]
        try:
            # setsid: the daemon is in a session of its own and nobody's child.
            await trio.run_process(
                ["setsid", "--fork", *command, "--ready", str(writable)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[writable],
                cwd="/",
            )
        finally:
            os.close(writable)
            outcome = trio.lowlevel.FdStream(readable)
    connection = _Connection(outcome)
    async with connection:
        try:
            message = await connection.receive()
        except _EndedError as error:
            raise DaemonError("the daemon cannot start", hint=f"see {places.log}") from error
    if isinstance(message, protocol.Failed):
        raise DaemonError(message.message, hint=message.hint)
    _check_greeting(message)
