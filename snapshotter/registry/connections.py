"""Connections to servers, and through proxies, as the HTTP library makes and keeps them for us.

Measured with this library on trio, 4 connections, plain HTTP on loopback: HTTP/2 costs 2.5 to 3
times HTTP/1.1's CPU per byte, so it is off; network reads of 256 KiB instead of 64 KiB raise
843 MiB/s a core to 1391 (TLS records are 16 KiB and gain nothing), hence `_BigReads`.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  (who looks up the first name needs it: 10 ms of a start)
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import httpcore
import trio

from snapshotter.registry.image import PIECE
from snapshotter.registry.proxies import address_of

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 64  # guess: above what the fetch scheduler keeps in flight, below fd limits
_KEEP_SECONDS = 30.0


def open_pool(
    tls: ssl.SSLContext | None,
    *,
    dial_timeout: float | None,
    proxy: str | None,
    proxy_tls: ssl.SSLContext | None,
) -> httpcore.AsyncConnectionPool:
    """Connections that are made when they are needed, and kept for a while.

    `tls` is for servers, `proxy_tls` for a proxy that speaks TLS itself; None if none of them does.
    `dial_timeout` limits connecting without TLS, in seconds.
    """
    settings: dict[str, Any] = {
        "ssl_context": tls,
        "max_connections": _MAX_CONNECTIONS,
        "max_keepalive_connections": _MAX_CONNECTIONS,
        "keepalive_expiry": _KEEP_SECONDS,
        "network_backend": _BigReads(dial_timeout),
    }
    if proxy is None:
        return httpcore.AsyncConnectionPool(**settings)
    url = urlsplit(proxy)
    login = None
    if url.username is not None:
        login = unquote(url.username).encode(), unquote(url.password or "").encode()
    log.info("registries are asked through the proxy %s", address_of(proxy))
    return _ProxyPool(
        proxy_url=f"{url.scheme}://{address_of(proxy)}",
        proxy_auth=login,
        proxy_ssl_context=proxy_tls if url.scheme == "https" else None,
        **settings,
    )


class _Tunnel(httpcore.AsyncConnectionInterface):
    """A connection of the library's through a proxy, which it does not close by itself when TLS
    fails or is given up in there: the pool would keep a place for it for ever."""

    def __init__(self, connection: httpcore.AsyncConnectionInterface) -> None:
        self._connection = connection
        self._made = False

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        try:
            response = await self._connection.handle_async_request(request)
        except BaseException:
            if not self._made:
                with trio.CancelScope(shield=True):
                    await self._connection.aclose()
            raise
        self._made = True
        return response

    async def aclose(self) -> None:
        await self._connection.aclose()

    def info(self) -> str:
        return self._connection.info()

    def can_handle_request(self, origin: httpcore.Origin) -> bool:
        return self._connection.can_handle_request(origin)

    def is_available(self) -> bool:
        return self._connection.is_available()

    def has_expired(self) -> bool:
        return self._connection.has_expired()

    def is_idle(self) -> bool:
        return self._connection.is_idle()

    def is_closed(self) -> bool:
        return self._connection.is_closed()


class _ProxyPool(httpcore.AsyncHTTPProxy):
    """Connections through a proxy: tunnels for TLS, else requests that it passes on."""

    def create_connection(self, origin: httpcore.Origin) -> httpcore.AsyncConnectionInterface:
        return _Tunnel(super().create_connection(origin))


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
    """The trio backend with `_BigReadStream`s. `dial_timeout` is for TCP alone, without TLS."""

    def __init__(self, dial_timeout: float | None) -> None:
        self._backend = httpcore.TrioBackend()
        self._dial_timeout = dial_timeout

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._backend.connect_tcp(
            host, port, self._dial_timeout or timeout, local_address, socket_options
        )
        return _BigReadStream(stream)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)
