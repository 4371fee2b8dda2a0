"""Which proxy leads to a host, by the environment that containerd, docker and podman go by, too.

    HTTPS_PROXY, https_proxy   for https URLs: [http[s]://][USER:PASSWORD@]HOST[:PORT]
    HTTP_PROXY, http_proxy     for http URLs
    NO_PROXY, no_proxy         hosts to be asked directly, with commas between them:
        example.com            this name, and all below it
        .example.com           the names below it; *.example.com is the same
        10.1.2.3, fd00::1      an address, if that is how the host is named
        10.0.0.0/8             all addresses of a network
        …:5000                 any but a network, on this port alone; [fd00::1]:5000
        *                      every host

The first of two names that is not empty counts. This machine is always asked directly. As in Go
(golang.org/x/net/http/httpproxy), names are not looked up to find out about addresses. Unlike
there, a proxy that is not understood is an error, and not passed over. No sockets here.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from snapshotter.registry.endpoint import is_loopback
from snapshotter.registry.errors import ProxyError

if TYPE_CHECKING:
    from collections.abc import Mapping

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class _Direct:
    """One entry of NO_PROXY: an address, a network, or a name and the end of those below it. With a
    port it is for that one alone."""

    address: _Address | None = None
    network: _Network | None = None
    name: str = ""
    below: str = ""
    port: str = ""

    def covers(self, name: str, address: _Address | None, port: str) -> bool:
        if self.port not in ("", port):
            return False
        if address is not None and (
            address == self.address or (self.network is not None and address in self.network)
        ):
            return True
        return bool(self.below) and (name == self.name or name.endswith(self.below))


class Proxies:
    """The proxies of a process; none by default."""

    def __init__(self, *, http: str = "", https: str = "", no_proxy: str = "") -> None:
        """As the variables of these names."""
        self._proxies = {"http": ("HTTP_PROXY", http), "https": ("HTTPS_PROXY", https)}
        entries = [entry.strip().lower() for entry in no_proxy.split(",")]
        self._any = "*" not in entries and bool(http or https)
        self._direct = [one for entry in entries if (one := _direct(entry)) is not None]

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Proxies:
        """What an environment says."""

        def value(name: str) -> str:
            return environment.get(name) or environment.get(name.lower(), "")

        return cls(http=value("HTTP_PROXY"), https=value("HTTPS_PROXY"), no_proxy=value("NO_PROXY"))

    def proxy_for(self, url: str) -> str | None:
        """The URL of the proxy to ask for `url`, or None to ask its host directly.

        Raises ProxyError if the one that is named is none that can be used.
        """
        if not self._any:
            return None
        try:
            target = urlsplit(url)
            name, port = target.hostname or "", target.port
        except ValueError:
            return None  # no URL, as is said where it is fetched
        variable, proxy = self._proxies.get(target.scheme, ("", ""))
        if not proxy or is_loopback(target.netloc.rpartition("@")[2]):
            return None
        address = _address(name)
        number = str(port or _PORTS[target.scheme])
        if any(one.covers(name, address, number) for one in self._direct):
            return None
        return _parse(proxy, variable)


def address_of(proxy: str) -> str:
    """The proxy as HOST:PORT, to be shown: without its password."""
    return urlsplit(proxy).netloc.rpartition("@")[2]


def _parse(proxy: str, variable: str) -> str:
    url = proxy if "://" in proxy else f"http://{proxy}"
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise ProxyError(
            f"{variable} names no proxy", hint="it looks like this: http://proxy.example:3128"
        )
    if parts.scheme not in _PORTS:
        raise ProxyError(
            f"{variable} names a proxy that speaks {parts.scheme}, which FirstByte does not",
            hint="use an http:// or https:// proxy, or name the registry in NO_PROXY",
        )
    return url


def _direct(entry: str) -> _Direct | None:
    """None if it cannot be of any host."""
    if (network := _network(entry)) is not None:
        return _Direct(network=network)
    host, port = _split(entry)
    if (address := _address(host)) is not None:
        return _Direct(address=address, port=port)
    host = host.removeprefix("*") if host.startswith("*.") else host
    if not host.strip("."):
        return None
    if host.startswith("."):
        return _Direct(below=host, port=port)
    return _Direct(name=host, below=f".{host}", port=port)


def _split(entry: str) -> tuple[str, str]:
    """Host and port, which may be empty. Only in brackets has a host colons beside a port."""
    if entry.startswith("["):
        host, _, rest = entry[1:].partition("]")
        return host, rest.removeprefix(":")
    host, colon, port = entry.partition(":")
    return (entry, "") if ":" in port else (host, port if colon else "")


def _address(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _network(text: str) -> _Network | None:
    _, slash, bits = text.rpartition("/")
    if not slash or not bits.isdecimal():
        return None
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
