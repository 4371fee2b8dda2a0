"""HTTP: one exchange at a time, streamed both ways, every wait with a deadline.

The only module that knows which HTTP library there is. It follows no redirect, adds no
credentials and judges no status; `session` does.

Measured with this library on trio, 4 connections, plain HTTP on loopback: HTTP/2 costs 2.5 to 3
times HTTP/1.1's CPU per byte, so it is off; network reads of 256 KiB instead of 64 KiB raise
843 MiB/s a core to 1391 (TLS records are 16 KiB and gain nothing), hence `_BigReads`.
"""

from __future__ import annotations

import math
import os
import socket
import ssl
import sys
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import httpcore
import trio

from snapshotter.registry.errors import NetworkError, ProtocolError, TlsError
from snapshotter.registry.image import PIECE

# httpx loads its own command line, and with it rich and pygments, if it can: 0.15 s of every start
# for what nothing here calls. None makes that import fail as if they were missing.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
import httpx  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
    from types import TracebackType

_USER_AGENT = f"firstbyte/{version('firstbyte')}"

_MAX_CONNECTIONS = 64  # guess: above what the fetch scheduler keeps in flight, below fd limits
_MAX_DISCARD = 64 << 10  # an error's or redirect's body: reading it saves the connection


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long to wait, in seconds, before an exchange counts as failed.

    `connect`: for a free connection, and to connect with TLS. `answer`: for the status line, or
    for room to send. `stall`: for body bytes in sum, beyond what `min_rate` (bytes/s) allows for
    those that came: a server that drips a byte now and then does not hold us. Time the reader
    takes to use the bytes does not count. All guesses on the patient side.
    """

    connect: float = 15
    answer: float = 60
    stall: float = 30
    min_rate: float = 4096


class _BigReadStream(httpcore.AsyncNetworkStream):
    """A connection that reads up to PIECE bytes at once, whatever is asked for."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max(max_bytes, PIECE), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _BigReadStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _BigReads(httpcore.AsyncNetworkBackend):
    """The trio backend with `_BigReadStream`s."""

    def __init__(self) -> None:
        self._backend = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        return _BigReadStream(stream)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class _RequestBody(httpx.AsyncByteStream):
    """A streamed request body. Not a generator: a server may hang up on it half-way."""

    def __init__(self, body: AsyncIterator[bytes]) -> None:
        self._body = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._body


class _ResponseBody(httpx.AsyncByteStream):
    """A response body of the pool, as the client wants it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[bytes]:
        iterator: AsyncIterator[bytes] = aiter(self._stream)
        return iterator

    async def aclose(self) -> None:
        await self._stream.aclose()


class _PoolTransport(httpx.AsyncBaseTransport):
    """Connects the client to a pool that has our network backend."""

    def __init__(self, pool: httpcore.AsyncConnectionPool) -> None:
        self._pool = pool

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._pool.handle_async_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=request.url.raw_scheme,
                    host=request.url.raw_host,
                    port=request.url.port,
                    target=request.url.raw_path,
                ),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_ResponseBody(response.stream),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class Response:
    """A status, headers, and a body that is read as it comes. Close it: `async with`."""

    def __init__(self, response: httpx.Response, deadlines: Deadlines) -> None:
        self._response = response
        self._deadlines = deadlines
        self._body: AsyncIterator[bytes] | None = None
        self.status: int = response.status_code
        self.url = str(response.request.url)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def header(self, name: str) -> str | None:
        """One header's value; several of one name come joined by ", "."""
        value: str | None = self._response.headers.get(name)
        return value

    def header_values(self, name: str) -> list[str]:
        """All of a header's values, one per line they came in."""
        return self._response.headers.get_list(name)

    @property
    def content_length(self) -> int | None:
        """The body's size in bytes, if it was announced."""
        text = self.header("content-length")
        return int(text) if text is not None and text.isdecimal() else None

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body, in pieces of at most PIECE bytes. NetworkError if it ends or stalls early."""
        body = self._body = self._response.aiter_raw()
        waited = 0.0
        received = 0
        while True:
            allowed = self._deadlines.stall + received / self._deadlines.min_rate
            started = trio.current_time()
            with _errors_of(self.url), trio.move_on_after(allowed - waited) as patience:
                piece = await anext(body, None)
            if patience.cancelled_caught:
                raise NetworkError(f"{_host(self.url)} stopped sending after {received} bytes")
            waited += trio.current_time() - started
            if piece is None:
                return
            received += len(piece)
            for cut in range(0, len(piece), PIECE):
                yield piece[cut : cut + PIECE]

    async def read(self, limit: int) -> bytes | None:
        """The whole body, or None if it has more than `limit` bytes."""
        if (self.content_length or 0) > limit:
            return None
        body = bytearray()
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                body += piece
                if len(body) > limit:
                    return None
        return bytes(body)

    async def discard(self) -> None:
        """Be done with a response whose body does not matter; keeps the connection if it can."""
        try:
            await self.read(_MAX_DISCARD)
        except NetworkError:
            pass  # the connection is lost, and nothing else
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Give the connection back, or drop it if the body was not read to its end."""
        with suppress(NetworkError), _errors_of(self.url):
            await self._response.aclose()
            if self._body is not None:
                # Stopped half-way, the libraries' nested generators would be left to the garbage
                # collector. On the closed connection they end at once.
                async for _ in self._body:
                    pass


class Transport:
    """The connections of one process. Use `async with`, and start tasks that use it inside."""

    def __init__(
        self, *, tls: ssl.SSLContext | None = None, deadlines: Deadlines | None = None
    ) -> None:
        self._tls = tls
        self._deadlines = deadlines or Deadlines()
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        pool = httpcore.AsyncConnectionPool(
            ssl_context=self._tls or ssl.create_default_context(),
            max_connections=_MAX_CONNECTIONS,
            max_keepalive_connections=_MAX_CONNECTIONS,
            keepalive_expiry=30,
            network_backend=_BigReads(),
        )
        self._client = httpx.AsyncClient(transport=_PoolTransport(pool), trust_env=False)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | AsyncIterator[bytes] = b"",
        *,
        answer_within: float | None = None,
    ) -> Response:
        """Send one request and return the response to it, whatever its status; close that.

        A streamed body needs a Content-Length header, or `Transfer-Encoding: chunked`.
        `answer_within` replaces `Deadlines.answer`. Raises NetworkError, TlsError, or ProtocolError
        for a URL that leads nowhere.
        """
        assert self._client is not None, "Transport is used outside `async with`"
        waits = self._deadlines
        answer = answer_within or waits.answer
        # A streamed body takes as long as it takes; each of its writes has a deadline.
        whole = 2 * waits.connect + answer if isinstance(body, bytes) else math.inf
        timeout = httpx.Timeout(
            connect=waits.connect, pool=waits.connect, write=answer, read=answer
        )
        with _errors_of(url), trio.move_on_after(whole) as patience:
            request = httpx.Request(
                method,
                url,
                headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **headers},
                content=body if isinstance(body, bytes) else None,
                extensions={"timeout": timeout.as_dict()},
            )
            if not isinstance(body, bytes):
                request.stream = _RequestBody(body)
            response = await self._client.send(request, stream=True)
        if patience.cancelled_caught:
            raise NetworkError(f"{_host(url)} does not answer in time")
        return Response(response, waits)


@contextmanager
def _errors_of(url: str) -> Iterator[None]:
    """The HTTP library's exceptions, as this room's."""
    host = _host(url)
    try:
        yield
    except (httpx.TimeoutException, httpcore.TimeoutException) as error:
        raise NetworkError(f"{host} does not answer in time") from error
    except (httpcore.UnsupportedProtocol, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ProtocolError(f"{url[:200]!r} is not a URL to fetch from") from error
    except (httpcore.LocalProtocolError, httpx.LocalProtocolError) as error:
        raise ProtocolError(f"no valid request to {host} ({error})") from error
    except (httpx.TransportError, httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise _network_error(host, error) from error


def _network_error(host: str, error: Exception) -> NetworkError:
    """The cause is deep in a chain: the libraries wrap errors without their text."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return TlsError(
                f"the certificate of {host} is not valid ({cause.verify_message})",
                hint="install its CA on this machine, or use --plain-http if it has no TLS",
            )
        if isinstance(cause, ssl.SSLError):
            return TlsError(
                f"no TLS with {host} ({cause.reason or cause})",
                hint="if the registry speaks plain HTTP, use --plain-http",
            )
        if isinstance(cause, socket.gaierror):
            return NetworkError(f"cannot find {host} ({cause.strerror})", hint="is the name right?")
        if isinstance(cause, OSError) and cause.errno:
            return NetworkError(
                f"connection to {host} failed ({os.strerror(cause.errno)})",
                hint="is the registry running, and reachable from here?",
            )
    return NetworkError(f"connection to {host} failed ({error or type(error).__name__})")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what caused it, the deepest first."""
    nested = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for cause in (*nested, error.__cause__, error.__context__):
        if cause is not None:
            yield from _causes(cause)
    yield error


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2] or url[:100]
