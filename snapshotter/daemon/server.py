"""The daemon's end of the control socket: who may connect, what a connection does."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import trio

from index.errors import FirstByteError
from snapshotter.daemon import protocol
from snapshotter.daemon.errors import ControlProtocolError, DaemonError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from snapshotter.daemon.protocol import FromDaemon, Reply, Request

log = logging.getLogger(__name__)

# Connections that nobody has taken yet, while a daemon starts or is busy. Clients that find it full
# are told so at once (EAGAIN, unix(7)) and not made to wait. The kernel's own limit is 4096.
_BACKLOG = 4096
_RECEIVE = 64 << 10
_REQUEST_SECONDS = 30.0  # for a client to say what it wants
_SEND_SECONDS = 30.0  # for a client to take an answer
_PROGRESS_WAITING = 16  # what a slow terminal does not take is left out


class Handler(Protocol):
    """Does what requests ask for."""

    async def handle(self, request: Request, report: Callable[[protocol.Progress], None]) -> Reply:
        """Raises FirstByteError. Cancelled when the client goes away."""


def listen(path: Path) -> trio.SocketListener:
    """Open the control socket; only the owner can connect, from its first moment on.

    The caller must know that no daemon listens there: what a dead one left is replaced. Raises
    DaemonError.
    """
    path.unlink(missing_ok=True)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        control.bind(os.fspath(path))
    except OSError as error:
        control.close()
        raise DaemonError(
            f"cannot open the control socket {path}: {error.strerror or error}",
            hint="a socket's path has 107 bytes at most: choose a shorter --state",
        ) from error
    finally:
        os.umask(previous)
    control.listen(_BACKLOG)
    return trio.SocketListener(trio.socket.from_stdlib_socket(control))


class Connections:
    """Serves connections, and knows how many there are, and were in all.

    `idle` is called when the last of them has gone.
    """

    def __init__(self, handler: Handler, idle: Callable[[], None]) -> None:
        self._handler = handler
        self._idle = idle
        self.count = self.total = 0
        self._empty = trio.Event()

    async def drained(self) -> None:
        """Wait until there is no connection."""
        while self.count:
            await self._empty.wait()

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection, from greeting to reply. Never raises but Cancelled."""
        self.count += 1
        self.total += 1
        try:
            async with stream:
                await self._converse(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client has gone, and its request was cancelled
        except FirstByteError as error:
            log.warning("control connection ended: %s", error)
        finally:
            self.count -= 1
            if not self.count:
                self._empty.set()
                self._empty = trio.Event()
                self._idle()

    async def _converse(self, stream: trio.SocketStream) -> None:
        await _send(stream, protocol.Hello(protocol.VERSION, os.getpid()))
        request = await _receive(stream)
        if request is not None:
            reply = await self._perform(stream, request)
            if reply is not None:
                await _send(stream, reply)

    async def _perform(self, stream: trio.SocketStream, request: Request) -> Reply | None:
        """The reply, or None if the client did not wait for it."""
        reply: Reply | None = None
        send_progress, progress = trio.open_memory_channel[protocol.Progress](_PROGRESS_WAITING)

        def report(event: protocol.Progress) -> None:
            with suppress(trio.WouldBlock):
                send_progress.send_nowait(event)

        async def forward() -> None:
            async for event in progress:
                with suppress(trio.BrokenResourceError):
                    await _send(stream, event)

        async def hang_up() -> None:
            """A client says nothing after its request, so whatever comes is its end."""
            with suppress(trio.BrokenResourceError):
                await stream.receive_some(1)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang_up)
            async with trio.open_nursery() as answering:
                answering.start_soon(forward)
                with send_progress:
                    reply = await self._reply(request, report)
            nursery.cancel_scope.cancel()
        return reply

    async def _reply(self, request: Request, report: Callable[[protocol.Progress], None]) -> Reply:
        try:
            return await self._handler.handle(request, report)
        except FirstByteError as error:
            log.warning("refused %s: %s", type(request).__name__, error)
            return protocol.Failed(error.message, error.hint)
        except OSError as error:
            log.warning("refused %s: %s", type(request).__name__, error)
            return protocol.Failed(str(error))
        except Exception as error:
            log.exception("a mistake in FirstByte while handling %r", request)
            return protocol.Failed(f"internal error: {error!r}", "the daemon's log has the details")


async def _receive(stream: trio.SocketStream) -> Request | None:
    """The client's request, or None if it hangs up instead. Raises ControlProtocolError."""
    reader = protocol.request_reader()
    with trio.move_on_after(_REQUEST_SECONDS):
        while data := await stream.receive_some(_RECEIVE):
            if requests := reader.feed(bytes(data)):
                if len(requests) > 1:
                    raise ControlProtocolError("more than one request on a control connection")
                return requests[0]
        return None
    raise ControlProtocolError("a client connected and asked for nothing")


async def _send(stream: trio.SocketStream, message: FromDaemon) -> None:
    with trio.move_on_after(_SEND_SECONDS) as waiting:
        await stream.send_all(protocol.encode(message))
    if waiting.cancelled_caught:
        raise trio.BrokenResourceError("the client does not read")
