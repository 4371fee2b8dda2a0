"""HTTP: one exchange at a time, streamed both ways, every wait with a deadline.

Only this module and `connections` know which HTTP library there is. It follows no redirect, adds no
credentials and judges no status; `session` does. Each way of speaking TLS, and each proxy, has
connections of its own: what was agreed with one client certificate, or without any check, serves no
other request.
"""

from __future__ import annotations

import math
import os
import ssl
import sys
from collections import OrderedDict
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import httpcore
import trio

from snapshotter.registry.connections import open_pool
from snapshotter.registry.deadlines import Deadlines
from snapshotter.registry.errors import NetworkError, ProtocolError
from snapshotter.registry.failures import network_error, tunnel_error
from snapshotter.registry.health import Health
from snapshotter.registry.image import PIECE
from snapshotter.registry.proxies import Proxies, address_of

# httpx loads its own command line, and with it rich and pygments, if it can: 0.15 s of every start
# for what nothing here calls. None makes that import fail as if they were missing.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
import httpx  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
    from types import TracebackType

_USER_AGENT = f"firstbyte/{version('firstbyte')}"

_MAX_POOLS = 16  # guess: more than a node has mirrors with certificates of their own
_MAX_DISCARD = 64 << 10  # an error's or redirect's body: reading it saves the connection


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

    def __init__(
        self, response: httpx.Response, server: str, deadlines: Deadlines, pool: _Pool
    ) -> None:
        """`server` is what errors call it."""
        self._response = response
        self._server = server
        self._deadlines = deadlines
        self._pool: _Pool | None = pool
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
            with (
                _errors_of(self.url, self._server),
                trio.move_on_after(allowed - waited) as patience,
            ):
                piece = await anext(body, None)
            if patience.cancelled_caught:
                raise NetworkError(f"{self._server} stopped sending after {received} bytes")
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
        try:
            with suppress(NetworkError), _errors_of(self.url, self._server):
                await self._response.aclose()
                if self._body is not None:
                    # Stopped half-way, the libraries' nested generators would be left to the
                    # garbage collector. On the closed connection they end at once.
                    async for _ in self._body:
                        pass
        finally:
            pool, self._pool = self._pool, None
            if pool is not None:
                await pool.leave()


_Route = tuple[ssl.SSLContext | None, float | None, str | None]
"""The TLS context (None: neither server nor proxy speaks it), the dial timeout, and the proxy."""


@dataclass(eq=False)
class _Pool:
    """Connections that are made in one way. `retired`: to be closed when nobody uses it."""

    client: httpx.AsyncClient
    users: int = 0
    retired: bool = False

    async def leave(self) -> None:
        self.users -= 1
        if self.retired and not self.users:
            await self.client.aclose()

    async def retire(self) -> None:
        self.retired = True
        if not self.users:
            await self.client.aclose()


class Transport:
    """The connections of one process. Use `async with`, and start tasks that use it inside.

    `health` remembers which servers failed lately, for those who can choose.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        deadlines: Deadlines | None = None,
        proxies: Proxies | None = None,
    ) -> None:
        """`proxies` None are those that the environment names."""
        self._proxies = Proxies.of(os.environ) if proxies is None else proxies
        self.deadlines = deadlines or Deadlines()
        self.health = Health()
        self._tls = tls
        self._open = False
        self._pools: OrderedDict[_Route, _Pool] = OrderedDict()  # the last one was used last

    async def __aenter__(self) -> Self:
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = False
        while self._pools:
            _, pool = self._pools.popitem()
            await pool.client.aclose()

    async def open(
        self,
        method: str,
        url: str,
        headers: Iterable[tuple[str, str]],
        body: bytes | AsyncIterator[bytes] = b"",
        *,
        tls: ssl.SSLContext | None = None,
        dial_timeout: float | None = None,
        deadlines: Deadlines | None = None,
    ) -> Response:
        """Send one request and return the response to it, whatever its status; close that.

        A streamed body needs a Content-Length header, or `Transfer-Encoding: chunked`. `tls` and
        `deadlines` replace the transport's own; `dial_timeout` limits connecting without TLS.
        Raises NetworkError, TlsError, ProxyError, or ProtocolError for a URL that leads nowhere.
        """
        proxy = self._proxies.proxy_for(url)
        server = _host(url)
        if proxy is not None:
            server += f" (through the proxy {address_of(proxy)})"
        waits = deadlines or self.deadlines
        # A streamed body takes as long as it takes; each of its writes has a deadline.
        whole = math.inf
        if isinstance(body, bytes):
            whole = 2 * waits.connect + (dial_timeout or 0) + waits.answer
        timeout = httpx.Timeout(
            connect=waits.connect, pool=waits.connect, write=waits.answer, read=waits.answer
        )
        if tls is None and (_speaks_tls(url) or (proxy is not None and _speaks_tls(proxy))):
            tls = self._default_tls()
        pool = await self._enter_pool((tls, dial_timeout, proxy))
        response = None
        try:
            with _errors_of(url, server), trio.move_on_after(whole):
                request = httpx.Request(
                    method,
                    url,
                    headers=_with_defaults(headers),
                    content=body if isinstance(body, bytes) else None,
                    extensions={"timeout": timeout.as_dict()},
                )
                if not isinstance(body, bytes):
                    request.stream = _RequestBody(body)
                response = await pool.client.send(request, stream=True)
        finally:
            if response is None:
                await pool.leave()
        if response is None:
            raise NetworkError(f"{server} does not answer in time")
        return Response(response, server, waits, pool)

    def _default_tls(self) -> ssl.SSLContext:
        """Made for the first who wants it: the system's certificates take 20 ms to read."""
        self._tls = self._tls or ssl.create_default_context()
        return self._tls

    async def _enter_pool(self, route: _Route) -> _Pool:
        assert self._open, "Transport is used outside `async with`"
        pool = self._pools.get(route)
        if pool is None:
            tls, dial_timeout, proxy = route
            proxy_tls = None
            if proxy is not None and _speaks_tls(proxy):
                proxy_tls = self._default_tls()
            connections = open_pool(
                tls, dial_timeout=dial_timeout, proxy=proxy, proxy_tls=proxy_tls
            )
            transport = _PoolTransport(connections)
            client = httpx.AsyncClient(transport=transport, trust_env=False)
            pool = self._pools[route] = _Pool(client)
        pool.users += 1
        self._pools.move_to_end(route)
        if len(self._pools) > _MAX_POOLS:
            _, oldest = self._pools.popitem(last=False)
            await oldest.retire()
        return pool


def _with_defaults(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Headers, and what every request says unless they say otherwise."""
    given = list(headers)
    names = {name.lower() for name, _ in given}
    defaults = (("User-Agent", _USER_AGENT), ("Accept-Encoding", "identity"))
    return [pair for pair in defaults if pair[0].lower() not in names] + given


@contextmanager
def _errors_of(url: str, server: str) -> Iterator[None]:
    """The HTTP library's exceptions, as this room's."""
    try:
        yield
    except (httpx.TimeoutException, httpcore.TimeoutException) as error:
        raise NetworkError(f"{server} does not answer in time") from error
    except (httpcore.UnsupportedProtocol, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ProtocolError(f"{url[:200]!r} is not a URL to fetch from") from error
    except httpcore.ProxyError as error:
        raise tunnel_error(server, str(error)) from error
    except (httpcore.LocalProtocolError, httpx.LocalProtocolError) as error:
        raise ProtocolError(f"no valid request to {server} ({error})") from error
    except (httpx.TransportError, httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise network_error(server, error) from error


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2] or url[:100]


def _speaks_tls(url: str) -> bool:
    return not url.startswith("http:")
