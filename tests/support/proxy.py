"""A proxy as companies have them: it tunnels, or passes requests on; with a password, with TLS."""

from __future__ import annotations

import base64
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import trio

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

_PIECE = 64 << 10


@dataclass
class Proxy:
    """Change it at any time. `names` are where hosts are (HOST:PORT to HOST:PORT), as only the
    proxy knows; `asked` are the request lines so far, without the version."""

    address: str
    names: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    user: str = ""
    """USER:PASSWORD that it wants, or none."""
    refuses: str = ""
    """The status line that answers everything, if it refuses everything."""

    def answer(self, headers: list[str]) -> str:
        """The status line for a request that is not served; empty if it is."""
        authorization = f"basic {base64.b64encode(self.user.encode()).decode()}".lower()
        given = [one.partition(":")[2].strip().lower() for one in headers if _is(one, "proxy-auth")]
        if self.user and authorization not in given:
            return "407 Proxy Authentication Required"
        return self.refuses


@asynccontextmanager
async def running_proxy(tls: ssl.SSLContext | None = None) -> AsyncIterator[Proxy]:
    """Serve on a free loopback port for as long as the block lasts, with TLS if given a context."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy = Proxy(f"127.0.0.1:{listeners[0].socket.getsockname()[1]}")

        async def serve(stream: trio.abc.Stream) -> None:
            if tls is not None:
                stream = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
            try:
                async with stream:
                    await _serve(proxy, stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # somebody went away

        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield proxy
        nursery.cancel_scope.cancel()


async def _serve(proxy: Proxy, client: trio.abc.Stream) -> None:
    """One request, or one tunnel, a connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        more = await client.receive_some(_PIECE)
        if not more:
            return
        received += more
    head, _, body = received.partition(b"\r\n\r\n")
    line, *headers = head.decode("latin-1").split("\r\n")
    method, target, _ = line.split(" ")
    proxy.asked.append(f"{method} {target}")
    if answer := proxy.answer(headers):
        await client.send_all(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())
        return
    url = urlsplit(target)
    name = target if method == "CONNECT" else f"{url.hostname}:{url.port or 80}"
    host, _, port = proxy.names[name].rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as server:
        if method == "CONNECT":
            await client.send_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            path = url._replace(scheme="", netloc="").geturl()
            kept = [one for one in headers if not _is(one, "proxy-") and not _is(one, "connection")]
            lines = [f"{method} {path} HTTP/1.1", *kept, "Connection: close", "", ""]
            await server.send_all("\r\n".join(lines).encode("latin-1") + body)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_pass, client, server, nursery.cancel_scope)
            nursery.start_soon(_pass, server, client, nursery.cancel_scope)


async def _pass(source: trio.abc.Stream, sink: trio.abc.Stream, both: trio.CancelScope) -> None:
    """Until one side ends; then it is over for both."""
    try:
        while data := await source.receive_some(_PIECE):
            await sink.send_all(data)
    except trio.BrokenResourceError:
        pass
    both.cancel()


def _is(header: str, prefix: str) -> bool:
    return header.lower().startswith(prefix)
